"""report: tables, plots and the self-contained page over all targets of params.yaml, at
data/report.

Git keeps its CSV files at data/plots, from which `dvc plots diff` draws any commit.
"""

import shutil

from blockpruner.config.params import load_params, load_sections
from blockpruner.core.progress import observer
from blockpruner.reporting.labels import labels
from blockpruner.reporting.report import write_report
from blockpruner.store.files import replace_directory
from blockpruner.store.manifest import COMPENSATE_FACTS
from stages import DATA, run


def main(_: str) -> None:
    params = load_params()
    note = observer().note
    built = []
    for name in params.targets:
        # Git has the results of a clone, and DVC the facts of its refit.
        results = DATA / "evidence" / name / "results.json"
        refit_facts = DATA / "compensated" / name / COMPENSATE_FACTS
        if results.exists() and refit_facts.exists():
            built.append(name)
        else:
            note(
                f"target {name} is not in the report: it is not on this machine; `dvc pull` may"
                " have it, `dvc repro` builds it"
            )
    runs = dict.fromkeys(params.targets[name].run for name in built)
    run_labels = {run: labels(load_sections(run)) for run in runs}
    write_report(DATA / "report", params.report.title, built, run_labels, DATA, params.report.plots)
    tables = (DATA / "report").glob("*.csv")
    replace_directory(DATA / "plots", lambda folder: [shutil.copy(path, folder) for path in tables])
    note(f"report: {DATA / 'report' / 'index.html'}")


if __name__ == "__main__":
    run("report", main)
