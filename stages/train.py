"""train <target>: weights of the pruned model after training, if the target wants it, at
data/trained/<target>."""

from pathlib import Path

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.splits import Rows
from blockpruner.store.files import replace_directory, write_json
from blockpruner.store.manifest import TRAIN_FACTS
from stages import DATA, kept_plan, run, sections


def main(name: str) -> None:
    plan = kept_plan(name)
    out = DATA / "trained" / name
    if not plan.train:

        def build(directory: Path) -> None:
            write_json(directory / TRAIN_FACTS, {"enabled": False})

        replace_directory(out, build)
        return
    from stages.materialize import healed_of  # loads torch

    rows = Rows.load(DATA / "calibration" / plan.run, "search", "judge", "train", "validation")
    settings = sections(plan.run).train
    assert settings is not None  # load_params has checked it
    pruning = healed_of(name, "compensated")
    pipeline.train(pruning, settings, rows, DATA / "adapters", out, observer())


if __name__ == "__main__":
    run("train", main)
