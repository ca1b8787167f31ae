"""study_tables <set>: the paper's tables and figures for the runs of a set, at data/tables/<set>."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.paper.evidence import read_subject
from blockpruner.paper.page import write_set
from blockpruner.params import load_set, load_sets
from blockpruner.settings import resolve
from stages import DATA, STUDIES, run
from stages.report import labels


def main(name: str) -> None:
    runs = load_set(name)
    described = {run: labels(resolve(settings, [])) for run, settings in runs.items()}
    subjects = [read_subject(run, settings, described[run], STUDIES / run) for run, settings in runs.items()]
    out = DATA / "tables" / name
    write_set(out, name, subjects, DATA / "paper", load_sets()[name].goals)
    observer().note(f"tables: {out / 'index.html'}")


if __name__ == "__main__":
    run("study_tables", main)
