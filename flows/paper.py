"""`python -m flows.paper --study NAME [--publish]`: the paper's tables and figures for the targets of a study.

Adds the targets of studies/NAME.yaml to params.yaml, brings them up to date and makes the study's tables at
data/tables/NAME. A target that fails stops no other; the tables name its reason. `--publish` copies the tables to
docs/results.md. Which stages run is decided by flows.selection, and how by flows.prune.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State

from blockpruner.store.files import replace_directory, write_text
from flows.prune import build, run_here
from flows.selection import choose_study

TABLES, DOCS = Path("data/tables"), Path("docs")
PREFACE = """# Results

Written by `python -m flows.paper --study {name} --publish` from what the targets of the study have measured; nothing on
this page is typed by hand. What holds for one model, and for a small one above all, need not hold for another.
[experiments.md](experiments.md) describes what this run took, and on what machine.
"""


@flow(name="paper-tables")
def paper(study: str, publish: bool = False) -> State[None]:
    """Bring every target of a study up to date, then its tables; what is known is not computed again.

    Args:
        study: The name of studies/<name>.yaml. `smollm2` takes hours on 2 CPU cores.
        publish: Whether the tables are copied to docs/results.md.
    """
    state = build(lambda: choose_study(study), keep_going=True)
    if publish and state.is_completed():
        publish_tables(study)
    return state


def publish_tables(name: str) -> None:
    """Copy a study's report and its plots to docs/results.md and docs/results/."""
    source = TABLES / name
    replace_directory(DOCS / "results", lambda folder: [shutil.copy(p, folder) for p in source.glob("plots/*.png")])
    text = (source / "report.md").read_text(encoding="utf-8").partition("\n")[2]
    write_text(DOCS / "results.md", PREFACE.format(name=name) + re.sub(r"\]\(plots/", "](results/", text))


def main(argv: list[str] | None = None) -> int:
    """0: up to date; 1: a target failed; 2: refused, nothing changed; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.paper", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--study", required=True, metavar="NAME", help="studies/NAME.yaml")
    parser.add_argument("--publish", action="store_true", help="copy the tables to docs/results.md")
    options = parser.parse_args(argv)
    return run_here(
        lambda: choose_study(options.study), lambda: paper(options.study, options.publish, return_state=True)
    )


if __name__ == "__main__":
    sys.exit(main())
