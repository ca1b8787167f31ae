"""The export and the three-line API."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import blockpruner
from blockpruner.checkpoints import hf
from blockpruner.checkpoints.hf import export_hf
from blockpruner.checkpoints.zeroed import export_zeroed
from blockpruner.core.blocks import all_blocks, parse_mask
from blockpruner.core.budgets import resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import count_parameters
from blockpruner.inputs.calibration import pack
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.methods.commit import commit
from blockpruner.model.models import masked
from blockpruner.store.plans import load_plan, save_plan
from tests.tiny import full_nll, save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [f"{i} little words and {i * i} more of them" for i in range(12)]


def plan_of(config, order):
    score = {"method": "greedy", "metric": "perplexity"}
    facts = {
        "target": "t", "run": "r", "score": score, "search": "s", "calibration": {"rows": 3, "tokens": 30},
        "kind": "mask", "nested": True,
    }  # fmt: skip
    units = [parse_mask(unit) for unit in order]
    return commit(units, [2.0] * (len(units) + 1), resources_of(config), f"{sum(map(len, units))}blocks", facts)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    save_tiny(folder / "mine")
    model = {"source": "path", "path": str(folder / "mine"), "dtype": "float32", "trust_remote_code": False}
    fetch_checkpoint(model, folder / "model", folder / "cache", folder / "pins.json")
    return folder / "model"


def test_export_is_complete_and_verified(tmp_path, dense):
    plan = plan_of(json.loads((dense / "config.json").read_text()), ["mha.0", "mlp.3", "mlp.0"])
    export_hf(dense, plan, tmp_path / "out", rows=(), dtype="float32", device="cpu")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors", "verification.json",
                     "modeling_blockpruned.py", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    report = json.loads((tmp_path / "out/verification.json").read_text())
    assert report["ok"]
    assert report["cache_layers"] == 3
    card = (tmp_path / "out/README.md").read_text()
    assert "| 3 | mlp.0 |" in card
    assert f"{plan.parameters['pruned']:,} of {plan.parameters['dense']:,} parameters" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.num_parameters() == plan.parameters["pruned"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_in_bfloat16(tmp_path, dense):
    plan = plan_of(json.loads((dense / "config.json").read_text()), ["mha.0", "mlp.2"])
    export_hf(dense, plan, tmp_path / "out", rows=(), dtype="bfloat16", device="cpu")
    assert json.loads((tmp_path / "out/verification.json").read_text())["ok"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).dtype is torch.bfloat16


def test_whole_layers_are_a_plain_checkpoint(tmp_path, dense):
    plan = plan_of(json.loads((dense / "config.json").read_text()), ["mlp.1", "mha.2"])
    export_hf(dense, plan, tmp_path / "out", rows=(), dtype="float32", device="cpu")
    assert json.loads((tmp_path / "out/verification.json").read_text())["class"] == "LlamaForCausalLM"
    assert not list((tmp_path / "out").glob("*.py"))
    assert "trust_remote_code" not in (tmp_path / "out/README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 3 and loaded.num_parameters() == plan.parameters["pruned"]


def test_zeroed_keeps_the_shape_and_says_so(tmp_path, dense):
    plan = plan_of(json.loads((dense / "config.json").read_text()), ["mha.0", "mlp.3"])
    export_zeroed(dense, plan, tmp_path / "out", rows=(), dtype="float32", device="cpu")
    report = json.loads((tmp_path / "out/verification.json").read_text())
    assert report["ok"] and report["cache_layers"] == 4 and report["class"] == "LlamaForCausalLM"
    assert "neither smaller nor faster" in (tmp_path / "out/README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == plan.parameters["dense"]
    with pytest.raises(InputError, match="method 'laco' of run 'r' removes none; leave zeroed out"):
        export_zeroed(dense, replace(plan, kind="laco", method="laco"), tmp_path / "x", rows=(), dtype="float32",
                      device="cpu")  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("phi3", "float32"), ("mixtral", "bfloat16"), ("qwen3_moe", "bfloat16"), ("gemma2", "float64")],
)
def test_other_families_are_exported_and_verified(tmp_path, family, dtype):
    """Among them a class that transformers wraps, and models that rounding sends to other experts."""
    save_tiny(tmp_path / "mine", family)
    model = {"source": "path", "path": str(tmp_path / "mine"), "dtype": dtype, "trust_remote_code": False}
    fetch_checkpoint(model, tmp_path / "model", tmp_path / "cache", tmp_path / "pins.json")
    plan = plan_of(json.loads((tmp_path / "model/config.json").read_text()), ["mha.0", "mlp.2"])
    export_hf(tmp_path / "model", plan, tmp_path / "out", rows=(), dtype=dtype, device="cpu")
    assert json.loads((tmp_path / "out/verification.json").read_text())["ok"]


@pytest.mark.parametrize("fault", ["renumbering", "weights"])
def test_a_wrong_checkpoint_fails_and_leaves_nothing(tmp_path, dense, monkeypatch, fault):
    plan = plan_of(json.loads((dense / "config.json").read_text()), ["mha.0"])
    save = hf.save_pruned

    def spoil(model, directory):
        save(model, directory)
        if fault == "renumbering":
            path = directory / "modeling_blockpruned.py"
            path.write_text(
                path.read_text().replace("attention.layer_idx = number", "attention.layer_idx = number + 1")
            )
        else:
            with torch.no_grad():
                model.model.norm.weight.mul_(1.5)
            save(model, directory)

    monkeypatch.setattr(hf, "save_pruned", spoil)
    with pytest.raises(InputError, match="does not reproduce the model in memory"):
        export_hf(dense, plan, tmp_path / "out", rows=(), dtype="float32", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_plan_round_trip(tmp_path):
    plan = plan_of(tiny_model().config.to_dict(), ["mha.1", "mlp.2"])
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert replace(plan, budget="x") != plan
    assert plan.ratios[-1] == plan.ratio == pytest.approx(1 - plan.parameters["pruned"] / plan.parameters["dense"])


def test_prune_in_memory_equals_brute_force():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    reference = copy.deepcopy(model)
    ratio = 0.3
    pruned = blockpruner.prune(model, tokenizer, TEXTS, ratio=ratio, seq_len=32)
    rows = pack(TEXTS, tokenizer, 32, "joined").rows
    removed = frozenset()
    for unit in pruned.plan.order:
        scores = {}
        for block in all_blocks(4):
            if block not in removed:
                with masked(reference, removed | {block}):
                    scores[block] = sum(full_nll(reference, row) for row in rows) / len(rows)
        best = min(scores, key=scores.get)
        assert unit == str(best)
        removed |= {best}
    counts = count_parameters(reference.config.to_dict())
    assert pruned.plan.mask == removed
    assert abs(counts.ratio(removed) - ratio) <= max(counts.blocks.values()) / counts.total / 2
    ids = torch.arange(1, 20)[None]
    with masked(reference, removed):
        assert torch.equal(reference(ids).logits, pruned.model(ids).logits)


def test_prune_saves_a_loadable_model(tmp_path):
    pruned = blockpruner.prune(tiny_model(dtype=torch.float32), tiny_tokenizer(), TEXTS, ratio=0.2, seq_len=32)
    pruned.save(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.arange(1, 20)[None]
    assert torch.equal(loaded(ids).logits, pruned.model(ids).logits)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 22])
def test_bad_ratio(ratio):
    with pytest.raises(InputError, match="between 0 and 1"):
        blockpruner.prune(tiny_model(), tiny_tokenizer(), TEXTS, ratio=ratio, seq_len=32)


def test_importing_a_module_does_not_import_the_library():
    code = "import sys, blockpruner.core.blocks, blockpruner.methods.commit; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("budget", "mha", "blocks"), [("3blocks", None, 3), ("0.5kv", 2, 2)])
def test_prune_to_another_budget(budget, mha, blocks):
    options = {"per": "kv"} if mha else {}
    plan = blockpruner.prune(tiny_model(), tiny_tokenizer(), TEXTS, ratio=budget, seq_len=32, options=options).plan
    assert sum(plan.blocks.values()) == blocks == len(plan.removed)
    assert mha is None or plan.blocks["mha"] == mha


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": "1.2x"}, "budget '1.2x' is a speed-up, and what blocks take of the time is not known here"),
        ({"method": "laco"}, "method 'laco' changes weights, which prune does not"),
        ({"metric": "answer_likelihood"}, "'answer_likelihood' is of items and their answers"),
        ({"texts": "one string"}, "texts is one string; give a list"),
    ],
)
def test_prune_says_what_it_cannot(changes, message):
    with pytest.raises(InputError, match=message):
        blockpruner.prune(tiny_model(), tiny_tokenizer(), **{"texts": TEXTS, "ratio": 0.2, "seq_len": 32} | changes)
