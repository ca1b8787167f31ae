"""tables <study>: the tables and figures of a study, at data/tables/<study>."""

from blockpruner.core.progress import observer
from blockpruner.reporting.answers import write_answers
from blockpruner.reporting.paper.page import write_study
from blockpruner.studies import load_study, points_of_study, rows_of_study
from stages import DATA, run


def main(name: str) -> None:
    study, out = load_study(name), DATA / "tables" / name
    if study.experiments:
        write_answers(out, study.title, points_of_study(study, name, DATA / "evidence"))
    else:
        rows = rows_of_study(study, DATA / "evidence")
        write_study(out, study.title, rows, DATA / "paper")
        for row in (row for row in rows if row.reason):
            observer().note(f"not measured: {row.target}: {row.reason}")
    observer().note(f"tables: {out / 'index.html'}")


if __name__ == "__main__":
    run("tables", main)
