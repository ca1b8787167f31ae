"""compensate <target>: the plan that is kept, and weights that make up for what is gone without
training, at data/compensated/<target>."""

from blockpruner import pipeline
from blockpruner.core.plan import Plan
from blockpruner.core.progress import observer
from blockpruner.healing import choice
from blockpruner.inputs.checkpoints import require_unchanged
from blockpruner.methods.apply import Pruning
from blockpruner.store.plans import load_plan
from stages import DATA, run, runtime, sections, target


def pruning_of(plan: Plan, rows: pipeline.Rows) -> Pruning:
    """The model of a plan, before it is healed."""
    device, model = runtime().device, sections(plan.run).model
    place = DATA / "models" / plan.run
    require_unchanged(place)
    return Pruning(place, plan, rows.search, model.dtype, device, model.trust_remote_code)


def main(name: str) -> None:
    wanted = target(name)
    settings = sections(wanted.run)
    rows = pipeline.Rows.load(DATA / "calibration" / wanted.run, "search", "fit", "tuning", "judge")
    files = sorted((DATA / "plans" / name).glob("*.json"))
    found = [pipeline.Proposal(path.stem, load_plan(path)) for path in files]
    pruning = pruning_of(found[0].plan, rows)
    best = pipeline.heal(pruning.load_for_fit, found, rows, observer())
    data = settings.compensate.data or settings.calibration.data
    choice.keep(DATA / "compensated" / name, best, pruning_of(best.plan, rows), data)


if __name__ == "__main__":
    run("compensate", main)
