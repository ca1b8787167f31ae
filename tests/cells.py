"""Cells of the table of families and engines in docs/serving.md: each is a run of a test that
passed.

With BLOCKPRUNER_CELLS=FILE, tests add a line for each model that an engine has run, and `python -m
tests.cells FILE` makes docs/results/families.csv of them (`make families` does both).
"""

import csv
import json
import os
import sys
from pathlib import Path

from blockpruner.core.families import FAMILIES

ENGINES = ("transformers", "vLLM", "vLLM, nas", "mlx-lm", "llama.cpp")
TABLE = Path(__file__).parents[1] / "docs" / "results" / "families.csv"


def seen(engine: str, family: str, difference: float) -> None:
    """An engine computed a family's pruned model: the same greedy tokens, a cache for each
    attention that is left, and log-probabilities or logits (of transformers and mlx-lm) that differ
    by no more than this."""
    assert engine in ENGINES and family in FAMILIES
    if path := os.environ.get("BLOCKPRUNER_CELLS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([engine, family, difference]) + "\n")


def main(path: Path, table: Path = TABLE) -> None:
    found: dict[tuple[str, str], float] = {}
    for engine, family, difference in map(
        json.loads, path.read_text(encoding="utf-8").splitlines()
    ):
        found[engine, family] = max(difference, found.get((engine, family), 0.0))
    if absent := {*ENGINES} - {engine for engine, _ in found}:
        sys.exit(f"no run of {', '.join(sorted(absent))}: install it, and run the tests again")
    with open(table, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["family", *ENGINES])
        for family in FAMILIES:
            cells = (found.get((engine, family)) for engine in ENGINES)
            rows.writerow(
                [
                    family,
                    *(
                        "–"
                        if cell is None
                        else f"✓ {cell:.0e}".replace("0e+00", "0").replace("e-0", "e-")
                        for cell in cells
                    ),
                ]
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
