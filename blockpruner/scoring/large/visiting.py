"""A model in the host's memory whose layers are on a device one at a time: for a fit that has no
room for all of them.

A layer comes when one of its modules is called, and stays until another one comes. Its parameters
are the same objects all the time, and what was changed on the device is changed in the host's
memory, too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers, load_model, move_buffers_, resolve_device
from blockpruner.scoring.work import fit_bytes
from blockpruner.store.files import read_json

swap_: Any = torch.utils.swap_tensors


def load_for_fit(
    directory: Path, dtype: str, device: str, trust_remote_code: bool, attention: str = "auto"
) -> PreTrainedModel:
    """The model whose weights are fitted, on its device; with visiting layers where the device is
    too small for all."""
    place, config = resolve_device(device), read_json(directory / "config.json")
    fits = place.type == "cpu" or fit_bytes(config, dtype) <= accelerator.total_memory(place)
    if fits or device == "split":
        return load_model(directory, dtype, device, trust_remote_code, attention)
    model = load_model(directory, dtype, "cpu", trust_remote_code, attention)
    visit_(model, place)
    return model


@torch.inference_mode(False)
def visit_(model: PreTrainedModel, device: torch.device) -> None:
    """Have the layers of a model in the host's memory visit a device, and all else stay there."""
    layers, here = decoder_layers(model), list[tuple[Tensor, Tensor, int]]()
    own = {id(weight) for weight in layers.parameters()}
    for weight in model.parameters():
        if id(weight) not in own:
            swap_(weight, _on(weight, device))
    move_buffers_(model, device)
    for layer in layers:
        layer.visits = device  # type: ignore[assignment]  # torch types every attribute as a tensor or module
        visit = _Visit(layer, device, here)
        for module in layer.children():
            module.register_forward_pre_hook(visit)
    _Visit(layers[0], device, here)()


@dataclass(frozen=True)
class _Visit:
    layer: nn.Module
    device: torch.device
    here: list[tuple[Tensor, Tensor, int]]
    """The weights that visit, with their memory on the host and their version when they came."""

    def __deepcopy__(self, known: dict[int, Any]) -> _Visit:
        """That of a copied layer. Copies share weights, so they share what is here."""
        return _Visit(copy.deepcopy(self.layer, known), self.device, self.here)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        weights = list(self.layer.parameters())
        if all(weight.device == self.device for weight in weights):
            return
        for weight, home, version in self.here:
            if weight._version != version:
                home.copy_(weight)
            swap_(weight, home)
        self.here.clear()
        for weight in weights:
            home = _on(weight, self.device)
            swap_(weight, home)
            self.here.append((weight, home, weight._version))


def _on(weight: Tensor, device: torch.device) -> Tensor:
    return nn.Parameter(weight.detach().to(device), requires_grad=weight.requires_grad)
