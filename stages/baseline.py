"""baseline <run>: the dense model's results, at data/evidence/<run>-dense."""

from __future__ import annotations

from stages import run
from stages.benchmark import evaluate


def main(name: str) -> None:
    evaluate(f"{name}-dense", name)


if __name__ == "__main__":
    run("baseline", main)
