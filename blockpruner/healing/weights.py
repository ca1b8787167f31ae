"""The weights in training: which of a model's are trained, and the float32 copies that an optimizer moves.

A step is often smaller than the last bit of a 16-bit weight, and would be lost. So training moves a master of each such
weight in float32, and the model computes with its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from blockpruner.core.errors import extra
from blockpruner.healing.settings import Train


@dataclass(frozen=True)
class TrainedWeights:
    """Trained weights by name, and their masters."""

    live: Mapping[str, nn.Parameter]
    """What the model computes with."""
    masters: Mapping[str, Tensor]
    """What the optimizer moves: the live weight itself, or a float32 copy of a narrower one."""
    end_: Callable[[], object]
    """Leaves the model with plain weights alone."""

    def collect_(self) -> None:
        """Add the gradients of the live weights to those of their masters."""
        for live, master in self._narrow():
            assert live.grad is not None
            master.grad = live.grad.float() if master.grad is None else master.grad.add_(live.grad)
            live.grad = None

    @torch.no_grad()
    def show_(self) -> None:
        """Round the masters to the live weights."""
        for live, master in self._narrow():
            live.copy_(master)

    @torch.no_grad()
    def set_(self, values: Mapping[str, Tensor]) -> None:
        """Give the masters other values."""
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.show_()

    def _narrow(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        pairs = ((live, self.masters[name]) for name, live in self.live.items())
        return ((live, master) for live, master in pairs if live is not master)


def trained_weights_(model: PreTrainedModel, recipe: Train) -> TrainedWeights:
    """Prepare a model for training.

    "lora": adapters on every linear layer but the head; the end merges them into the model's own weights. "all": all
    weights but embeddings and head.
    """
    if recipe.weights == "lora":
        with extra("train"):
            from peft import LoraConfig, get_peft_model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", bias="none")
            adapted = get_peft_model(model, config)
        live = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        end_: Callable[[], object] = adapted.merge_and_unload
    else:
        ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        live = {name: weight for name, weight in model.named_parameters() if id(weight) not in ends}
        for weight in live.values():
            weight.requires_grad_()
        end_ = partial(model.requires_grad_, False)
    wide = {name: w if w.dtype in (torch.float32, torch.float64) else w.detach().float() for name, w in live.items()}
    return TrainedWeights(live, wide, end_)


@contextmanager
def checkpointed(layers: Iterable[nn.Module], wanted: bool) -> Iterator[None]:
    """Within, each layer keeps its input alone and runs again when its gradient is wanted; the numbers are the same."""
    chosen = list(layers) if wanted else []
    for layer in chosen:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward
