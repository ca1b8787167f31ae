"""Zero-shot scores against plain forwards, numpy and lm-eval's command line."""

import copy
import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

from blockpruner.core.blocks import parse_mask
from blockpruner.evaluation import zero_shot
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.evaluation.tasks import write_task
from blockpruner.evaluation.zero_shot import evaluate
from blockpruner.model.models import prune_
from tests.errors import refused
from tests.harness import assert_same, command_line
from tests.plans import save_pruned
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.zero_shot_items import CHOICES, ITEMS, PASSAGES, write_tasks

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
    prompt, complete = (
        tiny_tokenizer()(text)["input_ids"] for text in (context, context + continuation)
    )
    logits = model(torch.tensor([complete]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, complete[i]].item() for i in range(len(prompt), len(complete)))


@pytest.mark.parametrize("task", CHOICES)
def test_loglikelihoods_are_those_of_plain_forwards(scored, task):
    model = pruned_model()
    rows = scored[task].items.to_pylist()
    assert [(row["task"], row["item"], row["gold"]) for row in rows] == [
        (task, number, item.gold) for number, item in enumerate(ITEMS[task])
    ]
    for row, item in zip(rows, ITEMS[task], strict=True):
        pairs = zip(item.contexts, item.continuations, strict=True)
        assert row["loglikelihoods"] == pytest.approx(
            [loglikelihood(model, *pair) for pair in pairs], rel=1e-4
        )


@pytest.mark.parametrize("task", CHOICES)
def test_accuracies_follow_from_the_loglikelihoods(scored, task):
    result = scored[task]
    rows = result.items.to_pylist()
    acc = np.array([np.argmax(row["loglikelihoods"]) == row["gold"] for row in rows], dtype=float)
    assert [row["acc"] for row in rows] == acc.tolist()
    assert result.scores["acc"] == pytest.approx(acc.mean())
    assert result.scores["acc_stderr"] == pytest.approx(acc.std(ddof=1) / np.sqrt(len(acc)))
    if BENCHMARKS[task].metric == "acc":
        assert (result.scores["acc_norm"], result.scores["acc_norm_stderr"]) == (None, None)
        assert all(row["acc_norm"] is None for row in rows)
        return
    per_character = [
        np.array(row["loglikelihoods"]) / [len(choice) for choice in item.choices]
        for row, item in zip(rows, ITEMS[task], strict=True)
    ]
    norm = np.array(
        [np.argmax(v) == row["gold"] for v, row in zip(per_character, rows, strict=True)],
        dtype=float,
    )
    assert [row["acc_norm"] for row in rows] == norm.tolist()
    assert result.scores["acc_norm"] == pytest.approx(norm.mean())
    assert result.scores["acc_norm_stderr"] == pytest.approx(norm.std(ddof=1) / np.sqrt(len(norm)))


@pytest.mark.parametrize("task", CHOICES)
def test_p_of_the_right_choice_is_a_softmax(scored, task):
    for row, item in zip(scored[task].items.to_pylist(), ITEMS[task], strict=True):
        lengths = (
            [len(choice) for choice in item.choices] if BENCHMARKS[task].metric == "acc_norm" else 1
        )
        scores = torch.tensor(row["loglikelihoods"], dtype=torch.float64) / torch.tensor(lengths)
        assert row["p_gold"] == pytest.approx(scores.softmax(0)[item.gold].item())


def test_p_of_a_last_word_is_its_own(scored):
    for task, result in scored.items():
        for row in result.items.to_pylist():
            if task == "lambada_openai":
                assert row["p_gold"] == pytest.approx(np.exp(row["loglikelihoods"][0]))
            if task not in CHOICES:
                assert (row["p_gold"] is None) == (task != "lambada_openai")


def test_limit_progress_and_silence(task_dir, scored, capfd):
    level = logging.getLogger("lm_eval").level
    steps = []
    limited = evaluate(
        pruned_model(), tiny_tokenizer(), "piqa", task_dir, 3, lambda *step: steps.append(step)
    )
    prompts = limited.items["prompt_hash"].to_pylist()
    assert prompts == scored["piqa"].items["prompt_hash"].to_pylist()[:3]
    assert steps[-1] == (6, 6)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level
    single = evaluate(pruned_model(), tiny_tokenizer(), "piqa", task_dir, 1)
    assert (single.scores["acc_stderr"], single.scores["acc_norm_stderr"]) == (None, None)


