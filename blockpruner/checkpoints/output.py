"""The checkpoints that a run writes: one folder for each format.

Decides that nothing of the user's is replaced: a folder is new, empty, or holds this very model.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.store.files import clear_left
from blockpruner.store.manifest import CARD_FILE, require_verified
from blockpruner.store.plans import PLAN_FILE, load_plan

if TYPE_CHECKING:
    from blockpruner.methods.apply import Pruning


@dataclass(frozen=True)
class Output:
    """The folders of a run's checkpoints."""

    path: Path
    """The folder of the format `hf`; another format is at PATH-FORMAT."""
    quantizations: Mapping[str, Sequence[str]]
    """The formats, each with the types to which its files are quantized."""
    dtype: str = field(default="")
    """The dtype of the weights; empty: that in which the model was computed."""

    @property
    def folders(self) -> dict[str, Path]:
        folders = {}
        for form in self.quantizations:
            suffix = "" if form == "hf" else f"-{form}"
            folders[form] = self.path.with_name(f"{self.path.name}{suffix}")
        return folders

    def require_free(self, plan: Plan | None) -> None:
        """Raise InputError unless every folder is free, or holds the checkpoint of the plan. It is
        None before a search has found one."""
        for folder in self.folders.values():
            holds_checkpoint(folder, plan)

    def missing(self, pruning: "Pruning") -> dict[str, Path]:
        """The folders by format that are not written yet; raises InputError for one that holds
        something else."""
        healing = pruning.healed.words if pruning.healed else ""
        missing = {}
        for form, folder in self.folders.items():
            clear_left(folder)  # of a writer that was killed
            if holds_checkpoint(folder, pruning.plan, healing):
                _require_quantized(folder, self.quantizations[form])
            else:
                missing[form] = folder
        return missing


def holds_checkpoint(folder: Path, plan: Plan | None, healing: str | None = None) -> bool:
    """Whether a folder holds the whole checkpoint of a plan; raises InputError if it holds anything
    else, or cannot be made.

    Args:
        plan: None before a search has found it.
        healing: the model card's words on healing (`Healed.words`); None: they are not compared.
    """
    # Free: only whether it can be made is left to check.
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise InputError(
                f"--out {folder}: nothing can be written in {parent}; choose another place",
                rule="no-place",
                key="out",
                value=str(folder),
            )
        return False
    is_same = False
    if plan is not None and (folder / PLAN_FILE).is_file():
        # The name of the target and what was measured of it change no weight.
        held = load_plan(folder / PLAN_FILE)
        is_same = replace(held, target=plan.target, kinds=plan.kinds) == plan
    card = folder / CARD_FILE
    # Two trainings of one plan differ by what their cards say.
    if healing is not None and card.exists():
        is_same = is_same and healing in card.read_text(encoding="utf-8")
    if not is_same:
        raise InputError(
            f"--out {folder} is not empty and holds something else; choose another folder, or"
            " remove it",
            rule="place-not-empty",
            key="out",
            value=str(folder),
        )
    require_verified(folder)
    return True


def _require_quantized(folder: Path, quantizations: Sequence[str]) -> None:
    """Refuse a finished checkpoint without one of its quantized files, which only a new export
    writes; raises InputError."""
    for quantization in quantizations:
        name = f"model-{quantization}.gguf"
        if not (folder / name).exists():
            raise InputError(
                f"{folder} was written without {name}, and nothing is replaced; remove that folder"
                " and run again, or choose another --out: scores are kept",
                rule="place-not-empty",
                key="out",
                value=str(folder),
            )
