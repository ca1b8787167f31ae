"""Calibration on answers of benchmark items: what is drawn, how it reads, and its loss, against lm-eval and torch."""

from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from blockpruner.core.blocks import DENSE, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.evaluation.tasks import write_task
from blockpruner.evaluation.zero_shot import gold_answers
from blockpruner.inputs.calibration import CalibrationSet, draw_in_turn, pack_answers
from blockpruner.model.models import masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task
from stages import calibrate, fetch, settings
from tests.tiny import full_nll, save_tiny, tiny_model, tiny_tokenizer
from tests.unit.zero_shot_items import CHOICES, ITEMS

SKIP = 1


def tables_of(name):
    """The invented items; of two splits, the first item is validation and the others are evaluated."""
    table = pa.Table.from_pylist([item.row for item in ITEMS[name]])
    if BENCHMARKS[name].has_spare_split:
        return {"validation": table.slice(0, 1), "test": table.slice(1)}
    return dict.fromkeys(BENCHMARKS[name].splits, table)


def unscored(name):
    """Oracle: the invented items that are not evaluated."""
    return ITEMS[name][:1] if BENCHMARKS[name].has_spare_split else ITEMS[name][SKIP:]


def golds(name):
    """Oracle: their hand-written prompts and answers."""
    return [(item.contexts[item.gold], item.continuations[item.gold]) for item in unscored(name)]


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    for name in CHOICES:
        write_task(name, directory, tables_of(name), location=directory)
    return directory


def requests_of(name, directory, limit=None):
    """lm-eval's own requests, item by item, for what it evaluates."""
    task = TaskManager(include_path=str(directory), include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=limit)
    items = {}
    for request in task.instances:
        items.setdefault(request.doc_id, []).append(request.args)
    return list(items.values())


# --- items ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
def test_answers_read_as_lm_eval_scores_them(name, task_dir, tmp_path):
    found = gold_answers(name, task_dir, SKIP)
    assert found == golds(name)
    tables = dict([next(iter(tables_of(name).items()))])
    write_task(name, tmp_path, tables, location=tmp_path)  # lm-eval evaluates what was drawn from
    requests = requests_of(name, tmp_path)[-len(found) :]
    assert found == [request[item.gold] for request, item in zip(requests, unscored(name), strict=True)]


@pytest.mark.parametrize("name", CHOICES)
def test_nothing_that_is_evaluated_is_calibrated_on(name, task_dir):
    limit = None if BENCHMARKS[name].has_spare_split else SKIP
    evaluated = set(chain.from_iterable(requests_of(name, task_dir, limit)))
    assert len(evaluated) >= 2
    assert not evaluated & set(gold_answers(name, task_dir, SKIP))


def test_an_item_that_asks_what_an_evaluated_one_asks_is_left_out(tmp_path):
    rows = [item.row for item in ITEMS["piqa"]]
    twin = rows[0] | {"sol1": "Iron it.", "sol2": "Freeze it."}
    write_task("piqa", tmp_path, {"validation": pa.Table.from_pylist([*rows[:3], twin, rows[3]])}, location=tmp_path)
    assert [answer for _, answer in gold_answers("piqa", tmp_path, 2)] == [" wait", " with a knife"]
    arc = pa.Table.from_pylist([item.row for item in ITEMS["arc_easy"]])
    write_task("arc_easy", tmp_path, {"validation": arc, "test": arc.slice(1, 1)}, location=tmp_path)
    assert [answer for _, answer in gold_answers("arc_easy", tmp_path, None)] == [" Frozen water", " Light"]
    write_task("arc_easy", tmp_path, {"validation": arc, "test": arc}, location=tmp_path)
    with pytest.raises(InputError, match=r"arc_easy has no item to calibrate on: of its 3 validation items none"):
        gold_answers("arc_easy", tmp_path, None)


def test_a_single_split_needs_a_skip_that_leaves_items(task_dir):
    with pytest.raises(InputError, match=r"piqa has no split apart.*calibration\.data\.skip.*arc_easy, arc_challenge"):
        gold_answers("piqa", task_dir, None)
    with pytest.raises(InputError, match=r"of its 5 validation items none after the first 5.*lower calibration"):
        gold_answers("piqa", task_dir, 5)


