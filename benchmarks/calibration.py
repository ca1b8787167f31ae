"""What makes a bad mask: a scored template, few calibration tokens, or the greedy search? SmolLM2-135M, bfloat16.

    python -m benchmarks.calibration [threads]

Greedy search over blocks and over layers (lazy + race) and ShortGPT on several calibration sets, to about 20 % of the
parameters, and on the first and last to 5 and 10 %; held-out perplexity of each model on the same rows, and paired 95 %
intervals of ratios:

- template scored: the first 64 tokens of 64 Alpaca samples, every token scored.
- template given: the same rows, but what belongs to the Alpaca template is given and not scored.
- responses: joined samples in rows of 256, only responses scored, with about 0.5k, 2k and 8k scored tokens. A larger
  set begins with the smaller one.

Prints Markdown. Numbers are kept in benchmarks/calibration.json, and scores in data/benchmarks/calibration/, so that it
goes on where it was stopped. Needs `dvc repro fetch@smollm2`.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.scoring import SMOLLM2, TEXT, setting
from blockpruner.core.blocks import parse_mask
from blockpruner.core.progress import ConsoleObserver
from blockpruner.core.settings import LocalModel, Runtime
from blockpruner.evaluation.perplexity import held_out, measure_perplexity
from blockpruner.evaluation.settings import Perplexity
from blockpruner.inputs.calibration import CalibrationSet, draw, pack_rows
from blockpruner.inputs.texts import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.commit import commit_run
from blockpruner.methods.score import open_material, score_run
from blockpruner.model.models import load_model, masked, set_threads
from blockpruner.scoring.settings import Score
from blockpruner.store.files import read_json, write_json
from blockpruner.store.provenance import fingerprint

RESULTS, FOUND = Path("data/benchmarks/calibration"), Path("benchmarks/calibration.json")
MODEL = LocalModel(source="path", path=str(SMOLLM2), dtype="bfloat16")
BUDGETS = ("0.05", "0.10", "0.20")
HELD_OUT_ROWS = 48
FAST = {"acceleration": "lazy+race"}
METHODS: dict[str, dict[str, Any]] = {
    "BlockPruner": {"method": "greedy", **FAST},
    "greedy layers": {"method": "greedy", "unit": "layer", **FAST},
    "ShortGPT": {"method": "one_shot", "unit": "layer", "metric": "block_influence"},
}
OLD, GIVEN, NEW = "template scored", "template given", "responses, 8k"
PLANNED = [(rows, method) for rows in (OLD, NEW) for method in METHODS] + [
    (rows, method) for rows in ("responses, 2k", "responses, 0.5k", GIVEN) for method in list(METHODS)[:2]
]


def template_spans(text: str) -> list[tuple[int, int]]:
    """The characters of an Alpaca sample that belong to its template."""
    template = ALPACA_WITH_INPUT if "\n\n### Input:\n" in text else ALPACA_WITHOUT_INPUT
    pattern = re.sub(r"\\\{\w+\\\}", ")(.*?)(", f"({re.escape(template)})")
    found = re.fullmatch(pattern, text, flags=re.DOTALL)
    assert found is not None
    return [found.span(group) for group in range(1, found.re.groups + 1, 2)]


def old_rows(samples: Sequence[str], tokenizer: Any, given: bool) -> tuple[CalibrationSet, float]:
    """Rows of one sample each, cut off at 64 tokens, and the share of predicted tokens that are of the template."""
    rows, template, predicted = [], 0, 0
    for sample in samples:
        encoded, spans = tokenizer(sample, return_offsets_mapping=True), template_spans(sample)
        pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))[:64]
        fixed = [any(start < end <= stop for start, stop in spans) for _, (_, end) in pairs]
        template += sum(fixed[1:])
        predicted += len(fixed) - 1
        rows.append(
            tuple(~token if is_fixed and given else token for (token, _), is_fixed in zip(pairs, fixed, strict=True))
        )
    return CalibrationSet(tuple(row for row in rows if any(token >= 0 for token in row[1:]))), template / predicted


def joined(texts: Sequence[str], tokenizer: Any, scored: int) -> CalibrationSet:
    """The first rows of one seeded permutation of all texts, until `scored` tokens are scored."""
    rows = pack_rows(draw(texts, 200, "all", 42), tokenizer, 256, "joined", "response").rows
    sizes = np.cumsum([sum(token >= 0 for token in row[1:]) for row in rows])
    return CalibrationSet(rows[: int(np.searchsorted(sizes, scored)) + 1])


def calibration_sets(tokenizer: Any) -> tuple[dict[str, CalibrationSet], float]:
    texts = read_texts(TEXT)
    samples = random.Random(42).sample(texts, 64)
    (old, template), (given, _) = old_rows(samples, tokenizer, False), old_rows(samples, tokenizer, True)
    sets = {OLD: old, GIVEN: given}
    for name, scored in (("0.5k", 512), ("2k", 2048), ("8k", 8192)):
        sets[f"responses, {name}"] = joined(texts, tokenizer, scored)
    return sets, template


def study(threads: int | str) -> dict[str, Any]:
    """Search and evaluate what is planned and not known."""
    found: dict[str, Any] = read_json(FOUND) if FOUND.exists() else {"sets": {}, "plans": {}, "models": {}}
    tokenizer, config = load_tokenizer(SMOLLM2), read_json(SMOLLM2 / "config.json")
    sets, template = calibration_sets(tokenizer)
    found |= setting() | {"template": template}
    for name, rows in sets.items():
        found["sets"][name] = {
            "rows": len(rows.rows),
            "tokens": rows.tokens,
            "scored": rows.scored,
            "repeated": rows.repeated,
        }
    runtime = Runtime(threads=threads)
    with open_material(SMOLLM2, MODEL, runtime, RESULTS / "trials", ConsoleObserver()) as material:
        for rows, method in PLANNED:
            label = f"{rows}; {method}"
            folder = RESULTS / "scores" / label
            budgets = BUDGETS if rows in (OLD, NEW) else BUDGETS[-1:]
            score_run(material, sets[rows], Score.model_validate(METHODS[method]), budgets, folder)
            for budget in budgets:
                plan, _ = commit_run(folder, config, budget, label, "smollm2")
                found["plans"][f"{label}; {budget}"] = {
                    "removed": list(plan.removed), "ratio": plan.ratio, "blocks": dict(plan.blocks),
                }  # fmt: skip
            write_json(FOUND, found)
            evaluate(found, tokenizer, threads)
    return found


def evaluate(found: dict[str, Any], tokenizer: Any, threads: int | str) -> None:
    """Held-out NLL, row by row, of the models that are not measured."""
    missing = {name(plan["removed"]): plan["removed"] for plan in ({"removed": []}, *found["plans"].values())}
    missing = {key: removed for key, removed in missing.items() if key not in found["models"]}
    if not missing:
        return
    set_threads(threads)
    texts = read_texts(TEXT.parent / "perplexity.parquet")
    rows = held_out(tokenizer, texts, Perplexity(seq_len=1024, max_rows=HELD_OUT_ROWS, packing="documents")).rows
    dense = load_model(SMOLLM2, "bfloat16")
    for key, removed in missing.items():
        with masked(dense, parse_mask(",".join(removed))) as model:
            found["models"][key] = list(measure_perplexity(model, rows).row_nll)
        write_json(FOUND, found)


def name(removed: Sequence[str]) -> str:
    return fingerprint(list(removed))


def ratio_of(found: dict[str, Any], one: str, other: str) -> str:
    """The ratio of two held-out perplexities with its paired 95 % interval (t over rows, on the log)."""
    a, b = (np.array(found["models"][name(found["plans"][key]["removed"])]) for key in (one, other))
    gaps = a - b
    half = student.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return f"{math.exp(gaps.mean()):.3f} [{math.exp(gaps.mean() - half):.3f}, {math.exp(gaps.mean() + half):.3f}]"


def show(found: dict[str, Any]) -> None:
    dense = math.exp(float(np.mean(found["models"][name([])])))
    print(f"\nOf the scored tokens of {OLD!r}, {found['template']:.1%} are of the template. Dense: {dense:.2f}.\n")
    print("| set | rows | tokens | scored | repeated at a place |\n|---|---:|---:|---:|---:|")
    for key, facts in found["sets"].items():
        print(f"| {key} | {facts['rows']} | {facts['tokens']} | {facts['scored']} | {facts['repeated']:.1%} |")
    print(
        "\n| set | method | budget | ratio | MHA + MLP | held-out perplexity | to 'template scored' | "
        "to greedy layers |\n|---|---|---:|---:|---:|---:|---:|---:|"
    )
    for rows, method in PLANNED:
        for budget in BUDGETS:
            key = f"{rows}; {method}; {budget}"
            if key not in found["plans"]:
                continue
            plan = found["plans"][key]
            nll = float(np.mean(found["models"][name(plan["removed"])]))
            old, layers = f"{OLD}; {method}; {budget}", f"{rows}; greedy layers; {budget}"
            print(
                f"| {rows} | {method} | {budget} | {plan['ratio']:.2%} | {plan['blocks']['mha']} + "
                f"{plan['blocks']['mlp']} | {math.exp(nll):.2f} | {ratio_of(found, key, old) if key != old else ''} | "
                f"{ratio_of(found, key, layers) if layers in found['plans'] and method != 'greedy layers' else ''} |"
            )


def main() -> None:
    show(study(int(sys.argv[1]) if len(sys.argv) > 1 else "auto"))


if __name__ == "__main__":
    main()
