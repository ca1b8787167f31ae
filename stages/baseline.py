"""baseline <run>: the dense model's results, at data/evidence/<run>-dense."""

from stages import run, write_manifest
from stages.benchmark import dense_of, measure


def main(name: str) -> None:
    dense = dense_of(name)
    measure(f"{name}-dense", name, dense, dense, None)
    write_manifest("models", f"{name}-dense")


if __name__ == "__main__":
    run("baseline", main)
