"""Every method on SmolLM2-135M at about 10 % and 20 % of its parameters: what it keeps of the model, and what it costs.

    python -m benchmarks.methods [method ...]     names of METHODS; all that are not in methods.json, if none is given

Prints Markdown. What it found is kept in benchmarks/methods.json, whose methods are not run again unless named, and
scores in data/benchmarks/methods/, so that it goes on where it was stopped. Searches run in float32 over six rows of
128 tokens and share their trials, models are evaluated in bfloat16. Needs `dvc repro fetch@smollm2`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.scoring import LENGTH, SMOLLM2, TEXT, setting
from blockpruner.core.plan import Plan
from blockpruner.core.progress import ConsoleObserver
from blockpruner.core.settings import LocalModel, Runtime
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.evaluation.perplexity import held_out, measure_perplexity
from blockpruner.evaluation.settings import Perplexity
from blockpruner.evaluation.zero_shot import evaluate, gold_answers
from blockpruner.inputs.calibration import CalibrationSet, draw, draw_in_turn, pack_answers, pack_rows
from blockpruner.inputs.checkpoints import checkpoint_identity
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.commit import commit_run
from blockpruner.methods.laco.merging import merged
from blockpruner.methods.laco.walk import Merge
from blockpruner.methods.score import open_material, score_run
from blockpruner.methods.slicegpt.slicing import slice_
from blockpruner.model.models import load_model, masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.objectives import Objective
from blockpruner.scoring.settings import Score
from blockpruner.store.files import read_json, write_json
from blockpruner.store.provenance import fingerprint
from blockpruner.store.trials import TrialStore, store_fields

RESULTS, FOUND = Path("data/benchmarks/methods"), Path("benchmarks/methods.json")
TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
ITEMS, ROWS, HELD_OUT_ROWS, ANSWERS = 50, 6, 6, 15
FAST = {"acceleration": "lazy+race"}
BUDGETS = ("0.10", "0.20")

METHODS: dict[str, dict[str, Any]] = {
    "BlockPruner": {"method": "greedy"},
    "ShortGPT": {"method": "one_shot", "unit": "layer", "metric": "block_influence"},
    "Relative Magnitude, tokens": {"method": "one_shot", "unit": "layer", "metric": "relative_magnitude"},
    "Relative Magnitude, Frobenius": {"method": "one_shot", "unit": "layer", "metric": "relative_magnitude_frobenius"},
    "one-shot layers, perplexity": {"method": "one_shot", "unit": "layer"},
    "greedy layers": {"method": "greedy", "unit": "layer"},
    "one-shot perplexity": {"method": "one_shot"},
    "LLM-Drop": {"method": "one_shot", "metric": "block_influence"},
    "greedy, Block Influence": {"method": "greedy", "metric": "block_influence"},
    "greedy, Relative Magnitude": {"method": "greedy", "metric": "relative_magnitude"},
    "random": {"method": "random"},
    "SliceGPT": {"method": "slicegpt"},
    "LaCo, repo": {"method": "laco", "options": {"count": 3}},  # with 4 it removes 3 or 5 of 30 layers, never 4
    "LaCo, paper": {"method": "laco", "options": {"count": 3, "variant": "paper"}},
    "swap from BlockPruner": {"method": "swap", "options": {"tries": 32}},
    "EvoPress": {"method": "evopress", "metric": "kl"},
    "Taylor criterion": {"method": "one_shot", "unit": "layer", "metric": "taylor"},
    "angular distance": {"method": "contiguous", "unit": "layer", "metric": "angular_distance"},
    "greedy, MLP only": {"method": "greedy", "candidates": "mlp"},
    "greedy, MHA only": {"method": "greedy", "candidates": "mha"},
    "greedy, KL": {"method": "greedy", "metric": "kl", **FAST},
    "greedy, lazy + race": {"method": "greedy", **FAST},
    "greedy, answers": {"method": "greedy", "metric": "answer_likelihood", **FAST},
    "greedy, JS": {"method": "greedy", "metric": "js", **FAST},
    "beam, width 2": {"method": "beam", "options": {"width": 2}},
    "swap, random start": {"method": "swap", "options": {"start": "random", "tries": 16}},
}
SMALLER_ONLY = ("greedy, MHA only", "LaCo, paper", "beam, width 2", "swap, random start")
"""All MHA blocks are 19.7 % of the parameters; LaCo's paper variant removes 7 or 11 layers here and never 8; the others
take twice as long to 20 % as greedy does."""


def text_rows(tokenizer: Any) -> CalibrationSet:
    texts = read_texts(TEXT)
    samples = draw(texts, 20, "all", 42)
    return CalibrationSet(pack_rows(samples, tokenizer, LENGTH, "joined").rows[:ROWS])


def answer_rows(tokenizer: Any) -> CalibrationSet:
    """Items that are not evaluated, as many of each task."""
    pools = {task: gold_answers(task, TEXT.parent / "tasks", ITEMS) for task in TASKS}
    return pack_answers(draw_in_turn(pools, ANSWERS, 42), tokenizer, LENGTH)


def search(name: str, rows: CalibrationSet, budgets: tuple[str, ...]) -> tuple[Path, dict[str, float]]:
    """Score far enough for the budgets; the folder of traces, and what all starts of it took together."""
    folder = RESULTS / "scores" / name
    model = LocalModel(source="path", path=str(SMOLLM2))
    with open_material(SMOLLM2, model, Runtime(), RESULTS / "trials", ConsoleObserver()) as material:
        now = score_run(material, rows, Score(**METHODS[name]), budgets, folder)
    path = folder / "cost.json"
    before = read_json(path) if path.exists() else {"seconds": 0.0, "computed": 0}
    cost = {
        "seconds": before["seconds"] + (now["wall_seconds"] if now["rows_computed"] or not path.exists() else 0.0),
        "computed": before["computed"] + now["trials_computed"],
        "asked": now["trials_computed"] + now["trials_reused"],
    }
    write_json(path, cost)
    return folder, cost


@contextmanager
def pruned(dense: PreTrainedModel, plan: Plan, rows: CalibrationSet) -> Iterator[PreTrainedModel]:
    """The model of a plan, in the dtype of `dense`, which is restored."""
    if plan.kind == "mask":
        with masked(dense, plan.mask) as model:
            yield model
    elif plan.kind == "laco":
        with merged(dense, [Merge(*pair) for pair in plan.details["merges"]], plan.details["variant"]) as model:
            yield model
    else:
        yield slice_(load_model(SMOLLM2, "float32"), rows.rows, plan.details["width"]).to(dense.dtype)


def quality(model: PreTrainedModel, tokenizer: Any, advance: str) -> dict[str, Any]:
    """Held-out perplexity, and by task a digit for each item: 1 where the model is right."""
    texts = read_texts(TEXT.parent / "perplexity.parquet")
    rows = held_out(tokenizer, texts, Perplexity(seq_len=1024, max_rows=HELD_OUT_ROWS)).rows
    found: dict[str, Any] = {"perplexity": measure_perplexity(model, rows).perplexity}
    for task in TASKS:
        print(f"  {advance}: {task}", file=sys.stderr, flush=True)
        items = evaluate(model, tokenizer, task, TEXT.parent / "tasks", ITEMS).items
        found[task] = "".join(f"{score:.0f}" for score in items.column(BENCHMARKS[task].metric).to_pylist())
    return found


def calibration_nll(plan: Plan, rows: CalibrationSet, model: PreTrainedModel) -> float:
    """Of the text rows, whatever the search minimised, in float32."""
    if plan.kind == "mask":
        fields = store_fields(rows.digest, checkpoint_identity(SMOLLM2).before, "float32", "perplexity")
        store = TrialStore(fields, rows.row_keys, RESULTS / "trials")
        (score,) = Objective(rows, store, Engine(model))([plan.mask])
        store.close()
        return score.loss
    if plan.kind == "laco":
        return math.log(plan.calibration["perplexity"])
    sliced = slice_(load_model(SMOLLM2, "float32"), rows.rows, plan.details["width"])
    return measure_perplexity(sliced, rows.rows).nll


def study(names: list[str]) -> dict[str, Any]:
    """Search, commit and evaluate, method by method; whatever is known is read.

    Args:
        names: none for all methods that are not known.
    """
    found: dict[str, Any] = read_json(FOUND) if FOUND.exists() else {"methods": {}}
    names = names or [name for name in METHODS if name not in found["methods"]]
    if not names:
        return found
    tokenizer, config = load_tokenizer(SMOLLM2), read_json(SMOLLM2 / "config.json")
    text, answers = text_rows(tokenizer), answer_rows(tokenizer)
    wide, narrow = load_model(SMOLLM2, "float32"), load_model(SMOLLM2, "bfloat16")
    found |= setting() | {"rows": text.tokens, "answer tokens": answers.tokens}
    if "dense" not in found:
        found["dense"] = quality(narrow, tokenizer, "dense")
        rows = measure_perplexity(wide, text.rows)
        found["dense"]["nll"] = rows.nll
        write_json(FOUND, found)
    known: dict[str, Any] = {fingerprint(record["what"]): record for m in found["methods"].values() for record in m}
    for name in names:
        rows = answers if METHODS[name].get("metric") == "answer_likelihood" else text
        budgets = BUDGETS[:1] if name in SMALLER_ONLY else BUDGETS
        folder, cost = search(name, rows, budgets)
        records = []
        for budget in budgets:
            plan, _ = commit_run(folder, config, budget, name, "smollm2")
            what = {"kind": plan.kind, "removed": list(plan.removed), "details": dict(plan.details)}
            record = dict(known.get(fingerprint(what), {"what": what}))
            if "quality" not in record:
                started = time.perf_counter()
                with pruned(narrow, plan, text) as model:
                    record["quality"] = quality(model, tokenizer, f"{name}, {budget}")
                record["quality"]["nll"] = calibration_nll(plan, text, wide)
                record["evaluation seconds"] = time.perf_counter() - started
            records.append(record | {"budget": budget, "ratio": plan.ratio, "blocks": dict(plan.blocks), "cost": cost})
            known[fingerprint(what)] = record
        found["methods"][name] = records
        write_json(FOUND, found)
    return found


def average(quality: Mapping[str, Any]) -> tuple[float, float]:
    """Mean over tasks of the mean score, in per cent, and its standard error."""
    scores = [list(map(int, quality[task])) for task in TASKS]
    errors = [stdev(part) / math.sqrt(len(part)) for part in scores]
    return 100 * fmean(map(fmean, scores)), 100 * math.hypot(*errors) / len(TASKS)


def paired(quality: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """The difference of two averages over the same items, in per cent, and its standard error."""
    parts = [[int(a) - int(b) for a, b in zip(quality[task], other[task], strict=True)] for task in TASKS]
    errors = [stdev(part) / math.sqrt(len(part)) for part in parts]
    return 100 * fmean(map(fmean, parts)), 100 * math.hypot(*errors) / len(TASKS)


def show(found: Mapping[str, Any]) -> None:
    dense = found["dense"]
    mean, error = average(dense)
    print(
        f"\nDense: calibration NLL {dense['nll']:.4f}, held-out perplexity {dense['perplexity']:.2f}, five tasks "
        f"{mean:.1f} ± {error:.1f}. {found['rows']} calibration tokens ({found['answer tokens']} of questions and "
        f"answers for answer likelihood), {HELD_OUT_ROWS * 1024} held-out tokens, {ITEMS} items a task."
    )
    for budget in BUDGETS:
        rows = [(name, r) for name, m in found["methods"].items() for r in m if r["budget"] == budget]
        reference = next((r for name, r in rows if name == "BlockPruner"), {"quality": dense})
        print(f"\nBudget {budget}, by held-out perplexity:\n")
        print(
            "| method | ratio | MHA + MLP | calibration NLL | held-out perplexity | five tasks | to BlockPruner | "
            "trials asked | computed | search, s |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
        for name, record in sorted(rows, key=lambda row: row[1]["quality"]["perplexity"]):
            quality, cost, blocks = record["quality"], record["cost"], record["blocks"]
            (mean, error), (gap, spread) = average(quality), paired(quality, reference["quality"])
            removed = "–" if record["what"]["kind"] == "slicegpt" else f"{blocks['mha']} + {blocks['mlp']}"
            print(
                f"| {name} | {100 * record['ratio']:.2f} % | {removed} | {quality['nll']:.4f} | "
                f"{quality['perplexity']:.1f} | {mean:.1f} ± {error:.1f} | {gap:+.1f} ± {spread:.1f} | "
                f"{cost['asked']} | {cost['computed']} | {cost['seconds']:.0f} |"
            )
    print(f"\n{found['machine']}, {found['threads']} threads, torch {found['versions']['torch']}")


def main() -> None:
    names = sys.argv[1:]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        sys.exit(f"unknown method {unknown[0]!r}; valid: {', '.join(METHODS)}")
    torch.manual_seed(0)
    show(study(names))


if __name__ == "__main__":
    main()
