"""clean: what lies under data/ that no run, target or study of params.yaml names.

    python -m stages.clean            lists; deletes nothing
    python -m stages.clean delete     deletes what is listed as unused

Not part of the DAG: run it by hand. An output is in use if the DAG writes it for a name in params.yaml. Files that were
set aside (`.bad`), and temporary files older than a day, are never in use. Of the stores clean knows nothing:
data/trials, data/evaluations, data/cache and data/adapters are safe to delete as a whole, and cost only the time to
compute or download again. data/timings has the speeds that a report shows. DVC's own cache is cleaned by `dvc gc`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from blockpruner.core.errors import InputError
from blockpruner.core.progress import observer
from blockpruner.params import load_params
from blockpruner.settings import Params
from blockpruner.store.files import TEMPORARY, remove
from blockpruner.store.locks import WORKSPACE, hold, this_process
from stages import DATA, run

PIPELINE = Path("dvc.yaml")
NAME = re.compile(r"\$\{[^}]*\}")
"""Where an output's path in the DAG bears the name of a run, a target or a study."""

SET_ASIDE = re.compile(r".+\.bad(\.\d+)?")
"""Names that `store.files.set_aside` gives."""


ABANDONED = 24 * 3600
"""The age in seconds from which on a temporary file is what a killed process left."""


def outputs(params: Params) -> dict[Path, bool]:
    """Every output of a stage that runs for a name, and whether params.yaml has that name."""
    names: Mapping[str, Sequence[str]] = {
        "${runs}": params.runs,
        "${targets}": list(params.targets),
        "${studies}": params.studies,
    }
    current: set[Path] = set()
    folders: set[Path] = set()
    for stage in yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"].values():
        if not {"matrix", "foreach"} & stage.keys():
            continue
        (items,) = stage["matrix"].values() if "matrix" in stage else [stage["foreach"]]
        for out in stage.get("do", stage)["outs"]:
            template = next(iter(out)) if isinstance(out, dict) else out
            depth = next(depth for depth, part in enumerate(Path(template).parts) if NAME.search(part))
            folders.add(Path(*Path(template).parts[:depth]))
            current |= {Path(*Path(NAME.sub(name, template)).parts[: depth + 1]) for name in names[items]}
    return {path: path in current for folder in sorted(folders) for path in sorted(folder.glob("[!.]*/"))}


def left_over() -> Iterator[Path]:
    """Files that were set aside, and what killed writers left."""
    for path in sorted(DATA.rglob("*")):
        if TEMPORARY.fullmatch(path.name):
            with suppress(FileNotFoundError):  # its writer has just finished
                if time.time() - path.stat().st_mtime > ABANDONED:
                    yield path
        elif SET_ASIDE.fullmatch(path.name) and path.is_file():
            yield path


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def report(delete: bool) -> None:
    """List the entries of data/ and what of them is unused; delete that if asked to."""
    show, found = observer(), outputs(load_params())
    gone = {path for path, used in found.items() if not used}
    rest = [path for path in left_over() if gone.isdisjoint(path.parents)]
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
        raise InputError(f"{what!r} is unknown; valid: nothing (lists), delete")
    if not what:
        report(delete=False)
        return
    with hold(WORKSPACE, this_process(), _refuse):
        report(delete=True)


def _refuse(holder: str) -> None:
    raise InputError(f"this workspace is in use by {holder}; wait for it or stop it: nothing is deleted meanwhile")


if __name__ == "__main__":
    run("clean", main)
