"""benchmark <target>: perplexity, zero-shot tasks and speed of a pruned checkpoint, at data/results/<target>."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockpruner.core.progress import observer
from blockpruner.evaluation.suite import benchmark
from blockpruner.params import load_params, load_run
from blockpruner.store.files import write_json
from blockpruner.store.plans import load_plan
from stages import DATA, run


def evaluate(name: str, run_name: str, checkpoint: Path) -> dict[str, Any]:
    settings, runtime = load_run(run_name), load_params().runtime
    results = benchmark(
        checkpoint,
        DATA / "models" / run_name,
        DATA / "sources" / run_name,
        DATA / "results" / name,
        DATA / "evaluations",
        perplexity=settings.evaluate.perplexity.model_dump(),
        zero_shot=settings.evaluate.zero_shot.model_dump(),
        speed=settings.evaluate.speed.model_dump(),
        dtype=settings.model.dtype,
        device=runtime.device,
        threads=runtime.threads,
        observer=observer(),
    )
    figures = {task: round(scores["value"], 4) for task, scores in results["tasks"].items()}
    figures |= {"average": results["average"]["value"], "perplexity": results["perplexity"]["perplexity"]}
    figures |= {key: value for key, value in results["speed"].items() if key.startswith("speedup")}
    write_json(DATA / "metrics" / f"{name}.json", {k: round(v, 4) for k, v in figures.items()})
    return results


def main(name: str) -> None:
    plan = load_plan(DATA / "plans" / name / "plan.json")
    evaluate(name, plan.run, DATA / ("recovered" if plan.recover else "checkpoints") / name / "hf")


if __name__ == "__main__":
    run("benchmark", main)
