"""The state of training on disk: one sealed file of tensors, from which a killed run goes on to the same weights.

They are the same to the bit on a CPU. On a GPU the backward pass adds in an order of its own.

The file holds the masters and, until training ends, the optimizer's moments and the best weights so far. Its facts are
the losses and the validations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from blockpruner.core.errors import InputError
from blockpruner.core.progress import Observer
from blockpruner.store.files import set_aside
from blockpruner.store.tensors import read_tensors, write_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Validation:
    """What a state of training is worth on rows that it is not trained on; means over rows, nats per token."""

    step: int
    """How many steps were taken before."""
    loss: float
    """What training minimises."""
    nll: float
    """Of the text; the logarithm of a perplexity."""


@dataclass
class Progress:
    """How far training is."""

    losses: list[float] = field(default_factory=list)
    """Of each step, before it was taken."""
    curve: list[Validation] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    """The masters at the least validation loss; empty without validation, and in the end."""
    finished: bool = False

    @property
    def kept(self) -> Validation | None:
        """The first validation with the least loss."""
        return min(self.curve, key=lambda validation: validation.loss, default=None)


def save(path: Path, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    tensors = dict(masters)
    if not progress.finished:
        for name, master in masters.items():
            tensors |= {f"{name}.{moment}": optimizer.state[master][moment] for moment in MOMENTS}
        tensors |= {f"{name}.best": weight for name, weight in progress.best.items()}
    text = json.dumps({"losses": progress.losses, "curve": [asdict(validation) for validation in progress.curve]})
    write_tensors(path, tensors, {"progress": text})


def resume_(
    path: Path, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, observer: Observer
) -> Progress:
    """Restore masters and optimizer from a sound state, if there is one. Returns how far it had come."""
    if not path.exists():
        return Progress()
    try:
        progress, tensors = _read(path, masters)
    except InputError as error:
        observer.note(f"{error}; set aside as {set_aside(path).name}, training starts anew")
        return Progress()
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(tensors[name])
            if not progress.finished:
                moments = {moment: tensors[f"{name}.{moment}"].to(master.device) for moment in MOMENTS}
                optimizer.state[master] = {"step": torch.tensor(float(len(progress.losses))), **moments}
    observer.note(f"training goes on after step {len(progress.losses)}, from {path}")
    return progress


def _read(path: Path, masters: Mapping[str, Tensor]) -> tuple[Progress, dict[str, Tensor]]:
    tensors, facts = read_tensors(path)
    if "progress" not in facts:
        raise InputError(f"{path} is damaged: it has no losses")
    found = json.loads(facts["progress"])
    progress = Progress(found["losses"], [Validation(**validation) for validation in found["curve"]])
    progress.finished = len(tensors) == len(masters)
    kinds = [] if progress.finished else [*MOMENTS, *(["best"] if progress.curve else [])]
    wanted = {name: master.shape for name, master in masters.items()}
    wanted |= {f"{name}.{kind}": shape for name, shape in wanted.items() for kind in kinds}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise InputError(
            f"{path} is damaged, or of another version of peft: its weights have other names or shapes than the model's"
        )
    progress.best = {name: tensors[f"{name}.best"] for name in masters if "best" in kinds}
    return progress, tensors
