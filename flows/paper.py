"""`python -m flows.paper --study NAME`: the paper's tables and figures for the targets of a study.

Adds the targets of studies/NAME.yaml to params.yaml, brings them up to date and makes the study's
tables at data/tables/NAME. A target that fails stops no other; the tables name its reason.
`--table` and `--figure` build only the targets that these show. `--dry-run` prints what each table,
figure and experiment takes, and `--tables` makes tables, figures and pages of what was measured.
`--check` builds the dense model and ShortGPT, and fails where their numbers are not the paper's.
Which stages run is decided by flows.selection, and how by flows.prune.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State

from blockpruner.core.errors import InputError
from blockpruner.params import load_run
from blockpruner.reporting.formats import size
from blockpruner.reporting.paper.publish import main as publish
from blockpruner.studies import load_study, write_tables
from flows.prune import build, run_here
from flows.selection import EVIDENCE, PUBLISHED, Chosen, choose_study, study_frame, study_items


@flow(name="paper-tables", flow_run_name="{study}")
def paper(study: str, only: tuple[str, ...] = ()) -> State[None]:
    """Bring every target of a study up to date, then its tables; what is known is not computed
    again.

    Args:
        study: The name of studies/<name>.yaml. `seed` takes days on 2 CPU cores.
        only: Names of tables and figures, such as table2, for which alone targets are built. None:
            all of them.
    """
    return build(lambda: choose_study(study, only), keep_going=True)


def check(study: str) -> int:
    """Compare with the paper; 1 if what must agree does not."""
    from blockpruner.reporting.paper.needs import differences

    agreed, faults, others = differences(study_frame(study), PUBLISHED)
    for kind, lines in (("warning", others), ("differs", faults)):
        for line in lines:
            print(f"{kind}: {line}", file=sys.stderr)
    print(f"{agreed} numbers agree with the paper's", file=sys.stderr)
    return int(bool(faults))


def forecast(chosen: Chosen, only: Sequence[str]) -> Iterator[str]:
    """What a study takes, as far as its files and this folder show; `only` as in `paper`."""
    from blockpruner.reporting.paper.needs import takes
    from blockpruner.reporting.points import Points

    study = load_study(chosen.study)
    for item, (title, models) in (study_items(chosen.study) if study.targets else {}).items():
        if item in (only or (item,)):
            yield f"{item}: {title}: {takes(models)}"
    for key, one in study.experiments.items():
        if key in (only or (key,)):
            searches = len(one.methods) * len(one.seeds) * len(one.calibrations)
            models = searches * len(one.budgets) * len(one.heal)
            evidence = EVIDENCE / f"{chosen.study}-{key}"
            measured = len(Points.read(evidence).frame) if evidence.exists() else 0
            what = f"{', '.join(one.methods)} at {', '.join(one.budgets)}"
            yield (
                f"{key}: {one.run}: {what}: {models} models ({measured} measured); {searches}"
                " searches"
            )
    yield from dict.fromkeys(
        _model_of(run) for run in (*chosen.targets, *chosen.experiments.values())
    )
    yield (
        "not known before the run: hours of computing, the size of a download, and whether a gate"
        " lets you in"
    )


def _model_of(run: str) -> str:
    model, files = load_run(run).model, [*Path("data/models", run).glob("*")]
    if files:
        return f"model {model.title}: fetched, {size(sum(file.stat().st_size for file in files))}"
    place = {"hub": "on the hub, perhaps gated", "path": "on this machine"}.get(
        model.source, "in a package"
    )
    return f"model {model.title}: not fetched, {place}"


def main(argv: list[str] | None = None) -> int:
    """0: up to date; 1: a target failed or a check; 2: refused, nothing changed; 130:
    interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.paper", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--study", required=True, metavar="NAME", help="studies/NAME.yaml")
    parser.add_argument(
        "--table", action="append", default=[], metavar="N", help="only this table, such as 2"
    )
    parser.add_argument(
        "--figure", action="append", default=[], metavar="N", help="only this figure, such as 7"
    )
    parser.add_argument(
        "--experiment", action="append", default=[], metavar="NAME", help="only this experiment"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what each table, figure and experiment takes"
    )
    parser.add_argument(
        "--tables", action="store_true", help="make the pages of data/evidence; nothing is measured"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the dense model and ShortGPT with the paper"
    )
    given = parser.parse_args(argv)
    only = (
        *(f"table{n}" for n in given.table),
        *(f"figure{n}" for n in given.figure),
        *(["check"] * given.check),
    )
    only += tuple(given.experiment)
    try:
        if given.tables:
            print("\n".join(write_tables(given.study, Path("data"))))
            return publish([given.study]) if load_study(given.study).experiments else 0
        if given.dry_run:
            print("\n".join(forecast(choose_study(given.study, only), only)))
            return 0
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    ended = run_here(
        lambda: choose_study(given.study, only), lambda: paper(given.study, only, return_state=True)
    )
    return check(given.study) if given.check and ended == 0 else ended


if __name__ == "__main__":
    sys.exit(main())
