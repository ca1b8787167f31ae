"""tables <study>: the tables and figures of a study, at data/tables/<study>."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.methods.recipes import compensation
from blockpruner.params import load_sections
from blockpruner.reporting.paper.evidence import Subject, read_rows
from blockpruner.reporting.paper.page import write_study
from blockpruner.reporting.paper.published import MODELS
from blockpruner.studies import load_study
from stages import DATA, run
from stages.report import labels


def main(name: str) -> None:
    study = load_study(name)
    runs = {run: load_sections(run) for run in study.runs}
    subjects = [
        Subject(run, labels(settings), MODELS.get(getattr(settings.model, "repo", "")))
        for run, settings in runs.items()
    ]
    asked = {}
    for target, wanted in study.targets.items():
        settings = runs[wanted.run]
        method = wanted.method or next(iter(settings.score))
        chosen = wanted.compensate or compensation(settings.compensate.method, method)
        asked[target] = wanted.model_copy(update={"method": method, "compensate": chosen})
    out = DATA / "tables" / name
    rows = read_rows(subjects, asked, DATA / "evidence")
    write_study(out, study.title, rows, DATA / "paper")
    for row in (row for row in rows if row.reason):
        observer().note(f"not measured: {row.target}: {row.reason}")
    observer().note(f"tables: {out / 'index.html'}")


if __name__ == "__main__":
    run("tables", main)