# --- drawing ----------------------------------------------------------------------------------------------------


def test_tasks_give_in_turn():
    pools = {task: [(task, str(i)) for i in range(9)] for task in "abc"}
    drawn = draw_in_turn(pools, 8, 42)
    assert [task for task, _ in drawn] == list("abcabcab")
    assert len(set(drawn)) == 8
    assert drawn == draw_in_turn(pools, 8, 42)
    assert drawn != draw_in_turn(pools, 8, 43)
    assert sorted(draw_in_turn(pools, 27, 42)) == sorted(chain.from_iterable(pools.values()))


def test_a_task_with_too_few_items_is_named():
    pools = {"a": [("a", "0")] * 5, "b": [("b", "0")] * 2}
    assert len(draw_in_turn(pools, 4, 42)) == 4
    with pytest.raises(InputError, match=r"num_samples 6 over 2 tasks asks for 3 items of b, which has 2 .* most 4"):
        draw_in_turn(pools, 6, 42)


# --- tokens -----------------------------------------------------------------------------------------------------


def trained_tokenizer(kind, size):
    """BPE over the items' own text. words: as most models', with <s> before a text; text: merges over any boundary."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "words" else []
    if kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [prompt + answer for name in CHOICES for prompt, answer in golds(name)]
    tokenizer.train_from_iterator(texts * 2, trainer)
    if kind == "words":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize(("kind", "size"), [("words", 400), ("text", 90)])
def test_tokens_are_divided_as_lm_eval_does(kind, size):
    tokenizer = trained_tokenizer(kind, size)
    harness = HFLM(pretrained=tiny_model(layers=1), tokenizer=tokenizer)
    pairs = [pair for name in CHOICES for pair in golds(name)]
    pairs += [(prompt + "  ", answer.strip()) for prompt, answer in pairs]  # spaces that end a prompt
    rows = pack_answers(pairs, tokenizer, 1000).rows
    expected = [harness._encode_pair(*pair) for pair in pairs]
    assert rows == tuple(tuple(-1 - t for t in given) + tuple(scored) for given, scored in expected)
    moved = [tokenizer.encode(p + a)[: len(given)] != given for (p, a), (given, _) in zip(pairs, expected, strict=True)]
    assert any(moved) == (kind == "text")


def test_an_answer_without_a_token_is_named():
    bpe = models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3}, merges=[("b", "c")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))
    assert pack_answers([("ab", "bc")], tokenizer, 8).rows == ((~0, ~1, 3),)
    with pytest.raises(InputError, match=r"'c' to 'ab' has no token of its own.*leave its task out"):
        pack_answers([("ab", "c")], tokenizer, 8)


def test_a_long_row_loses_the_beginning_of_its_prompt():
    tokenizer = tiny_tokenizer()
    text = tokenizer.encode("Question: long?\nAnswer: yes")
    (row,) = pack_answers([("Question: long?\nAnswer:", " yes")], tokenizer, 12).rows
    assert row == (*(-1 - t for t in text[-12:-4]), *text[-4:])
    (row,) = pack_answers([("Question: long?\nAnswer:", " yes")], tokenizer, 5).rows
    assert row == (-1 - text[-5], *text[-4:])
    with pytest.raises(InputError, match=r"seq_len 4 is too short: the longest answer is 4 tokens.*at least 5"):
        pack_answers([("Question: long?\nAnswer:", " yes"), ("Q", " a")], tokenizer, 4)


def test_given_tokens_are_part_of_file_and_digest(tmp_path):
    rows = pack_answers([("Which?", " this"), ("And?", " that one")], tiny_tokenizer(), 64)
    rows.save(tmp_path / "rows.parquet", "tasks")
    assert CalibrationSet.load(tmp_path / "rows.parquet") == rows
    assert rows.digest != CalibrationSet(tuple(tuple(max(t, ~t) for t in row) for row in rows.rows)).digest


# --- loss -------------------------------------------------------------------------------------------------------


def answer_nll(model, pair):
    """Oracle: minus the log-likelihood of the answer in one plain forward, by its tokens (here, its bytes)."""
    prompt, whole = (tiny_tokenizer().encode(text) for text in (pair[0], "".join(pair)))
    logits = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    said = [logits[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))]
    return -np.mean(said)


@pytest.mark.parametrize("mask", [DENSE, parse_mask("mha.0,mlp.2")])
def test_the_loss_of_a_row_is_that_of_its_answer(mask):
    """In one batch with rows of other lengths and a row whose tokens are all scored (full forwards, fp64)."""
    model = tiny_model(max_position_embeddings=1024)
    pairs = [golds(name)[0] for name in CHOICES]
    text = tuple(tiny_tokenizer().encode("no question at all"))
    rows = (*pack_answers(pairs, tiny_tokenizer(), 1024).rows, text)
    (unit,) = Engine(model, batch_tokens=10_000).run([Task(range(len(rows)), (mask,))], rows)
    with masked(model, mask):
        expected = [answer_nll(model, pair) for pair in pairs] + [full_nll(model, text)]
    assert unit.loss == pytest.approx(expected, abs=1e-10)


def test_the_loss_is_lm_evals_loglikelihood_by_token(task_dir):
    """Truncation to the model's context too: lm-eval keeps one token more, the last, which predicts nothing."""
    model = tiny_model(max_position_embeddings=24)
    harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), max_length=23)
    task = TaskManager(include_path=str(task_dir), include_defaults=False).load(["arc_easy"])["tasks"]["arc_easy"]
    doc = task.validation_docs()[0]
    requests = task.construct_requests(doc, task.fewshot_context(doc, 0), metadata=("arc_easy", 0, 1))
    ((prompt, answer),) = gold_answers("arc_easy", task_dir, None)
    (loglikelihood, _) = harness.loglikelihood(requests[:1], disable_tqdm=True)[0]
    rows = pack_answers([(prompt, answer)], tiny_tokenizer(), 24).rows
    assert len(rows[0]) == 24 < len(prompt + answer)
    (unit,) = Engine(model).run([Task(range(1), (DENSE,))], rows)
    assert unit.loss == pytest.approx([-loglikelihood / len(answer)], rel=1e-6)


