"""benchmark <target>: perplexity, zero-shot tasks and speed of a pruned checkpoint, at data/results/<target>.

When, where and how fast is at data/timings, by the content of these results.
"""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.progress import observer
from blockpruner.evaluation.settings import Evaluate
from blockpruner.evaluation.suite import benchmark, headline
from blockpruner.params import load_params
from blockpruner.store.files import write_json
from blockpruner.store.plans import load_plan
from stages import DATA, TIMINGS, renew_report, run, sections


def evaluate(name: str, run_name: str, checkpoint: Path) -> None:
    settings = sections(run_name)
    asked = Evaluate(perplexity=settings.heldout, zero_shot=settings.zero_shot, speed=settings.speed)
    results = benchmark(
        checkpoint,
        DATA / "models" / run_name,
        DATA / "sources" / run_name,
        DATA / "results" / name,
        DATA / "evaluations",
        TIMINGS,
        settings=asked,
        dtype=settings.model.dtype,
        trust_remote_code=settings.model.trust_remote_code,
        runtime=load_params().runtime,
        observer=observer(),
    )
    write_json(DATA / "metrics" / f"{name}.json", headline(results))
    renew_report()


def main(name: str) -> None:
    plan = load_plan(DATA / "plans" / name / "plan.json")
    evaluate(name, plan.run, DATA / "checkpoints" / name / "hf")


if __name__ == "__main__":
    run("benchmark", main)
