"""The engine, the search and the refit against `blockpruner.reference`, which does the same in
plain torch."""

import math
import random
import re

import pytest
import torch

from blockpruner import reference
from blockpruner.core.blocks import format_mask, parse_mask
from blockpruner.core.progress import SilentObserver
from blockpruner.healing.compensate import compensate
from blockpruner.inputs.calibration import CalibrationSet, pack_rows
from blockpruner.model.models import prune_
from blockpruner.scoring.engine import Engine
from tests.builders import removed_in, searched
from tests.oracles import make_rows, score_all
from tests.plans import plan_of
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
ROWS = make_rows([20] * 24)
TEXTS = [f"Text {number}: {'pruned words, ' * (number % 7 + 3)}" for number in range(60)]


def model_of(family):
    """A model whose attention sees all tokens before, as the reference wants it."""
    return tiny_model(family, **({"use_sliding_window": False} if family == "qwen2" else {}))


def blocks_of(names):
    return [(name[:3], int(name[4:])) for name in names]


def test_rows_are_those_of_the_paper_packing():
    rows = reference.draw_rows(TEXTS, tiny_tokenizer(), 12, 32, seed=5)
    texts = TEXTS[:]
    random.Random(5).shuffle(texts)
    assert rows.tolist() == [
        list(row) for row in pack_rows(texts, tiny_tokenizer(), 32, "joined").rows[:12]
    ]
    with pytest.raises(ValueError, match=r"fill \d+ rows of 32 tokens, not 1000"):
        reference.draw_rows(TEXTS, tiny_tokenizer(), 1000, 32)


@FAMILIES
def test_the_engine_scores_every_block_as_the_reference(family):
    model, removed = model_of(family), parse_mask("mha.1,mlp.2")
    scores = reference.score_blocks(model, torch.tensor(ROWS), blocks_of(["mha.1", "mlp.2"]))
    masks = {block: removed | parse_mask(reference.block_name(block)) for block in scores}
    losses = score_all(Engine(model), masks.values(), ROWS)
    for block, perplexity in scores.items():
        mean_nll = sum(losses[masks[block], row] for row in range(len(ROWS))) / len(ROWS)
        assert math.exp(mean_nll) == pytest.approx(perplexity, rel=1e-10)


@FAMILIES
def test_greedy_search_removes_the_blocks_of_the_reference(family):
    rows = CalibrationSet(tuple(map(tuple, ROWS[:8])))
    expected = reference.search(model_of(family), torch.tensor(ROWS[:8]), 5)
    trace = searched(model_of(family), rows, ["5blocks"]).of("5blocks")
    assert removed_in(trace) == list(map(reference.block_name, expected))


@FAMILIES
@pytest.mark.parametrize(
    "names", [["mha.1", "mlp.1", "mha.2"], ["mha.0", "mlp.3"], ["mlp.0", "mha.3", "mlp.2"]]
)
def test_a_refit_is_the_reference_to_the_last_digits(family, names):
    model, plain = model_of(family), model_of(family)
    fit, validation = ROWS[:18], ROWS[18:]
    step = reference.refit_(plain, blocks_of(names), torch.tensor(fit), torch.tensor(validation))
    plan = plan_of(model.config.to_dict(), names)
    rows = [CalibrationSet(tuple(map(tuple, part))) for part in (fit, validation)]
    weights, facts = compensate(model, {"plan": plan}, *rows, SilentObserver())["plan"]
    assert facts["share"] == step
    assert bool(weights) == bool(step)
    reference.cut_(plain, blocks_of(names))
    pruned = prune_(model, parse_mask(",".join(names)))
    parameters = dict(pruned.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)
    ids = torch.tensor(validation)
    torch.testing.assert_close(plain(ids).logits, pruned(ids).logits, rtol=1e-10, atol=1e-10)


def test_a_cut_model_is_the_masked_one_with_and_without_cache_and_from_its_file(tmp_path):
    model, blocks = tiny_model("llama"), blocks_of(["mha.1", "mlp.1", "mlp.2"])
    before = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.tensor(ROWS[:2])
    with reference.masked(model, blocks):
        expected = model(ids, use_cache=False).logits
    reference.cut_(model, blocks)
    plan = plan_of(tiny_model("llama").config.to_dict(), list(map(reference.block_name, blocks)))
    assert sum(parameter.numel() for parameter in model.parameters()) == round(
        before * (1 - plan.ratio)
    )
    reference.save(model, blocks, tmp_path / "out")
    for item in (model, reference.load(tmp_path / "out")):
        torch.testing.assert_close(item(ids).logits, expected)
        cache = item(ids[:, :7], use_cache=True).past_key_values
        assert len(cache.layers) >= 3
        assert cache.get_seq_length() == 7
        torch.testing.assert_close(item(ids[:, 7:], past_key_values=cache).logits, expected[:, 7:])


def test_the_command_writes_a_smaller_model(tmp_path, capsys):
    checkpoint = save_tiny(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    out = tmp_path / "out"
    given = [
        str(checkpoint),
        str(tmp_path / "texts.txt"),
        "--blocks",
        "2",
        "--rows",
        "8",
        "--seq-len",
        "32",
    ]
    reference.main([*given, "--out", str(out)])
    printed = capsys.readouterr().out
    removed = re.findall(r"removed (\S+), perplexity", printed)
    assert "validation perplexity" in printed
    assert format_mask(parse_mask(",".join(removed)))
    assert (out / "model.safetensors").stat().st_size < (
        checkpoint / "model.safetensors"
    ).stat().st_size
    assert reference.load(out)(torch.tensor(ROWS[:1])).logits.isfinite().all()
