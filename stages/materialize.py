"""materialize <target>: checkpoints without the removed weights, verified, at
data/checkpoints/<target>/<format>."""

from dataclasses import replace

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import find_healed
from blockpruner.store.files import replace_directory
from stages import DATA, kept_plan, run, sections
from stages.compensate import pruning_of


def healed_of(name: str, *stages: str) -> Pruning:
    """The model of a target, with the weights of the first of these stages that has healed it."""
    plan = kept_plan(name)
    pruning = pruning_of(plan, pipeline.Rows.load(DATA / "calibration" / plan.run, "search"))
    healed = find_healed([DATA / stage / name for stage in stages], pruning.identity)
    return replace(pruning, healed=healed, plan=healed.plan(plan) if healed else plan)


def main(name: str) -> None:
    pruning, out = healed_of(name, "trained", "compensated"), DATA / "checkpoints" / name
    forms = sections(pruning.plan.run).export
    replace_directory(
        out, lambda folder: pipeline.export(pruning, {form: folder / form for form in forms})
    )
    for form in forms:
        seen = pipeline.exported(form, out / form)
        checked = f"checked by {seen['verified_by']}" if seen["verified"] else "unchecked"
        observer().note(f"{name}: {form} for {', '.join(seen['for'])}, {checked}")


if __name__ == "__main__":
    run("materialize", main)
