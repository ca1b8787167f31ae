"""compensate <target>: the plan that is kept, and weights that make up for what is gone without
training, at data/compensated/<target>."""

from blockpruner import pipeline
from blockpruner.core.plan import Plan
from blockpruner.core.progress import observer
from blockpruner.healing import choice
from blockpruner.methods.apply import Pruning
from blockpruner.splits import Rows
from blockpruner.store.plans import load_plan
from blockpruner.workspace import FetchedModel
from stages import DATA, run, runtime, sections, target


def pruning_of(plan: Plan, rows: Rows) -> Pruning:
    """The model of a plan, before it is healed."""
    device = runtime().device
    dense = FetchedModel(sections(plan.run).model, DATA / "models" / plan.run, device)
    return dense.pruning(plan, rows.search)


def main(name: str) -> None:
    run_name = target(name).run
    settings = sections(run_name)
    rows = Rows.load(DATA / "calibration" / run_name, "search", "fit", "tuning", "judge")
    files = sorted((DATA / "plans" / name).glob("*.json"))
    proposals = [pipeline.Proposal(path.stem, load_plan(path)) for path in files]
    # All proposals are of one dense model, which any of them can load.
    pruning = pruning_of(proposals[0].plan, rows)
    best = pipeline.heal(pruning.load_for_fit, proposals, rows, observer())
    data = settings.compensate.data or settings.calibration.data
    choice.keep(DATA / "compensated" / name, best, pruning_of(best.plan, rows), data)


if __name__ == "__main__":
    run("compensate", main)
