"""train <target>: weights of the pruned model after training, if the target wants it, at data/trained/<target>."""

from dataclasses import replace

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.params import load_params
from blockpruner.store.files import replace_directory, write_json
from stages import DATA, kept_plan, run, sections


def main(name: str) -> None:
    plan, out = kept_plan(name), DATA / "trained" / name
    if not plan.train:
        replace_directory(out, lambda directory: write_json(directory / "train.json", {"enabled": False}))
        return
    from blockpruner.methods.healed import find_healed
    from stages.compensate import pruning_of

    rows = pipeline.Rows.load(DATA / "calibration" / plan.run, "search", "train", "validation")
    wanted = sections(plan.run).train
    assert wanted is not None  # load_params has checked it
    pruning = pruning_of(plan, rows)
    pruning = replace(pruning, healed=find_healed([DATA / "compensated" / name], pruning.identity))
    pipeline.train(pruning, wanted, rows, DATA / "adapters", out, observer(), load_params().runtime.here)


if __name__ == "__main__":
    run("train", main)
