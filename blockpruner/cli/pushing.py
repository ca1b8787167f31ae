"""`blockpruner push`: what would be uploaded, and the upload. What may be is decided by `checkpoints.hub`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.checkpoints.hub import files_to_push, push
from blockpruner.inputs.checkpoints import checkpoint_identity, licence_of
from blockpruner.reporting.formats import size
from blockpruner.store.plans import PLAN_FILE, load_plan


@dataclass(frozen=True)
class Upload:
    """A checkpoint that may be uploaded."""

    checkpoint: Path
    repo: str
    private: bool
    licence: Mapping[str, Any]
    """The licence of the base model, where it is known."""
    files: Mapping[str, int]
    """Sizes in bytes."""

    @classmethod
    def of(cls, checkpoint: Path, repo: str, private: bool, trials: Path) -> Upload:
        """Look at a checkpoint; raises InputError if it is not what was verified."""
        licence = _licence(checkpoint, trials)
        files = {name: (checkpoint / name).stat().st_size for name in files_to_push(checkpoint, licence)}
        return cls(checkpoint, repo, private, licence, files)

    @property
    def fields(self) -> dict[str, Any]:
        return {"repo": self.repo, "private": self.private, "files": self.files}

    @property
    def words(self) -> str:
        lines = [f"  {name}  {size(count)}" for name, count in self.files.items()]
        seen = "private" if self.private else "public"
        return "\n".join([f"to the {seen} repository {self.repo}: {size(sum(self.files.values()))}", *lines])

    def run(self) -> str:
        """Upload; returns the address of the commit."""
        return push(self.checkpoint, self.repo, self.private, self.licence, self.checkpoint.name)


def _licence(checkpoint: Path, trials: Path) -> dict[str, Any]:
    """The licence of the checkpoint's base, if that model is in the trial folder or in the DAG of this folder."""
    plan = checkpoint / PLAN_FILE
    base = load_plan(plan).base if plan.is_file() else None
    known = [dense for folder in (trials, Path("data")) for dense in (folder / "models").glob("*/")]
    bases = (dense for dense in known if checkpoint_identity(dense) == base)
    return next(map(licence_of, bases), {})
