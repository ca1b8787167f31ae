"""Where a run works: the folders of its work, and the dense model that it prunes.

Doors (command, API, form, stages) differ in their workspace and in nothing else. The order of the
work is decided in `pipeline.run`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Model, Runtime
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.checkpoints import checkpoint_identity, require_unchanged
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.kind import Material
from blockpruner.methods.score import open_material
from blockpruner.store.files import read_json, remove_temporaries, set_aside
from blockpruner.store.locks import hold, this_process

if TYPE_CHECKING:
    from blockpruner.methods.apply import Pruning


@dataclass(frozen=True)
class Workspace:
    """The folders in which a run keeps its work, and what shows its progress."""

    root: Path
    """The folder of searches, compensated and trained weights, and locks."""
    trials: Path | None
    """The folder of trial stores and of states of training; None keeps losses in memory."""
    runtime: Runtime
    observer: Observer
    note: Callable[[str], object]
    """Receives a line for the user, in which keys of a run file get the door's own names."""

    def searches(self, key: str) -> Path:
        return self.root / "searches" / key

    def compensated(self, key: str) -> Path:
        return self.root / "compensated" / key

    def trained(self, key: str) -> Path:
        return self.root / "trained" / key

    @property
    def training_states(self) -> Path:
        """The folder of the states from which a killed training continues."""
        return (self.trials or self.root) / "training"

    def alone(self, name: str, work: str) -> AbstractContextManager[int]:
        """Hold the lock of a piece of work: of equal runs one computes, and the others wait."""

        def waiting(holder: str) -> None:
            self.observer.note(f"{holder} {work}; waiting for it")

        return hold(self.root / "cache/locks" / name, this_process(), waiting)

    def is_whole(self, folder: Path, *facts: str) -> bool:
        """Whether a folder of healed weights, whose lock is held, is there and undamaged. A damaged
        one is set aside, with a warning; what a killed writer left next to it is removed."""
        remove_temporaries(folder.parent, f".{folder.name}.*.tmp")
        if not folder.exists():
            return False
        # loads torch
        from blockpruner.methods.healed import FILE, has_weights
        from blockpruner.store.tensors import read_tensors

        try:
            # Reading checks the digest that a file holds of itself.
            for name in facts:
                read_json(folder / name)
            if has_weights(folder):
                read_tensors(folder / FILE)
        except InputError:
            # Nothing is deleted: the old folder may be of use to find what damaged it.
            damaged = set_aside(folder).name
            self.observer.note(
                f"warning: {folder} is not whole: it is made again; {damaged} is the old one"
            )
            return False
        return True


class Dense(Protocol):
    """The dense model of a run."""

    @property
    def title(self) -> str: ...
    @property
    def config(self) -> Config: ...
    @property
    def dtype(self) -> str: ...
    @property
    def folder(self) -> Path | None:
        """The folder of its weights; None if they are in memory."""

    @property
    def identity(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    def open(self, workspace: Workspace) -> AbstractContextManager[Material]:
        """The model as searches and fits use it; it is loaded when something must be computed."""

    def pruning(self, plan: Plan, rows: CalibrationSet) -> Pruning:
        """The model of a plan, before it is healed."""


@dataclass(frozen=True)
class FetchedModel:
    """A dense model in a folder."""

    settings: Model
    folder: Path
    device: str

    @property
    def title(self) -> str:
        return self.settings.title

    @property
    def dtype(self) -> str:
        return self.settings.dtype

    @property
    def config(self) -> Config:
        config: Config = read_json(self.folder / "config.json")
        return config

    @property
    def identity(self) -> str:
        return checkpoint_identity(self.folder)

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.settings.trust_remote_code)

    def open(self, workspace: Workspace) -> AbstractContextManager[Material]:
        assert workspace.trials is not None
        return open_material(
            self.folder, self.settings, workspace.runtime, workspace.trials, workspace.observer
        )

    def pruning(self, plan: Plan, rows: CalibrationSet) -> Pruning:
        from blockpruner.methods.apply import Pruning  # loads torch

        # A plan of other weights would make a wrong model that loads without an error.
        require_unchanged(self.folder)
        return Pruning(
            self.folder, plan, rows, self.dtype, self.device, self.settings.trust_remote_code
        )
