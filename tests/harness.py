"""lm-eval's own command line in a process of its own, as the oracle of our scores."""

import json
import os
import subprocess
import sys

import pytest

from blockpruner.evaluation.benchmarks import ACCURACIES, BENCHMARKS


def command_line(checkpoint, task_dir, tasks, out, *options):
    """Score a checkpoint without our package; returns lm-eval's results by task, and its items by
    task."""
    code = (
        "import sys; sys.modules['blockpruner'] = None; from lm_eval.__main__ import cli_evaluate;"
        " cli_evaluate()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "--model",
        "hf",
        "--tasks",
        ",".join(tasks),
        "--device",
        "cpu",
        *options,
    ]
    command += [
        "--model_args",
        f"pretrained={checkpoint},trust_remote_code=True",
        "--batch_size",
        "8",
    ]
    command += ["--include_path", str(task_dir), "--log_samples", "--output_path", str(out)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(out / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = out.rglob("results_*.json")
    items = {}
    for task in tasks:
        (samples,) = out.rglob(f"samples_{task}_2*.jsonl")
        found = [json.loads(line) for line in samples.read_text().splitlines()]
        found = [sample for sample in found if sample["filter"] == BENCHMARKS[task].filter]
        items[task] = sorted(found, key=lambda sample: sample["doc_id"])
    return json.loads(path.read_text())["results"], items


def assert_same(theirs, samples, ours):
    """One task's results, by the command line and by `zero_shot.evaluate`, to the item."""
    row, items = BENCHMARKS[ours.task], ours.items.to_pylist()
    for metric in ACCURACIES:
        assert [sample.get(metric) for sample in samples] == [item[metric] for item in items]
    assert [sample["prompt_hash"] for sample in samples] == [item["prompt_hash"] for item in items]
    for sample, item in zip(samples, items, strict=True):
        if row.kind == "generate_until":
            assert sample["resps"] == [[item["response"]]]
        else:
            answers = sample["filtered_resps"]
            logs = [float(answer[0]) for answer in answers]
            assert logs == pytest.approx(item["loglikelihoods"], rel=1e-4)
    for metric, value in ours.scores.items():
        if value is not None:
            assert theirs[f"{metric},{row.filter}"] == pytest.approx(value, rel=1e-3)
