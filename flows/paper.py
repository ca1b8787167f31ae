"""`python -m flows.paper --set NAME [--dry-run] [--publish]`: every table and figure of the paper for a set of runs.

`--check RUN` comes first on a new machine: it holds the paper's published answers for the run against what this machine
measures, with one model and no search.

Brings the studies of the set (runs/sets.yaml) up to date and makes its tables at data/tables/NAME. What is known is not
computed again: one pass finds the stages that are stale, and only those are started. `--dry-run` prints what would be
computed and what it takes, and computes nothing; `--publish` copies the tables to docs/results.md.

Decides which stages of runs/dvc.yaml run, and what Prefect sees. How a stage runs is decided by flows.dvc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from blockpruner.core.errors import InputError
from blockpruner.paper.check import check_of, describe_check
from blockpruner.paper.experiments import DATA_VARIABLE
from blockpruner.params import load_set
from blockpruner.store.files import replace_directory, write_text
from blockpruner.store.locks import this_process
from flows import dvc
from flows.prune import begin, outcome, publish_report, run_here, run_stages
from flows.selection import ChosenSet, Tables, choose_set

TABLES, STUDIES, DOCS, PUBLISHED = Path("data/tables"), Path("data/studies"), Path("docs"), Path("data/paper")
PREFACE = """# Results

Written by `python -m flows.paper --set {name} --publish` from what the studies of the set have measured; nothing on
this page is typed by hand. What holds for one model, and for a small one above all, need not hold for another. The
paper's own models (sets `llama2-7b` to `paper`) need a GPU and the model hub; `--dry-run` prints how much of both.
[experiments.md](experiments.md) describes what this run took, and on what machine.
"""


@flow(name="paper-tables")
def paper(tables: Tables) -> State[None]:
    """Every table and figure of the paper for the runs of a set."""
    name, show = tables.name, get_run_logger().info
    states: list[State[None]] = []
    try:
        with begin(lambda: choose_set(name)) as (chosen, lock):
            chains = chosen.stages()
            again = frozenset(f"runs/dvc.yaml:fetch@{run}" for run in lacking_data(chosen))
            stale = again | dvc.stale([stage for chain in chains for stage in chain], show)
            for chain in chains:
                if chain is chains[-1] and any(state.name != "Cached" for state in states):
                    stale |= frozenset(chain)
                states += run_stages(chain, lock, stale, again)
                if not states[-1].is_completed():
                    return outcome(states)
            publish_report(TABLES / name, f"tables-{name}", f"page-{name}", "Open the tables")
            if tables.publish:
                show(f"published: {publish_tables(name)}")
    except InputError as error:
        return Failed(name="Refused", message=str(error))
    except dvc.StageError as error:
        return Failed(message=str(error))
    return Completed(message=f"{outcome(states).message}; tables: {TABLES / name / 'index.html'}")


def lacking_data(chosen: ChosenSet) -> list[str]:
    """The runs that were fetched without the data that BLOCKPRUNER_DATA names now; dvc does not see the environment."""
    if not os.environ.get(DATA_VARIABLE):
        return []
    wanted = [name for name, run in chosen.runs.items() if run.study and run.study.wikitext]
    folders = {name: STUDIES / name / "sources" for name in wanted}
    return [name for name, folder in folders.items() if folder.exists() and not (folder / "wikitext.parquet").exists()]


def publish_tables(name: str) -> Path:
    """Copy a set's report and its plots to docs/results.md and docs/results/."""
    source, out = TABLES / name, DOCS / "results.md"
    replace_directory(DOCS / "results", lambda folder: [shutil.copy(p, folder) for p in source.glob("plots/*.png")])
    text = (source / "report.md").read_text(encoding="utf-8").partition("\n")[2]
    write_text(out, PREFACE.format(name=name) + re.sub(r"\]\(plots/", "](results/", text))
    return out


def main(argv: list[str] | None = None) -> int:
    """0: up to date; 1: a stage failed; 2: refused, nothing changed; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.paper", description=(__doc__ or "").split("\n\n")[1])
    wanted_of = parser.add_mutually_exclusive_group(required=True)
    wanted_of.add_argument("--set", metavar="NAME", help="a set of runs/sets.yaml")
    wanted_of.add_argument("--check", metavar="RUN", help="a set of one run, whose published answers are held against")
    parser.add_argument("--dry-run", action="store_true", help="print what would be computed, and what it takes")
    parser.add_argument("--gpu", metavar="KIND", help="for the hours of --dry-run")
    parser.add_argument("--publish", action="store_true", help="copy the tables to docs/results.md")
    options = parser.parse_args(argv)
    if options.dry_run or options.check:
        try:
            if options.check:
                return check(options.check, options.dry_run)
            print(dry_run(options.set, options.gpu))
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        except dvc.StageError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    wanted = Tables(name=options.set, publish=options.publish)
    return run_here(lambda: choose_set(wanted.name), lambda: paper(wanted, return_state=True))


def dry_run(name: str, gpu: str | None) -> str:
    from blockpruner.paper.estimates import describe, estimate

    return describe(name, [estimate(run, settings) for run, settings in load_set(name).items()], gpu)


def check(name: str, is_dry: bool) -> int:
    """Fetch what the check of a run needs and make it, in this process's console; its exit status."""
    gate = check_of(name)
    print(describe_check(name, gate, PUBLISHED), flush=True)
    if is_dry:
        return 0
    with dvc.workspace(f"check of {name}, {this_process()}") as lock:
        chosen = choose_set(name)
        chosen.write()
        dvc.repro(f"runs/dvc.yaml:fetch@{name}", lock, lambda line: print(line, flush=True))
        return subprocess.run([sys.executable, "-m", "stages.study_check", name], pass_fds=(lock,)).returncode


if __name__ == "__main__":
    sys.exit(main())
