"""benchmark <target>: perplexity, zero-shot tasks and speed of a pruned checkpoint, at data/evidence/<target>."""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.plan import Plan
from blockpruner.core.progress import observer
from blockpruner.evaluation.suite import Checkpoint, benchmark, headline
from blockpruner.model.models import set_threads
from blockpruner.params import load_params, load_run
from blockpruner.store.files import write_json
from blockpruner.store.plans import load_plan
from stages import DATA, run


def evaluate(name: str, run_name: str, plan: Plan | None = None, checkpoint: Path | None = None) -> None:
    """Measure the dense model of a run, or a checkpoint that a plan made of it."""
    settings, runtime = load_run(run_name), load_params().runtime
    set_threads(runtime.threads)
    model = settings.model
    dense = Checkpoint(DATA / "models" / run_name, model.dtype, runtime.device, model.trust_remote_code)
    results = benchmark(
        dense.export(checkpoint) if checkpoint else dense,
        dense,
        DATA / "sources" / run_name,
        DATA / "evidence" / name,
        DATA / "evaluations",
        plan=plan,
        settings=settings.evaluate,
        observer=observer(),
    )
    write_json(DATA / "metrics" / f"{name}.json", headline(results, plan))


def main(name: str) -> None:
    plan = load_plan(DATA / "plans" / name / "plan.json")
    evaluate(name, plan.run, plan, DATA / "checkpoints" / name / "hf")


if __name__ == "__main__":
    run("benchmark", main)
