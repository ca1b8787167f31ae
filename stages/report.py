"""report: tables, plots and the self-contained page over all targets of params.yaml, at data/report."""

from __future__ import annotations

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.params import load_params
from blockpruner.reporting.labels import labels
from stages import DATA, run, sections


def main(_: str) -> None:
    params = load_params()
    names = {name: labels(sections(name)) for name in params.runs}
    show = observer()
    built = [name for name in params.targets if (DATA / "evidence" / name / "results.json").exists()]
    for name in sorted(set(params.targets) - set(built)):
        show.note(f"target {name} is not built yet and not in the report; `dvc repro` builds it")
    pipeline.report(DATA / "report", params.report.title, built, names, DATA, params.report.plots)
    show.note(f"report: {DATA / 'report' / 'index.html'}")


if __name__ == "__main__":
    run("report", main)
