"""What is gained where the choices of an item share their context: our log-likelihoods against lm-eval's own, in turns.

    python -m benchmarks.evaluation [--tasks piqa,hellaswag] [--limit 50] [--threads 2] [--rounds 2]

All score `data/models/smollm2` in float32: the command `lm_eval run --model hf` at a batch size of 8 (by default it is
1), its model class in this process, and ours, for which lm-eval makes the requests and the scores. Prints for each task
the seconds (the least of the rounds), their quotients, and how many items are scored otherwise. The command runs once.
Its clock begins before the model is loaded, and so does ours beside it. All read the task, so a small limit makes
quotients smaller. Needs `dvc repro fetch@smollm2`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval.models.huggingface import HFLM

from benchmarks.scoring import SMOLLM2, TEXT
from blockpruner.evaluation import zero_shot
from blockpruner.evaluation.benchmarks import ACCURACIES
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, set_threads

FIVE = "piqa,winogrande,hellaswag,arc_easy,arc_challenge"


class Stock(zero_shot._Harness):
    """lm-eval's own computation of log-likelihoods."""

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return HFLM._loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=override_bs)


def command_seconds(task: str, limit: int, threads: int) -> float:
    """The seconds that lm-eval's command takes."""
    with tempfile.TemporaryDirectory() as out:
        arguments = {
            "--model": "hf", "--model_args": f"pretrained={SMOLLM2},dtype=float32", "--tasks": task, "--device": "cpu",
            "--include_path": TEXT.parent / "tasks" / task, "--limit": limit, "--batch_size": 8, "--output_path": out,
        }  # fmt: skip
        command = [sys.executable, "-m", "lm_eval", "run", *(str(word) for pair in arguments.items() for word in pair)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        (results,) = Path(out).rglob("results*.json")
        return float(json.loads(results.read_text())["total_evaluation_time_seconds"])


def timed(known: Mapping[str, float], loading: float) -> str:
    """The command and ours, both with the model's loading, and its class and ours without."""
    command, ours = known["command"], known["ours"] + loading
    ratio = known["lm-eval"] / known["ours"]
    return f"{command:.1f} | {ours:.1f} | {command / ours:.2f} | {known['lm-eval']:.1f} | {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", default=FIVE)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    set_threads(given.threads)
    began = time.perf_counter()
    model, tokenizer = load_model(SMOLLM2, "float32"), load_tokenizer(SMOLLM2)
    loading = time.perf_counter() - began
    classes = {"lm-eval": Stock, "ours": zero_shot._Harness}
    total = dict.fromkeys(("command", *classes), 0.0)
    print("| task | lm_eval, s | ours, s | ratio | its class, s | ratio | items that differ |")
    print("|---|" + "---:|" * 6)
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
        pairs = list(zip(found["lm-eval"], found["ours"], strict=True))
        differ = sum(any(a[metric] != b[metric] for metric in ACCURACIES) for a, b in pairs)
        known = {name: min(taken) for name, taken in seconds.items()}
        known["command"] = command_seconds(task, given.limit, given.threads)
        total = {name: total[name] + known[name] for name in total}
        print(f"| {task} | {timed(known, loading)} | {differ} of {len(pairs)} |", flush=True)
    print(f"| all | {timed(total, loading * len(given.tasks.split(',')))} | |")


if __name__ == "__main__":
    main()
