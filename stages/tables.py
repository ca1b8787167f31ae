"""tables <study>: the tables and figures of a study, at data/tables/<study>."""

from blockpruner.core.progress import observer
from blockpruner.reporting.paper.page import write_study
from blockpruner.studies import load_study, rows_of_study
from stages import DATA, run


def main(name: str) -> None:
    study = load_study(name)
    rows = rows_of_study(study, DATA / "evidence")
    out = DATA / "tables" / name
    write_study(out, study.title, rows, DATA / "paper")
    for row in (row for row in rows if row.reason):
        observer().note(f"not measured: {row.target}: {row.reason}")
    observer().note(f"tables: {out / 'index.html'}")


if __name__ == "__main__":
    run("tables", main)
