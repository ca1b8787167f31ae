"""The weights in training: which weights of a model are trained, and the float32 copies that an
optimizer moves.

A step is often smaller than the last bit of a 16-bit weight, and would be lost. So training moves a
master of each such weight in float32, and the model computes with the rounded master.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.errors import extra
from blockpruner.healing.settings import Train
from blockpruner.scoring.losses import wide


class TrainedWeights(nn.Module):
    """The masters of the trained weights. The model itself is not a part of this module, so it is
    neither saved nor moved with them."""

    def __init__(
        self, model_weights: Iterable[nn.Parameter], finish_: Callable[[], object]
    ) -> None:
        """`model_weights` are what the model computes with. `finish_` turns the model into one
        without adapters, after the training."""
        super().__init__()
        self.finish_ = finish_
        self.masters = nn.ParameterList()
        self.rounded_weights = list[tuple[nn.Parameter, nn.Parameter]]()
        """The weights that are roundings of their masters, each with its master."""
        for weight in model_weights:
            master = weight
            # A float32 or float64 weight is its own master.
            if wide(weight) is not weight:
                master = nn.Parameter(weight.detach().float())
                move_gradient_ = partial(_move_gradient_, master)
                weight.register_post_accumulate_grad_hook(move_gradient_)  # type: ignore[no-untyped-call]
                self.rounded_weights.append((weight, master))
            self.masters.append(master)

    @torch.no_grad()
    def copy_to_model_(self) -> None:
        """Round the masters to the weights that the model computes with."""
        for weight, master in self.rounded_weights:
            weight.copy_(master)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the masters on the CPU, for `load_state_dict`."""
        copies = {}
        for name, master in self.state_dict().items():
            copies[name] = master.detach().clone().cpu()
        return copies


def _move_gradient_(master: nn.Parameter, weight: Tensor) -> None:
    """Add the gradient of a weight to that of its master, in float32."""
    gradient = weight.grad
    assert gradient is not None
    weight.grad = None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)


def trained_weights_(model: PreTrainedModel, recipe: Train) -> TrainedWeights:
    """Prepare a model for training.

    "lora": adapters on every linear layer but the head; `finish_` merges them into the model's own
    weights. "all": all weights but embeddings and head. Raises MissingPackageError for "lora"
    without peft.
    """
    if recipe.weights == "lora":
        return _adapters_(model, recipe)
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    weights = []
    for weight in model.parameters():
        # The head may be the same tensor as the embeddings.
        if weight is not embeddings and weight is not head:
            weights.append(weight.requires_grad_())
    return TrainedWeights(weights, partial(model.requires_grad_, False))


def _adapters_(model: PreTrainedModel, recipe: Train) -> TrainedWeights:
    with extra("train"):
        from peft import LoraConfig, get_peft_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", bias="none"
        )
        # With a cast of adapters peft would copy inputs as float32.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    return TrainedWeights(weights, adapted.merge_and_unload)
