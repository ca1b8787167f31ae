"""train <target>: weights of the pruned model after training, if the target wants it, at
data/trained/<target>."""

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.params import load_params
from blockpruner.store.files import replace_directory, write_json
from stages import DATA, kept_plan, run, sections


def main(name: str) -> None:
    plan, out = kept_plan(name), DATA / "trained" / name
    if not plan.train:
        replace_directory(
            out, lambda directory: write_json(directory / "train.json", {"enabled": False})
        )
        return
    from stages.materialize import healed_of  # loads torch

    rows = pipeline.Rows.load(
        DATA / "calibration" / plan.run, "search", "judge", "train", "validation"
    )
    wanted = sections(plan.run).train
    assert wanted is not None  # load_params has checked it
    pruning, states = healed_of(name, "compensated"), DATA / "adapters"
    pipeline.train(pruning, wanted, rows, states, out, observer(), load_params().runtime.here)


if __name__ == "__main__":
    run("train", main)
