"""tables <study>: the tables and figures of a study, at data/tables/<study>."""

from blockpruner.core.progress import observer
from stages import DATA, failures, run
from study.studies import write_tables


def main(name: str) -> None:
    for line in (*failures(), *write_tables(name, DATA)):
        observer().note(line)


if __name__ == "__main__":
    run("tables", main)
