"""clean: what is under data/ that no run, target or study of params.yaml names.

    python -m stages.clean            lists; deletes nothing
    python -m stages.clean delete     deletes what is listed as unused

Not part of the DAG: run it by hand. An output is in use if the DAG writes it for a name in params.yaml. What Git keeps
is left alone. What was set aside as damaged (`.bad`), and temporary files older than a day, are never in use. The
stores data/trials, data/evaluations, data/cache and data/adapters are safe to delete as a whole, and cost only the time
to compute or download again. DVC's own cache is cleaned by `dvc gc`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.core.progress import observer
from blockpruner.params import load_params
from blockpruner.settings import Params
from blockpruner.store.files import TEMPORARY, remove
from blockpruner.store.locks import this_process, workspace
from stages import DATA, run

PIPELINE = Path("dvc.yaml")
NAMED = re.compile(r"- (data/\w+)/\$\{(item\.run|key|item\.study)\}")
"""Folders of the DAG whose entries bear the names of runs, targets or studies."""

BY_GIT = ("data/evidence", "data/metrics")
SET_ASIDE = re.compile(r".+\.bad(\.\d+)?")
"""Names that `store.files.set_aside` gives."""

ABANDONED = 24 * 3600
"""The age in seconds from which on a temporary file is what a killed process left."""


def outputs(params: Params) -> dict[Path, bool]:
    """Every output of a stage that runs for a name, and whether params.yaml has that name."""
    names = {"item.run": params.runs, "key": tuple(params.targets), "item.study": params.studies}
    folders = {(Path(folder), kind) for folder, kind in NAMED.findall(PIPELINE.read_text()) if folder not in BY_GIT}
    return {
        path: path.name in names[kind] for folder, kind in sorted(folders) for path in sorted(folder.glob("[!.]*/"))
    }


def left_over() -> Iterator[Path]:
    """Files and folders that were set aside, and what killed writers left."""
    for path in sorted(DATA.rglob("*")):
        if TEMPORARY.fullmatch(path.name):
            with suppress(FileNotFoundError):  # its writer has just finished
                if time.time() - path.stat().st_mtime > ABANDONED:
                    yield path
        elif SET_ASIDE.fullmatch(path.name):
            yield path


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def report(delete: bool) -> None:
    """List the entries of data/ and what of them is unused; delete that if asked to."""
    show, found = observer(), outputs(load_params())
    gone = {path for path, used in found.items() if not used}
    rest = [path for path in left_over() if gone.isdisjoint((path, *path.parents))]
    rest = [path for path in rest if set(rest).isdisjoint(path.parents)]
    for what, entries, unused in (("outputs", list(found), sorted(gone)), ("left over", rest, rest)):
        show.note(
            f"{what}: {len(entries)} entries, {sum(map(size, entries)):,} bytes; unused: {len(unused)} entries, "
            f"{sum(map(size, unused)):,} bytes"
        )
        for path in unused:
            if delete:
                remove(path)
            show.note(f"  {'deleted' if delete else 'unused'}: {path}")


def main(what: str) -> None:
    if what not in ("", "delete"):
        raise InputError(f"{what!r} is unknown; valid: nothing (lists), delete", rule="unknown-word", value=what)
    with workspace(this_process()) if what else nullcontext():
        report(delete=bool(what))


if __name__ == "__main__":
    run("clean", main)
