"""The weights in training: which of a model's are trained, and the float32 copies that an optimizer
moves.

A step is often smaller than the last bit of a 16-bit weight, and would be lost. So training moves a
master of each such weight in float32, and the model computes with its rounding. Of several
processes each has a part of every master.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.errors import extra
from blockpruner.healing.settings import Train
from blockpruner.model.process_group import ProcessGroup
from blockpruner.scoring.losses import wide


class TrainedWeights(nn.Module):
    """The masters of the trained weights. The model itself is not in it: it is neither saved nor
    moved with them."""

    def __init__(
        self, live: Mapping[str, nn.Parameter], end_: Callable[[], object], team: ProcessGroup
    ) -> None:
        """`live` is what the model computes with, by name; `end_` leaves the model with plain
        weights alone."""
        super().__init__()
        self.end_ = end_
        self.team = team
        self.closed = False
        """Whether gradients are thrown away."""
        self.masters = nn.ParameterList(map(self._master, live.values()))
        self.pairs = list[tuple[nn.Parameter, nn.Parameter]]()
        """The weights of which the master is another tensor, each with its master."""
        for weight, master in zip(live.values(), self.masters, strict=True):
            if weight is not master:
                self.pairs.append((weight, master))
        for weight, master in self.pairs:
            weight.register_post_accumulate_grad_hook(partial(self._collect_, master))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def show_(self) -> None:
        """Round the masters to the weights that the model computes with."""
        for weight, master in self.pairs:
            if self.team.count == 1:
                weight.copy_(master)
            else:
                weight.copy_(self.team.all_gather(master.detach(), weight.shape))

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        if self.team.count > 1:
            return nn.Parameter(self.team.shard(wide(weight.detach())))
        if wide(weight) is weight:
            return weight
        return nn.Parameter(weight.detach().float())

    def _collect_(self, master: nn.Parameter, weight: Tensor) -> None:
        """Add the gradient of a weight to that of its master."""
        assert weight.grad is not None
        gradient, weight.grad = weight.grad, None
        if self.closed:
            return
        if self.team.count > 1:
            gradient = self.team.reduce_scatter(wide(gradient))
        if master.grad is None:
            master.grad = wide(gradient)
        else:
            master.grad.add_(gradient)


def trained_weights_(model: PreTrainedModel, recipe: Train, team: ProcessGroup) -> TrainedWeights:
    """Prepare a model for training. "lora": adapters on every linear layer but the head; the end
    merges them into the model's own weights. "all": all weights but embeddings and head."""
    if recipe.weights == "lora":
        with extra("train"):
            from peft import LoraConfig, get_peft_model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            config = LoraConfig(
                r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", bias="none"
            )
            # With a cast of adapters peft would copy inputs as float32.
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        live = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        return TrainedWeights(live, adapted.merge_and_unload, team)
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    live = {name: weight for name, weight in model.named_parameters() if id(weight) not in ends}
    for weight in live.values():
        weight.requires_grad_()
    return TrainedWeights(live, partial(model.requires_grad_, False), team)
