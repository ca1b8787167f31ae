"""materialize <target>: checkpoints without the removed weights, verified, at
data/checkpoints/<target>/<format>."""

from dataclasses import replace
from pathlib import Path

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import find_healed
from blockpruner.splits import Rows
from blockpruner.store.files import replace_directory
from stages import DATA, kept_plan, run, sections
from stages.compensate import pruning_of


def healed_of(name: str, *stages: str) -> Pruning:
    """The model of a target, with the weights of the first of these stages that has healed it."""
    plan = kept_plan(name)
    pruning = pruning_of(plan, Rows.load(DATA / "calibration" / plan.run, "search"))
    healed = find_healed([DATA / stage / name for stage in stages], pruning.identity)
    return replace(pruning, healed=healed, plan=healed.plan(plan) if healed else plan)


def main(name: str) -> None:
    pruning = healed_of(name, "trained", "compensated")
    out = DATA / "checkpoints" / name
    formats = sections(pruning.plan.run).export

    def build(directory: Path) -> None:
        pipeline.export(pruning, {form: directory / form for form in formats})

    replace_directory(out, build)
    for form in formats:
        facts = pipeline.exported(form, out / form)
        checked = f"checked by {facts['verified_by']}" if facts["verified"] else "unchecked"
        observer().note(f"{name}: {form} for {', '.join(facts['for'])}, {checked}")


if __name__ == "__main__":
    run("materialize", main)
