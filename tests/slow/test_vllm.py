"""Pruned SmolLM2 and tiny models of every family in vLLM: `make test-slow`, with an environment of
vLLM's own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from blockpruner.checkpoints.hf import export_hf
from blockpruner.checkpoints.nas import export_nas
from blockpruner.core.families import FAMILIES
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model
from tests.cells import seen
from tests.plans import fetch_tiny, narrow_plan, plan_of, pruning, save_pruned
from tests.tiny import VARIANTS, tiny_tokenizer

PROMPTS = ["The capital of France is", "Once upon a time, a little fox", "def fibonacci(n):\n"]
NEW_TOKENS = 24

pytestmark = pytest.mark.slow


def ask(what: str, checkpoint: Path, reference: Path, **more: str) -> dict:
    """An answer of `vllm_check.py` in a fresh process of vLLM's environment, which sees blockpruner
    only as installed there, with more variables."""
    answer = reference.with_name(f"{what}-{checkpoint.name}.json")
    command = [
        Path(os.environ["BLOCKPRUNER_VLLM"]) / "python",
        "-I",
        Path(__file__).with_name("vllm_check.py"),
    ]
    command += [what, checkpoint, reference, answer]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    } | more
    log = answer.with_suffix(".log")
    with open(log, "w") as out:
        result = subprocess.run(
            command, stdout=out, stderr=out, env=environment, cwd=reference.parent, check=False
        )
    assert result.returncode == 0, log.read_text()[-3000:]
    return json.loads(answer.read_text())


def write_reference(model, tokenizer, path: Path) -> Path:
    """Greedy continuations by transformers, without a cache, and the log-probability of each token
    after the first."""
    rows = []
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            eos_token_id=None,
        )
        logits = model(tokens, use_cache=False).logits[0, :-1].double()
        logprobs = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        rows.append(
            {"prompt": ids[0].tolist(), "tokens": tokens[0].tolist(), "logprobs": logprobs.tolist()}
        )
    path.write_text(json.dumps(rows))
    return path


def test_vllm_says_what_the_model_in_memory_says(tmp_path, smollm2, plans, healed):
    """At two ratios, and with other weights than the dense model's; what vLLM measures on the way
    is printed."""
    tokenizer = load_tokenizer(smollm2)
    chosen = {name: pruning(smollm2, plan) for name, plan in plans.items() if plan.removed} | healed
    references = {
        "dense": write_reference(
            load_model(smollm2, "float32", "cpu"), tokenizer, tmp_path / "dense.json"
        )
    }
    reports = {"dense": ask("check", smollm2, references["dense"])}
    plain = max(plans, key=lambda name: plans[name].ratio)
    for each, made in chosen.items():
        references[each] = write_reference(
            made.prune_(made.load()), tokenizer, tmp_path / f"{each}.json"
        )
        export_hf(made, tmp_path / f"hf {each}")
        reports[f"hf {each}"] = ask("check", tmp_path / f"hf {each}", references[each])
    for form, report in reports.items():
        print(form, json.dumps(report))
        assert report["max_logprob_difference"] <= 1e-3
        assert report["greedy_tokens_equal"]
    for form in reports.keys() - {"dense"}:
        left = 30 - chosen[form.partition(" ")[2]].plan.blocks["mha"]
        assert reports[form]["kv_cache_tokens"] / reports["dense"][
            "kv_cache_tokens"
        ] == pytest.approx(30 / left, rel=0.02)

    # it sees a difference: a block, or weights
    for path, other in (
        (f"hf {plain}", "dense"),
        (f"hf {plain} + refit", plain),
    ):
        assert ask("check", tmp_path / path, references[other])["max_logprob_difference"] > 0.1


HOLES = ["mha.0", "mlp.1", "mha.3", "mlp.3", "mlp.4", "mha.5"]
"""Of six layers: the first has no MHA, and the fourth is gone."""

KEPT = {"mlp.1": range(16), "mlp.3": range(0, 48, 2)}
"""What narrowed MLPs keep of 48 channels."""

HEADS = {"head_dim": 32}
TAKEN: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "qwen3": HEADS,
    "gemma2": {"head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 1200},
    "gemma3_text": {"head_dim": 32, "tie_word_embeddings": True},
    "seed_oss": HEADS,
    "ernie4_5": HEADS | {"use_bias": False},
    "hunyuan_v1_dense": HEADS,
    "ministral": HEADS,
    "ministral3": HEADS,
    "glm": HEADS,
    "granite": {"attention_multiplier": 0.17},
    "cohere2": {"sliding_window": 64},
    "glm4": HEADS | {"initializer_range": 0.2},
}
"""What vLLM takes of a family, dense or not. Its attention on a CPU needs heads that are a multiple
of 32 wide, and gives NaN where it caps logits of several hundred, which Gemma 2's random weights
would reach. Its windows of Cohere 2 are one token wider than those of transformers."""


def test_every_family_is_served_from_its_hf_checkpoint(tmp_path):
    """Tiny random models; one is also compared with a model that has another hole, which shows."""
    made, references, configs = tmp_path / "made", tmp_path / "references", {}
    references.mkdir()
    variants = [variant for variant in VARIANTS if FAMILIES[variant.split()[0]].in_vllm]
    narrow = {
        f"{variant} narrow" for variant in variants if FAMILIES[variant.split()[0]].has_one_mlp
    }
    for name in [*variants, *sorted(narrow), "llama wrong"]:
        variant = name.removesuffix(" wrong").removesuffix(" narrow")
        dense = fetch_tiny(tmp_path / name, variant, 6, hidden_size=128, **TAKEN.get(variant, {}))
        asked = pruning(
            dense, narrow_plan(dense, KEPT) if name in narrow else plan_of(dense, HOLES)
        )
        pruned = asked.prune_(asked.load())
        save_pruned(pruned, made / name)
        tiny_tokenizer().save_pretrained(made / name)
        configs[name] = pruned.config
        if name.endswith("wrong"):
            asked = pruning(
                dense, plan_of(dense, ["mlp.2" if block == "mlp.1" else block for block in HOLES])
            )
            pruned = asked.prune_(asked.load())
        write_reference(pruned, tiny_tokenizer(), references / f"{name}.json")
    reports = ask("families", made, references)
    assert reports.keys() == configs.keys()
    for name, report in reports.items():
        print(name, report["max_logprob_difference"])
        if name in narrow:
            assert configs[name].mlp_widths == [48, 16, 48, 24, 48, 48] and report["cached"] == [
                *range(6)
            ]
            assert report["max_logprob_difference"] <= 5e-3 and report["greedy_tokens_equal"], name
            continue
        layers, without = (
            range(5),
            {"self_attn": [0, 4], "attention": [0, 4], "mlp": [1, 3], "block_sparse_moe": [1, 3]},
        )
        assert (configs[name].layers_without_mha, configs[name].layers_without_mlp) == (
            [0, 4],
            [1, 3],
        )
        assert report["cached"] == [layer for layer in layers if layer not in without["self_attn"]]
        held = {
            tuple(parts[i : i + 2])
            for parts in (n.split(".") for n in report["parameters"])
            for i in range(len(parts) - 1)
        }
        for module, removed in without.items():
            there = [layer for layer in layers if (str(layer), module) in held]
            assert there in ([], [layer for layer in layers if layer not in removed])
        if name.endswith("wrong"):
            assert report["max_logprob_difference"] > 0.1 and not report["greedy_tokens_equal"]
        else:
            assert report["max_logprob_difference"] <= 1e-3 and report["greedy_tokens_equal"], name
            if name in FAMILIES:
                seen("vLLM", name, report["max_logprob_difference"])


def test_a_nas_export_needs_no_plugin(tmp_path):
    """Its config is read by the file that it carries, with `--trust-remote-code`."""
    made, references = tmp_path / "made", tmp_path / "references"
    made.mkdir()
    references.mkdir()
    for name in ("llama", "mistral", "qwen2"):
        more = {"qwen2": TAKEN["qwen2"], "mistral": {"sliding_window": None}}.get(name, {})
        dense = fetch_tiny(tmp_path / name, name, 6, hidden_size=128, intermediate_size=256, **more)
        asked = pruning(dense, plan_of(dense, ["mha.2", "mlp.3", "mha.4", "mlp.4"]))
        export_nas(asked, made / name)
        write_reference(asked.prune_(asked.load()), tiny_tokenizer(), references / f"{name}.json")
    for name, report in ask("nas", made, references, VLLM_PLUGINS="").items():
        print(name, "nas", report["max_logprob_difference"])
        assert report["cached"] == [0, 1, 3, 4], name
        assert report["max_logprob_difference"] <= 1e-3 and report["greedy_tokens_equal"], name
        seen("vLLM, nas", name, report["max_logprob_difference"])
