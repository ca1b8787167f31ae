"""What is lost when a stage breaks, and whether a second run ends in the same outputs: a matrix,
measured.

    unshare --mount python -m tests.faults [word ...]

It has nine cells for each stage. Words choose the cells whose names hold all of them.
The stages of a tiny random model run once undisturbed; the project is kept as it was before `score`
and `materialize`. A cell copies that, breaks the stage once, runs it again, and compares its
outputs with the undisturbed ones:

- `killed`, `lost`, `reordered` (`tests.power`): the stage dies, or power is cut, before one of its
  writes.
- `disk full`: the project is on a small file system with room for a share of what the stage writes.
  It is mounted, so this needs root and a mount namespace.

Stages run in forks. Prints Markdown; exits with 1 if a cell is not good.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import stages
from blockpruner.store.files import TEMPORARY
from tests.integration.project import make_project, set_targets
from tests.power import MODES, forked

TARGETS = {"half": "2blocks"}
RUN = {
    "settings": "tiny",
    "fetch": "tiny",
    "calibrate": "tiny",
    "score": "tiny-greedy",
    "commit": "half",
    "compensate": "half",
    "materialize": "half",
}
"""The stages up to the last one that is broken, in order, with what each is run for."""

OUTPUTS = {"score": "scores", "materialize": "checkpoints"}
"""The stages that are broken, and the folder of each one's output in data/."""

SHARES = (0.3, 0.6, 0.9)
"""Room on the full disk, as a share of what the stage writes."""


def work_of(stage: str) -> Callable[[], None]:
    """A stage as a function for a fork."""
    module = import_module(f"stages.{stage}")

    def work() -> None:
        import_module("torch").set_num_threads(1)
        os.environ["HF_HUB_OFFLINE"] = "1"
        sys.argv = [f"stages.{stage}", RUN[stage]]
        stages.run(stage, module.main)

    return work


def content(project: Path, stage: str) -> dict[str, bytes]:
    """The files of a stage's output, without temporary ones: DVC empties the folder before a stage
    runs."""
    folder = project / "data" / OUTPUTS[stage]
    files = {
        path: path.relative_to(folder).parts for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return {
        "/".join(parts): path.read_bytes()
        for path, parts in files.items()
        if not any(map(TEMPORARY.fullmatch, parts))
    }


def units(project: Path) -> int:
    """Finished (mask, rows) units in the trial store; each is one line of a log."""
    logs = (project / "data/trials").rglob("*.jsonl")
    return sum(max(0, len(log.read_bytes().splitlines()) - 1) for log in logs)


class Undisturbed:
    """The project before and after each stage, in a folder, and how many writes each stage
    makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        project = make_project(folder / "made", TARGETS, num_samples=14)
        set_targets(project, TARGETS, batch_tokens=96)
        for package in ("blockpruner", "study", "stages", "flows"):  # the forks have loaded them
            shutil.rmtree(project / package)
        self.writes = {}
        for stage in RUN:
            if stage in OUTPUTS:
                shutil.copytree(project, self.before(stage))
            code, self.writes[stage] = forked(project, work_of(stage), folder / "log")
            if code:
                raise RuntimeError(f"{stage}, undisturbed: {(folder / 'log').read_text()}")
            if stage in OUTPUTS:
                shutil.copytree(project, self.after(stage))

    def before(self, stage: str) -> Path:
        return self.folder / f"before-{stage}"

    def after(self, stage: str) -> Path:
        return self.folder / f"after-{stage}"

    @contextmanager
    def copied(self, stage: str) -> Iterator[Path]:
        """A copy of the project before a stage."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(self.before(stage), place / "project")
        try:
            yield place / "project"
        finally:
            shutil.rmtree(place)


def cut(undisturbed: Undisturbed, stage: str, mode: str, share: float) -> dict[str, Any]:
    """The stage is cut at a write, a share of all of them."""
    write = max(1, round(share * undisturbed.writes[stage]))
    with undisturbed.copied(stage) as project:
        log = project.parent / "log"
        code, at = forked(project, work_of(stage), log, write, mode)
        facts = afterwards(undisturbed, project, stage, log.read_text())
        broken = code == -signal.SIGKILL and at == write
        return facts | {"broken": broken, "how": f"before write {write}"}


def full(undisturbed: Undisturbed, stage: str, share: float) -> dict[str, Any]:
    """The stage runs on a tmpfs that has room for a share of what it writes; then there is room
    again."""
    grows = pages(undisturbed.after(stage)) - pages(undisturbed.before(stage))
    with undisturbed.copied(stage) as origin:
        small, log = origin.with_name("small"), origin.parent / "log"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small], check=True)
        try:
            project = Path(shutil.copytree(origin, small / "project"))
            room = int(grows * share) * 4096
            filler = small / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(small).free - room))
            code, _ = forked(project, work_of(stage), log)
            said = log.read_text()
            filler.unlink()
            facts = afterwards(undisturbed, project, stage, said)
            return facts | {
                "broken": code == 1 and "no space left" in said.lower(),
                "how": f"{room >> 10} KiB free",
            }
        finally:
            subprocess.run(["umount", "--lazy", small], check=True)


def pages(project: Path) -> int:
    """Memory pages that the project's files take on a tmpfs."""
    return sum(-(-path.stat().st_size // 4096) for path in project.rglob("*") if path.is_file())


def afterwards(undisturbed: Undisturbed, project: Path, stage: str, said: str) -> dict[str, Any]:
    """Run the stage again and compare.

    Args:
        said: the output of the run that broke.
    """
    log, whole = project.parent / "log", units(undisturbed.after(stage))
    kept = units(project)
    code, _ = forked(project, work_of(stage), log)
    lines = [line for line in said.splitlines() if "error in stage" in line]
    return {
        "kept": f"{kept} of {whole}",
        "twice": max(0, units(project) - whole),
        "same": code == 0 and content(project, stage) == content(undisturbed.after(stage), stage),
        "traceback": "Traceback" in said + log.read_text(),
        "said": lines[-1].replace("|", "/")[:200] if lines else "",
    }


def cells() -> dict[str, Callable[[Undisturbed], dict[str, Any]]]:
    """Every cell by name."""
    found: dict[str, Callable[[Undisturbed], dict[str, Any]]] = {}
    for stage in OUTPUTS:
        for mode in MODES:
            for words, share in (("in the middle", 0.5), ("near the end", 0.9)):
                found[f"{stage}, {mode}, {words}"] = partial(
                    cut, stage=stage, mode=mode, share=share
                )
        for share in SHARES:
            found[f"{stage}, disk full, room for {share:.0%}"] = partial(
                full, stage=stage, share=share
            )
    return found


def is_good(facts: dict[str, Any]) -> bool:
    return facts["broken"] and facts["same"] and facts["twice"] <= 1 and not facts["traceback"]


def main(words: list[str]) -> int:
    chosen = {name: cell for name, cell in cells().items() if all(word in name for word in words)}
    good = []
    print(
        "| stage | fault | where | how | units kept | computed twice | good | what a person sees |"
    )
    print("|---|---|---|---|---:|---:|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Undisturbed(Path(folder))
        for name, cell in chosen.items():
            facts = cell(undisturbed)
            good.append(is_good(facts))
            shown = (
                facts["how"],
                facts["kept"],
                str(facts["twice"]),
                "yes" if good[-1] else "**NO**",
                facts["said"],
            )
            print(f"| {' | '.join((*name.split(', '), *shown))} |", flush=True)
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
