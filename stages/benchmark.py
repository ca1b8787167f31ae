"""benchmark <target>: perplexity, zero-shot tasks and speed of a pruned model, at
data/evidence/<target>.

The model is the checkpoint that transformers loads; without one it is made in memory.
"""

from blockpruner.config.params import load_params
from blockpruner.core.plan import Plan
from blockpruner.core.progress import observer
from blockpruner.evaluation.settings import Evaluate
from blockpruner.evaluation.suite import Checkpoint, InMemory, benchmark, headline
from blockpruner.store.files import read_json, write_json
from stages import DATA, run, runtime, sections, write_manifest
from stages.materialize import healed_of


def dense_of(name: str) -> Checkpoint:
    device = runtime().device
    model = sections(name).model
    return Checkpoint(DATA / "models" / name, model.dtype, device, model.trust_remote_code)


def measure(
    name: str, run_name: str, subject: Checkpoint | InMemory, dense: Checkpoint, plan: Plan | None
) -> None:
    settings = sections(run_name)
    results = benchmark(
        subject,
        dense,
        DATA / "sources" / run_name,
        DATA / "evidence" / name,
        DATA / "evaluations",
        plan=plan,
        settings=Evaluate(
            perplexity=settings.heldout, zero_shot=settings.zero_shot, speed=settings.speed
        ),
        observer=observer(),
        search={} if plan is None else read_json(DATA / "costs" / f"{name}.json"),
        processes=load_params().runtime.here,
    )
    write_json(DATA / "metrics" / f"{name}.json", headline(results, plan))


def main(name: str) -> None:
    pruning = healed_of(name, "trained", "compensated")
    plan = pruning.plan
    checkpoint = DATA / "checkpoints" / name / "hf"
    dense = dense_of(plan.run)
    subject: Checkpoint | InMemory = InMemory(dense, plan, pruning.rows, pruning.healed)
    # What was exported is measured as its users load it.
    if checkpoint.exists():
        subject = dense.export(checkpoint)
    measure(name, plan.run, subject, dense, plan)
    tables = sorted((DATA / "plans" / name).glob("*.parquet"))
    write_manifest("models", name, DATA / "compensated" / name / "compensate.json", *tables)


if __name__ == "__main__":
    run("benchmark", main)
