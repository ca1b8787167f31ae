"""report: tables, plots and the self-contained page over all targets of params.yaml, at
data/report.

Git keeps its CSV files at data/plots, from which `dvc plots diff` draws any commit.
"""

import shutil

from blockpruner.core.progress import observer
from blockpruner.params import load_params, load_sections
from blockpruner.reporting.labels import labels
from blockpruner.reporting.report import write_report
from blockpruner.store.files import replace_directory
from stages import DATA, run


def main(_: str) -> None:
    params = load_params()
    show = observer()
    # a clone has the first one by Git
    parts = (
        "evidence/{}/results.json",
        "compensated/{}/compensate.json",
    )
    built = [
        name
        for name in params.targets
        if all((DATA / part.format(name)).exists() for part in parts)
    ]
    names = {
        run: labels(load_sections(run))
        for run in dict.fromkeys(params.targets[name].run for name in built)
    }
    for name in sorted(set(params.targets) - set(built)):
        show.note(
            f"target {name} is not here and not in the report; `dvc pull` may have it, `dvc repro`"
            " builds it"
        )
    write_report(DATA / "report", params.report.title, built, names, DATA, params.report.plots)
    tables = (DATA / "report").glob("*.csv")
    replace_directory(DATA / "plots", lambda folder: [shutil.copy(path, folder) for path in tables])
    show.note(f"report: {DATA / 'report' / 'index.html'}")


if __name__ == "__main__":
    run("report", main)
