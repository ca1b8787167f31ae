"""baseline <run>: the dense model's results, at data/results/<run>-dense."""

from __future__ import annotations

from stages import DATA, run
from stages.benchmark import evaluate


def main(name: str) -> None:
    evaluate(f"{name}-dense", name, DATA / "models" / name)


if __name__ == "__main__":
    run("baseline", main)
