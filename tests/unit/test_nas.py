"""The nas export: read by mlx-lm, and by a plain forward pass from config.json and safetensors
alone."""

import json
import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from blockpruner.checkpoints import nas, verification
from blockpruner.checkpoints.nas import export_nas
from blockpruner.core.errors import InputError
from blockpruner.methods.registry import KINDS
from tests.engines import with_mlx
from tests.errors import refused
from tests.fakes import InProcess
from tests.plans import fetch_tiny, narrow_plan, plan_of, pruning

ROOT = Path(__file__).parents[2]
IDS = torch.randint(1, 257, (2, 20), generator=torch.Generator().manual_seed(3))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QWEN2 = {"use_sliding_window": False}
CASES = {
    "attention": ("llama", {}, "mha.1,mha.3"),
    "both": (
        "llama",
        {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
        "mha.2,mlp.2,mha.4,mlp.3",
    ),
    "first and last attention": ("llama", {"tie_word_embeddings": True}, "mha.0,mha.1,mha.5"),
    "wide": (
        "llama",
        {"intermediate_size": 256, "rope_parameters": LLAMA3 | {"rope_type": "linear"}},
        "mha.3",
    ),
    "whole layers": ("mistral", {"sliding_window": None}, "mha.1,mlp.1,mlp.4,mha.5"),
    "qwen2 mlp": ("qwen2", QWEN2 | {"tie_word_embeddings": True}, "mlp.0,mlp.3,mlp.5"),
    "narrow": ("llama", {"tie_word_embeddings": True}, {"mlp.0": range(7), "mlp.4": range(5, 40)}),
    "merged": ("qwen2", QWEN2, "mha.4,mha.5,mlp.4,mlp.5"),
}

cases = pytest.mark.parametrize("case", CASES)


def export(dense, plan, out, dtype="float32"):
    export_nas(pruning(dense, plan, dtype), out)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of a case: the exported directory, the dense one, and its plan; made once, one of them with a
    fresh process."""

    @cache
    def make(case):
        family, config, removed = CASES[case]
        dense = fetch_tiny(tmp_path_factory.mktemp("nas"), family, 6, **config)
        merges = {
            "kind": "laco",
            "order": ("2+2",),
            "details": {"merges": [[2, 2]], "variant": "paper"},
        }
        if case == "narrow":
            plan = narrow_plan(dense, removed)
        else:
            plan = plan_of(dense, removed.split(","), **(merges if case == "merged" else {}))
        with pytest.MonkeyPatch.context() as patch:
            if case != "attention":
                patch.setattr(verification, "subprocess", InProcess)
            export(dense, plan, dense.with_name("out"))
        return dense.with_name("out"), dense, plan

    return make


def dense_logits(dense, plan):
    """Of the dense model changed for a while, in float64."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    with KINDS[plan.kind].temporarily_pruned(model, plan), torch.no_grad():
        return model(IDS, use_cache=False).logits


def oracle(directory):
    """A DeciLM forward pass in float64 as its readers define it, from the files alone."""
    config = json.loads((directory / "config.json").read_text())
    weights = {
        name: weight.double() for name, weight in load_file(directory / "model.safetensors").items()
    }
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head, length = hidden // heads, IDS.shape[1]
    used = set()

    def get(name):
        used.add(name)
        return weights[name]

    def linear(x, name, bias):
        return x @ get(f"{name}.weight").T + (get(f"{name}.bias") if bias else 0)

    def norm(x, name):
        return (
            x
            / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
            * get(f"{name}.weight")
        )

    rope = config["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    scaling = config.get("rope_scaling", {"rope_type": "default"})
    assert scaling.items() <= config["rope_parameters"].items()
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    if scaling["rope_type"] == "linear":
        rope = rope / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * rope / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        rope = rope * (smooth + (1 - smooth) / scaling["factor"])
    angles = torch.arange(length)[:, None] * rope

    def rotate(x):  # [B, heads, T, head]
        a, b = x.chunk(2, dim=-1)
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1
        )

    x = get("model.embed_tokens.weight")[IDS]
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    for i, block in enumerate(config["block_configs"]):
        attention, ffn, name = block["attention"], block["ffn"], f"model.layers.{i}"
        if not attention["no_op"]:
            y, bias = norm(x, f"{name}.input_layernorm"), config["attention_bias"]
            group = attention["n_heads_in_group"]
            q, k, v = (
                linear(y, f"{name}.self_attn.{part}_proj", bias)
                .unflatten(-1, (-1, head))
                .transpose(1, 2)
                for part in "qkv"
            )
            assert (q.shape[1], k.shape[1]) == (heads, heads // group)
            k, v = (part.repeat_interleave(group, dim=1) for part in (rotate(k), v))
            scores = rotate(q) @ k.transpose(-1, -2) / math.sqrt(head)
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
            x = x + linear(y, f"{name}.self_attn.o_proj", bias)
        if not ffn["no_op"]:
            width = int(2 * round(ffn["ffn_mult"], 6) * hidden / 3)
            width += -width % 256
            y, bias = norm(x, f"{name}.post_attention_layernorm"), config["mlp_bias"]
            gate, up = (linear(y, f"{name}.mlp.{part}_proj", bias) for part in ("gate", "up"))
            assert gate.shape[-1] == up.shape[-1] == width
            x = x + linear(torch.nn.functional.silu(gate) * up, f"{name}.mlp.down_proj", bias)
    tied = config["tie_word_embeddings"]
    logits = (
        norm(x, "model.norm") @ get("model.embed_tokens.weight" if tied else "lm_head.weight").T
    )
    assert used == weights.keys()
    return logits


@cases
def test_directory_says_the_masked_model(exported, case):
    directory, dense, plan = exported(case)
    expected = dense_logits(dense, plan)
    assert (oracle(directory) - expected).abs().max() <= 1e-5 * expected.abs().max()
    config = json.loads((directory / "config.json").read_text())
    assert not config["block_configs"][0]["attention"]["no_op"]
    attentions = [block for block in config["block_configs"] if not block["attention"]["no_op"]]
    assert len(attentions) == plan.layers - plan.blocks["mha"]
    report = json.loads((directory / "verification.json").read_text())
    if find_spec("mlx_lm") is None:
        assert (report["ok"], report["unchecked"]) == (None, "mlx_lm is not installed")
        return
    assert report["ok"]
    assert report["cache_layers"] == len(attentions)
    assert not report["blockpruner_imported"]
    assert max(report["max_logit_difference"], report["max_logit_difference_cached"]) <= 1e-3


def test_directory_is_complete(exported, tmp_path):
    directory, _, plan = exported("first and last attention")
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "README.md",
        "blockpruner_plan.json",
        "config.json",
        "configuration_decilm.py",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "verification.json",
    }
    loaded = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    assert [block.attention.no_op for block in loaded.block_configs] == [False] * 3 + [True]
    loaded.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["block_configs"] == loaded.block_configs
    )
    assert {path.name for path in directory.parent.iterdir()} >= {"out", "model"}
    assert not list(directory.parent.glob(".*"))
    assert (
        len({(directory / name).stat().st_mode for name in ("model.safetensors", "config.json")})
        == 1
    )
    config = json.loads((directory / "config.json").read_text())
    # MHA 0, 1 and 5 are gone: MLPs 0 and 1 are folded, MLPs 4 and 5 lie in two layers
    kinds = [
        (not block["attention"]["no_op"], not block["ffn"]["no_op"])
        for block in config["block_configs"]
    ]
    assert kinds == [(True, True)] * 3 + [(False, True)]
    card = (directory / "README.md").read_text()
    assert "library_name: mlx" in card
    assert "from_pretrained" not in card
    held = sum(weight.numel() for weight in load_file(directory / "model.safetensors").values())
    assert f"hold {held:,} parameters, {held - plan.parameters['pruned']:,} more" in card


