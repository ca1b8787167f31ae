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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State

from blockpruner.config.params import load_run
from blockpruner.core.errors import InputError
from blockpruner.reporting.formats import size
from flows.prune import build, run_here
from flows.selection import EVIDENCE, PUBLISHED, Chosen, choose_study, study_frame, study_items
from study.publish import main as publish
from study.studies import Experiment, load_study, write_tables


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
    from study.paper.needs import differences

    agreed, errors, notes = differences(study_frame(study), PUBLISHED)
    for line in notes:
        print(f"warning: {line}", file=sys.stderr)
    for line in errors:
        print(f"differs: {line}", file=sys.stderr)
    print(f"{agreed} numbers agree with the paper's", file=sys.stderr)
    return 1 if errors else 0


def forecast(chosen: Chosen, only: Sequence[str]) -> Iterator[str]:
    """What a study takes, as far as its files and this folder show; `only` as in `paper`."""
    # pandas loads slowly, and a run of the flow does not use it.
    from study.paper.needs import takes

    study = load_study(chosen.study)
    items = study_items(chosen.study) if study.targets else {}
    for item, (title, models) in items.items():
        if not only or item in only:
            yield f"{item}: {title}: {takes(models)}"
    for key, experiment in study.experiments.items():
        if not only or key in only:
            cost = _experiment_cost(experiment, EVIDENCE / f"{chosen.study}-{key}")
            yield f"{key}: {experiment.run}: {cost}"
    runs = dict.fromkeys((*chosen.targets, *chosen.experiments.values()))
    yield from dict.fromkeys(_model_line(run) for run in runs)
    yield (
        "not known before the run: hours of computing, the size of a download, and whether a gate"
        " lets you in"
    )


def _experiment_cost(experiment: Experiment, evidence: Path) -> str:
    from study.points import Points

    searches = len(experiment.methods) * len(experiment.seeds) * len(experiment.calibrations)
    models = searches * len(experiment.budgets) * len(experiment.heal)
    measured = len(Points.read(evidence).frame) if evidence.exists() else 0
    methods, budgets = ", ".join(experiment.methods), ", ".join(experiment.budgets)
    return f"{methods} at {budgets}: {models} models ({measured} measured); {searches} searches"


def _model_line(run: str) -> str:
    """Where the model of a run is."""
    model = load_run(run).model
    files = list(Path("data/models", run).glob("*"))
    if files:
        total = sum(file.stat().st_size for file in files)
        return f"model {model.title}: fetched, {size(total)}"
    places = {"hub": "on the hub, perhaps gated", "path": "on this machine"}
    return f"model {model.title}: not fetched, {places.get(model.source, 'in a package')}"


def arguments() -> argparse.ArgumentParser:
    description = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m flows.paper", description=description)
    flag, repeated = {"action": "store_true"}, {"action": "append", "default": []}
    add: Callable[..., object] = parser.add_argument
    add("--study", required=True, metavar="NAME", help="studies/NAME.yaml")
    add("--table", **repeated, metavar="N", help="only this table, such as 2")
    add("--figure", **repeated, metavar="N", help="only this figure, such as 7")
    add("--experiment", **repeated, metavar="NAME", help="only this experiment")
    add("--dry-run", **flag, help="print what each table, figure and experiment takes")
    add("--tables", **flag, help="make the pages of data/evidence; nothing is measured")
    add("--check", **flag, help="compare the dense model and ShortGPT with the paper")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0: up to date; 1: a target failed or a check; 2: refused, nothing changed; 130:
    interrupted."""
    options = arguments().parse_args(argv)
    study = options.study
    names = [f"table{number}" for number in options.table]
    names += [f"figure{number}" for number in options.figure]
    if options.check:
        names.append("check")
    only = (*names, *options.experiment)
    try:
        if options.tables:
            print("\n".join(write_tables(study, Path("data"))))
            return publish([study]) if load_study(study).experiments else 0
        if options.dry_run:
            print("\n".join(forecast(choose_study(study, only), only)))
            return 0
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    status = run_here(
        lambda: choose_study(study, only), lambda: paper(study, only, return_state=True)
    )
    return check(study) if options.check and status == 0 else status


if __name__ == "__main__":
    sys.exit(main())