# --- stages -----------------------------------------------------------------------------------------------------


def test_fetch_and_calibrate(tmp_path, monkeypatch):
    model, items = save_tiny(tmp_path / "model", layers=1), tmp_path / "items"
    items.mkdir()
    pq.write_table(pa.table({"text": ["held out"]}), items / "texts.parquet")
    for name in CHOICES:
        for split, table in tables_of(name).items():
            pq.write_table(table, items / BENCHMARKS[name].file(split))
    tasks = ["arc_easy", "piqa", "winogrande"]
    run = {
        "model": {"source": "path", "path": str(model)},
        "calibration": {
            "data": {"source": "tasks", "tasks": tasks, "skip": SKIP},
            "num_samples": 3, "seq_len": 128, "packing": "per_sample",
        },
        "score": {"metric": "answer_likelihood"},
        "evaluate": {
            "perplexity": {"data": {"source": "path", "path": str(items / "texts.parquet")}, "seq_len": 8},
            "zero_shot": {"data": {"source": "path", "path": str(items)}, "tasks": CHOICES, "limit": SKIP},
        },
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()

    def write(**data):
        run["calibration"]["data"] = run["calibration"]["data"] | data
        (tmp_path / "runs" / "tiny.yaml").write_text(yaml.safe_dump(run))
        (tmp_path / "params.yaml").write_text("{runs: [tiny], targets: {}}")
        settings.main("tiny")

    write(skip=None)
    with pytest.raises(InputError, match=r"piqa has no split apart"):
        fetch.main("tiny")
    assert not (tmp_path / "data/sources").exists()
    write(skip=SKIP)
    fetch.main("tiny")
    assert not (tmp_path / "data/sources/tiny/calibration.parquet").exists()
    calibrate.main("tiny")
    path = tmp_path / "data/calibration/tiny/search.parquet"
    written = path.read_bytes()
    rows = CalibrationSet.load(path).rows
    assert len(rows) == 3
    for row, name in zip(rows, tasks, strict=True):
        given, scored = ([max(t, -1 - t) for t in row if (t < 0) == side] for side in (True, False))
        assert (tiny_tokenizer().decode(given), tiny_tokenizer().decode(scored)) in golds(name)
    calibrate.main("tiny")
    assert path.read_bytes() == written
