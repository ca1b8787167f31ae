"""Zero-shot scores against plain forwards, numpy and lm-eval's command line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from blockpruner.blocks import parse_mask
from blockpruner.checkpoints.hf import save_pruned
from blockpruner.evaluation.benchmarks import ACCURACIES, BENCHMARKS, tables_from_folder, write_task
from blockpruner.evaluation.zero_shot import evaluate
from blockpruner.models import prune_
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.zero_shot_items import CHOICES, ITEMS, TEXTS, write_tasks

MASK = parse_mask("mha.0,mlp.2,mha.3,mlp.3")


def pruned_model():
    return prune_(tiny_model(dtype=torch.float32, max_position_embeddings=1024), MASK)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def scored(task_dir):
    model = pruned_model()
    return {task: evaluate(model, tiny_tokenizer(), task, task_dir) for task in BENCHMARKS}


def loglikelihood(model, context, continuation):
    """Oracle: sum of log p of the continuation's bytes in one plain forward."""
    prompt, whole = (tiny_tokenizer()(text)["input_ids"] for text in (context, context + continuation))
    logits = model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))


@pytest.mark.parametrize("task", CHOICES)
def test_loglikelihoods_are_those_of_plain_forwards(scored, task):
    model = pruned_model()
    rows = scored[task].items.to_pylist()
    assert [(row["task"], row["item"], row["gold"]) for row in rows] == [
        (task, number, item.gold) for number, item in enumerate(ITEMS[task])
    ]
    for row, item in zip(rows, ITEMS[task], strict=True):
        pairs = zip(item.contexts, item.continuations, strict=True)
        assert row["loglikelihoods"] == pytest.approx([loglikelihood(model, *pair) for pair in pairs], rel=1e-4)


@pytest.mark.parametrize("task", CHOICES)
def test_accuracies_follow_from_the_loglikelihoods(scored, task):
    found = scored[task]
    rows = found.items.to_pylist()
    acc = np.array([np.argmax(row["loglikelihoods"]) == row["gold"] for row in rows], dtype=float)
    assert [row["acc"] for row in rows] == acc.tolist()
    assert found.scores["acc"] == pytest.approx(acc.mean())
    assert found.scores["acc_stderr"] == pytest.approx(acc.std(ddof=1) / np.sqrt(len(acc)))
    if BENCHMARKS[task].metric == "acc":
        assert (found.scores["acc_norm"], found.scores["acc_norm_stderr"]) == (None, None)
        assert all(row["acc_norm"] is None for row in rows)
        return
    per_character = [
        np.array(row["loglikelihoods"]) / [len(choice) for choice in item.choices]
        for row, item in zip(rows, ITEMS[task], strict=True)
    ]
    norm = np.array([np.argmax(v) == row["gold"] for v, row in zip(per_character, rows, strict=True)], dtype=float)
    assert [row["acc_norm"] for row in rows] == norm.tolist()
    assert found.scores["acc_norm"] == pytest.approx(norm.mean())
    assert found.scores["acc_norm_stderr"] == pytest.approx(norm.std(ddof=1) / np.sqrt(len(norm)))


def test_the_harness_results_are_json_without_time(scored):
    for task, found in scored.items():
        harness = json.loads(json.dumps(found.harness))
        row = BENCHMARKS[task]
        assert harness["results"][task][f"{row.metric},{row.filter}"] == found.scores[row.metric]
        assert harness["n-samples"][task]["effective"] == found.items.num_rows == len(ITEMS.get(task) or TEXTS[task])
        assert harness["n-shot"][task] == 0
        assert not harness.keys() & {"date", "samples", "git_hash", "pretty_env_info"}


def test_limit_progress_and_silence(task_dir, scored, capfd):
    level = logging.getLogger("lm_eval").level
    steps = []
    found = evaluate(pruned_model(), tiny_tokenizer(), "piqa", task_dir, 3, 2, lambda *step: steps.append(step))
    whole = scored["piqa"].items.to_pylist()
    assert [row["prompt_hash"] for row in found.items.to_pylist()] == [row["prompt_hash"] for row in whole[:3]]
    assert steps == [(2, 6), (4, 6), (6, 6)]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level
    single = evaluate(pruned_model(), tiny_tokenizer(), "piqa", task_dir, 1)
    assert (single.scores["acc_stderr"], single.scores["acc_norm_stderr"]) == (None, None)


def test_the_command_line_gives_the_same_items(scored, task_dir, tmp_path):
    save_pruned(pruned_model(), tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    code = "import sys; sys.modules['blockpruner'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = [sys.executable, "-c", code, "--model", "hf", "--tasks", ",".join(BENCHMARKS), "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'checkpoint'},trust_remote_code=True", "--batch_size", "8"]
    command += ["--include_path", str(task_dir), "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    for task in BENCHMARKS:
        (path,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        theirs = [json.loads(line) for line in path.read_text().splitlines()]
        theirs = sorted((s for s in theirs if s["filter"] == BENCHMARKS[task].filter), key=lambda s: s["doc_id"])
        ours = scored[task].items.to_pylist()
        for metric in ACCURACIES:
            assert [s.get(metric) for s in theirs] == [row[metric] for row in ours]
        assert [s["prompt_hash"] for s in theirs] == [row["prompt_hash"] for row in ours]
        for sample, row in zip(theirs, ours, strict=True):
            # the process may use another number of threads, so rounding may differ
            if row["response"] is not None:
                assert sample["resps"] == [[row["response"]]]
            else:
                answers = [answer if task == "wikitext" else answer[0] for answer in sample["filtered_resps"]]
                assert [float(answer) for answer in answers] == pytest.approx(row["loglikelihoods"], rel=1e-4)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    for task, results in json.loads(path.read_text())["results"].items():
        row = BENCHMARKS[task]
        assert results[f"{row.metric},{row.filter}"] == pytest.approx(scored[task].scores[row.metric], rel=1e-4)


def test_the_full_data_can_be_scored(tmp_path):
    if "BLOCKPRUNER_DATA" not in os.environ:
        pytest.skip("BLOCKPRUNER_DATA is not set: the full benchmark data are not scored")
    model = tiny_model(layers=1, dtype=torch.float32, max_position_embeddings=2048)
    for task in ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"):
        tables = tables_from_folder(task, Path(os.environ["BLOCKPRUNER_DATA"]))
        write_task(task, tmp_path, tables, location=tmp_path)
        found = evaluate(model, tiny_tokenizer(), task, tmp_path, limit=4)
        split = tables["test" if "test" in tables else "validation"].to_pylist()[:4]
        assert found.items.num_rows == 4
        golds = {
            "piqa": lambda row: row["label"],
            "winogrande": lambda row: int(row["answer"]) - 1,
            "hellaswag": lambda row: int(row["label"]),
        }
        gold = golds.get(task, lambda row: row["choices"]["label"].index(row["answerKey"]))
        assert found.items.column("gold").to_pylist() == [gold(row) for row in split]
