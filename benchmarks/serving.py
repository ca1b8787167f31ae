"""SmolLM2-135M dense and pruned in the engines that its exports are for: bytes, prefill and decode.

    python -m benchmarks.serving

The pruned models are those of the floating search in the study smollm2, compensated: `python -m flows.paper --study
smollm2` makes them. One sequence, of Table 6 of arXiv 2406.10594; an engine's models take turns within each repeat.
Prints medians, and their ratios to dense with 95 % intervals, for docs/serving.md. Needs `pip install '.[serve]'`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.scoring import setting
from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.checkpoints.verify_llama_cpp import Server
from blockpruner.core.plan import Plan
from blockpruner.evaluation.speed import generate, random_prompt
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import find_healed
from blockpruner.model.classes import has_our_code
from blockpruner.model.models import load_model
from blockpruner.params import load_run
from blockpruner.reporting.statistics import ratio_of_medians
from blockpruner.store.plans import load_plan
from blockpruner.store.provenance import fingerprint
from stages import DATA

RUN = "smollm2-paper"
TARGETS = tuple(f"{RUN}-floating-b{percent}-refit" for percent in (10, 20, 30))
MODELS = Path("data/benchmarks/serving")
PROMPT, NEW, REPEATS = 128, 128, 10


@dataclass(frozen=True)
class Run:
    prefill: float
    """Seconds, as is the next."""
    decode: float
    kv_bytes: int


def nothing_removed(plan: Plan) -> Plan:
    """The plan of the dense model, from one of a pruned model."""
    counts = dict.fromkeys(plan.parameters, plan.parameters["dense"])
    none = replace(plan, removed=(), order=(), ratios=(), ratio=0.0, blocks={"mha": 0, "mlp": 0}, compensate="none")
    return replace(none, parameters=counts)


def prunings() -> dict[str, Pruning]:
    """The dense model, as one of which nothing is removed, and the pruned ones by their ratios."""
    run, result = load_run(RUN), dict[str, Pruning]()
    rows = CalibrationSet.load(DATA / "calibration" / RUN / "search.parquet")
    for target in TARGETS:
        plan = load_plan(DATA / "evidence" / target / "plan.json")
        pruned = Pruning(DATA / "models" / RUN, plan, rows, run.model.dtype, "cpu")
        if not result:
            result["dense"] = replace(pruned, plan=nothing_removed(plan))
        healed = find_healed([DATA / "compensated" / target], pruned.identity)
        result[f"{plan.ratio:.2%}"] = replace(pruned, healed=healed)
    return dict(sorted(result.items(), key=lambda item: item[1].plan.ratio))


def exported(pruning: Pruning, form: str) -> Path:
    out = MODELS / fingerprint([pruning.identity, pruning.healed and pruning.healed.digest]) / form
    if not out.exists():
        EXPORTS[form].write(pruning, out)
    return out


def transformers_(directory: Path) -> tuple[int, Callable[[], Run]]:
    model = load_model(directory, load_run(RUN).model.dtype, "cpu", trust_remote_code=has_our_code(directory))
    prompt = random_prompt(model, 1, PROMPT)

    def run() -> Run:
        found = generate(model, prompt, NEW)
        return Run(found.prefill_seconds, found.decode_seconds, found.kv_cache_bytes)

    return sum(path.stat().st_size for path in directory.glob("*.safetensors")), run


def llama_cpp(precision: str) -> Callable[[Path], tuple[int, Callable[[], Run]]]:
    def opened(directory: Path) -> tuple[int, Callable[[], Run]]:
        path = directory / f"model-{precision}.gguf"
        server = Server(path, PROMPT + NEW + 8, tempfile.mkdtemp())
        ids = [100 + 7 * i for i in range(PROMPT)]

        def run() -> Run:
            said = server.post(
                "/completion", prompt=ids, n_predict=NEW, temperature=0, ignore_eos=True, cache_prompt=False
            )["timings"]
            assert (said["prompt_n"], said["predicted_n"]) == (PROMPT, NEW)
            return Run(said["prompt_ms"] / 1e3, said["predicted_ms"] / 1e3, server.cached())

        return path.stat().st_size, run

    return opened


ENGINES: dict[str, tuple[str, Callable[[Path], tuple[int, Callable[[], Run]]]]] = {
    "transformers": ("hf", transformers_),
    "llama.cpp, F16": ("gguf", llama_cpp("F16")),
    "llama.cpp, Q8_0": ("gguf", llama_cpp("Q8_0")),
}


def measure(models: Mapping[str, Callable[[], Run]]) -> dict[str, list[Run]]:
    """The repeats of each; one generation each before that, to warm up."""
    runs: dict[str, list[Run]] = {name: [] for name in models}
    for repeat in range(REPEATS + 1):
        for name in list(models)[:: 1 if repeat % 2 else -1]:
            found = models[name]()
            if repeat:
                runs[name].append(found)
    return runs


def speed(tokens: int, dense: list[float], seconds: list[float]) -> str:
    """Tokens per second, and the ratio to dense unless it is dense itself."""
    shown = f"{tokens / median(seconds):.1f}"
    if dense is seconds:
        return shown
    ratio = ratio_of_medians(dense, seconds)
    return f"{shown} ({ratio.value:.2f}x [{ratio.interval.low:.2f}, {ratio.interval.high:.2f}])"


def main() -> None:
    torch.manual_seed(0)
    print("| engine | model | file, MB | KV cache, MB | prefill, tokens/s | decode, tokens/s |")
    print("|---|---|---:|---:|---:|---:|")
    for engine, (form, opened) in ENGINES.items():
        found = {name: opened(exported(pruning, form)) for name, pruning in prunings().items()}
        runs = measure({name: run for name, (_, run) in found.items()})
        prefill = {name: [run.prefill for run in each] for name, each in runs.items()}
        decode = {name: [run.decode for run in each] for name, each in runs.items()}
        for name, each in runs.items():
            print(
                f"| {engine} | {name} | {found[name][0] / 1e6:.1f} | {each[0].kv_bytes / 1e6:.2f} | "
                f"{speed(PROMPT, prefill['dense'], prefill[name])} | {speed(NEW, decode['dense'], decode[name])} |",
                flush=True,
            )
    facts = setting()
    print(f"\n{facts['machine']}, {facts['threads']} threads, {PROMPT} + {NEW} tokens, medians of {REPEATS}")


if __name__ == "__main__":
    main()
