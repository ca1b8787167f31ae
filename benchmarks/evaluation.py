"""What is gained where the choices of an item share their context: our log-likelihoods against lm-eval's own, in turns.

    python -m benchmarks.evaluation [--tasks piqa,hellaswag] [--limit 50] [--threads 2] [--rounds 2]

Both score `data/models/smollm2` in float32 through lm-eval, which makes the requests and the scores; theirs with the
model class of `lm_eval --model hf` at a batch size of 8. Prints for each task the seconds of both (the least of the
rounds), their quotient and that of their FLOPs, how far the log-likelihoods of both are from ours in float64 at most,
and how many items are scored otherwise. The seconds of both hold lm-eval's own work, such as reading a task: a small
limit makes the quotient smaller. Needs `dvc repro fetch@smollm2`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

from lm_eval.models.huggingface import HFLM

from benchmarks.scoring import SMOLLM2, TEXT
from blockpruner.core.families import Config, count_parameters
from blockpruner.evaluation import choices, zero_shot
from blockpruner.evaluation.benchmarks import ACCURACIES
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, set_threads

FIVE = "piqa,winogrande,hellaswag,arc_easy,arc_challenge"


class Stock(zero_shot._Harness):
    """lm-eval's own computation of log-likelihoods."""

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return HFLM._loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=override_bs)


def flops_ratio(config: Config, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """FLOPs of lm-eval's passes over ours, without padding and attention scores, for (given, continuation) pairs."""
    head = config["vocab_size"] * config["hidden_size"]
    body = count_parameters(config).total - head  # the embedding is tied to the head
    given = [
        choices.Continuation(number, (*before, *after), len(after)) for number, (before, after) in enumerate(requests)
    ]
    theirs = sum(len(one.tokens) - 1 for one in given) * (body + head)
    read = sum(
        group.common + sum(len(one.tokens) - 1 - group.common for one in group.requests)
        for group in choices.groups(given)
    )
    return theirs / (read * body + sum(one.scored for one in given) * head)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", default=FIVE)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    set_threads(given.threads)
    model, tokenizer = load_model(SMOLLM2, "float32"), load_tokenizer(SMOLLM2)
    wide = load_model(SMOLLM2, "float64")
    classes = {"lm-eval": Stock, "ours": zero_shot._Harness}
    total = dict.fromkeys(classes, 0.0)
    print("| task | lm-eval, s | ours, s | ratio | of FLOPs | lm-eval off, nats | ours off, nats | items that differ |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for task in given.tasks.split(","):
        seconds: dict[str, list[float]] = {name: [] for name in classes}
        found = {}
        for _ in range(given.rounds):
            for name, kind in classes.items():
                with mock.patch.object(zero_shot, "_Harness", kind):
                    start = time.perf_counter()
                    result = zero_shot.evaluate(model, tokenizer, task, TEXT.parent / "tasks", given.limit)
                    seconds[name].append(time.perf_counter() - start)
                found[name] = result.items.to_pylist()
        with mock.patch.object(zero_shot, "answers", wraps=choices.answers) as asked:
            exact = zero_shot.evaluate(wide, tokenizer, task, TEXT.parent / "tasks", given.limit).items.to_pylist()
        bound = flops_ratio(model.config.to_dict(), asked.call_args.args[1])
        off = {
            name: max(
                abs(x - y)
                for a, b in zip(exact, items, strict=True)
                for x, y in zip(a["loglikelihoods"], b["loglikelihoods"], strict=True)
            )
            for name, items in found.items()
        }
        pairs = list(zip(found["lm-eval"], found["ours"], strict=True))
        differ = sum(any(a[metric] != b[metric] for metric in ACCURACIES) for a, b in pairs)
        theirs, ours = (min(seconds[name]) for name in classes)
        total = {"lm-eval": total["lm-eval"] + theirs, "ours": total["ours"] + ours}
        print(
            f"| {task} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.2f} | {bound:.2f} | {off['lm-eval']:.1e} | "
            f"{off['ours']:.1e} | {differ} of {len(pairs)} |",
            flush=True,
        )
    print(f"| all | {total['lm-eval']:.1f} | {total['ours']:.1f} | {total['lm-eval'] / total['ours']:.2f} |" + " |" * 4)


if __name__ == "__main__":
    main()