@with_mlx
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("nas_weights", lambda made: made["model.norm.weight"].mul_(1.01)),
        (
            "nas_config",
            lambda made: made["block_configs"][0]["attention"].update(n_heads_in_group=1),
        ),
    ],
    ids=["weights", "heads"],
)
def test_a_wrong_checkpoint_fails_and_leaves_nothing(
    exported, tmp_path, monkeypatch, function, fault
):
    _, dense, plan = exported("attention")
    right = getattr(nas, function)

    def wrong(*arguments):
        made = right(*arguments)
        fault(made)
        return made

    monkeypatch.setattr(nas, function, wrong)
    with pytest.raises(InputError, match=r"does not reproduce the model in memory.*\(mlx_lm\)"):
        export(dense, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "changes", "value"),
    [
        ("qwen3", {}, "qwen3"),
        ("llama", {"dtype": "float64"}, "float64"),
        ("llama", {"head_dim": 12}, 12),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, family, changes, value):
    """From the config alone: there are no weights."""
    plan = {key: changes.pop(key) for key in ("kind", "blocks") if key in changes}
    dtype = changes.pop("dtype", "float32")
    fields = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6} | changes
    config = AutoConfig.for_model(family, **fields)
    config.save_pretrained(tmp_path / "model")
    with refused("export-limits") as error:
        export(
            tmp_path / "model",
            plan_of(config.to_dict(), ["mha.1"], **plan),
            tmp_path / "out",
            dtype,
        )
    assert error.value.value == value
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