def test_the_command_line_gives_the_same_items(scored, task_dir, tmp_path):
    save_pruned(pruned_model(), tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    results, samples = command_line(
        tmp_path / "checkpoint", task_dir, list(BENCHMARKS), tmp_path / "out"
    )
    for task, ours in scored.items():
        assert_same(results[task], samples[task], ours)


# --- tasks without choices


def speller(cycle):
    """A model that says the next letter of `cycle` after each of its letters, whatever came
    before."""
    model = tiny_model(layers=1, dtype=torch.float32, max_position_embeddings=512)
    prune_(model, parse_mask("mha.0,mlp.0"))
    ids = tiny_tokenizer()(cycle)["input_ids"]
    embeddings = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    head = torch.zeros_like(embeddings)
    head[ids[1:] + ids[:1]] = 50 * embeddings[ids]
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    return model


def test_a_last_word_is_right_if_it_is_the_greedy_one(tmp_path):
    texts = ["x m abc", "x m abd", "m abcdefghijkl"]
    write_task("lambada_openai", tmp_path, {"test": pa.table({"text": texts})}, location=tmp_path)
    result = evaluate(speller(" abcdefghijklm"), tiny_tokenizer(), "lambada_openai", tmp_path)
    assert result.items.column("acc").to_pylist() == [1.0, 0.0, 1.0]
    assert result.scores["acc"] == pytest.approx(2 / 3)
    assert result.scores["acc_stderr"] == pytest.approx(np.std([1, 0, 1], ddof=1) / np.sqrt(3))


def test_the_perplexity_of_last_words_is_that_of_plain_forwards(scored):
    result, model = scored["lambada_openai"], pruned_model()
    expected = [loglikelihood(model, *passage) for passage in PASSAGES]
    assert [row["loglikelihoods"] for row in result.items.to_pylist()] == [
        [pytest.approx(e, rel=1e-4)] for e in expected
    ]
    assert result.scores["perplexity"] == pytest.approx(np.exp(-np.mean(expected)), rel=1e-3)
    assert result.scores["perplexity_stderr"] is None


def test_a_sum_is_right_if_the_last_number_said_is(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_shot, "BATCH_SIZE", 2)
    rows = [{"question": "What?", "answer": f"so\n#### {answer}"} for answer in ("42", "43", "4,2")]
    write_task("gsm8k", tmp_path, {"test": pa.Table.from_pylist(rows)}, location=tmp_path)
    steps = []
    result = evaluate(
        speller(": 42;"),
        tiny_tokenizer(),
        "gsm8k",
        tmp_path,
        advance=lambda *step: steps.append(step),
    )
    assert result.items.column("response").to_pylist() == [(" 42;:" * 52)[:256]] * 3
    # commas are not looked at
    assert result.items.column("exact_match").to_pylist() == [
        1.0,
        0.0,
        1.0,
    ]
    assert result.scores["exact_match"] == pytest.approx(2 / 3)
    assert steps == [(2, 3), (3, 3)]


@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_what_the_tokenizer_adds_or_none(task_dir, bos):
    """lm-eval 0.4.0 added none; today's default is the tokenizer's own."""
    tokenizer, seen = copy.deepcopy(tiny_tokenizer()), []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    model = pruned_model()
    model.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    evaluate(model, tokenizer, "piqa", task_dir, 2, bos=bos)
    # two items of two choices
    assert sum((ids == 257).sum().item() for ids in seen) == (4 if bos else 0)


@pytest.mark.parametrize("task", ["piqa", "gsm8k"])
def test_items_beyond_the_vocabulary_are_refused(task_dir, task):
    """On a GPU such a token would end the process."""
    small = tiny_model(
        dtype=torch.float32,
        max_position_embeddings=1024,
        vocab_size=40,
        bos_token_id=1,
        eos_token_id=2,
    )
    with refused("token-without-embedding"):
        evaluate(small, tiny_tokenizer(), task, task_dir, 2)


def test_where_a_devices_memory_ends_requests_are_scored_in_halves_and_none_twice(
    task_dir, scored, monkeypatch
):
    complete, sizes, done = HFLM._model_call, [], []

    def scarce(self, inputs, *args, **kwargs):
        sizes.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return complete(self, inputs, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", scarce)
    result = evaluate(
        pruned_model(),
        tiny_tokenizer(),
        "hellaswag",
        task_dir,
        advance=lambda *entry: done.append(entry),
    )
    expected = scored["hellaswag"].items.to_pylist()
    for own, item in zip(result.items.to_pylist(), expected, strict=True):
        assert own["loglikelihoods"] == pytest.approx(item["loglikelihoods"], rel=1e-5)
    assert max(sizes) > 2
    assert done == sorted(set(done))
    assert done[-1][0] == done[-1][1]
    monkeypatch.setattr(HFLM, "_model_call", lambda *args, **kwargs: scarce(args[0], [0, 0, 0]))
    with pytest.raises(torch.OutOfMemoryError):  # a single request does not fit
        evaluate(pruned_model(), tiny_tokenizer(), "hellaswag", task_dir)
