"""What every family row must satisfy: invariants 1 and 2 of the design, and parameter counts."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpruner.checkpoints.registry import engines_of
from blockpruner.core.blocks import DENSE, BlockId, BlockKind, all_blocks, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES, count_kv_cache, count_parameters
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import LocalModel, Runtime
from blockpruner.evaluation.latency import kept_latency
from blockpruner.evaluation.speed import generate as time_generation
from blockpruner.model import modeling_blockpruned
from blockpruner.model.models import decoder_layers, load_model, masked, model_family, prune_
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.settings import Latency
from blockpruner.scoring.work import inner_size
from tests.plans import fetch_tiny, save_pruned
from tests.tiny import GRID, VARIANTS, VARIANTS_DAILY, tiny_model, tolerance

MASKS = ["mlp.0,mlp.1,mlp.2", "mha.0,mha.2,mlp.0,mlp.3"]
IDS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))
GENERATE = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}

families = pytest.mark.parametrize("family", GRID)
every_family = pytest.mark.parametrize("family", VARIANTS)
masks = pytest.mark.parametrize("mask", MASKS)


def generate(model, ids=IDS, attention_mask=None, **options):
    attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    return model.generate(ids, attention_mask=attention_mask, **GENERATE | options)


@every_family
def test_parameters_are_counted_from_the_config(family):
    for tied in (True, False):
        model = tiny_model(family, tie_word_embeddings=tied)
        counts = count_parameters(model.config.to_dict())
        assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    for block in all_blocks(4):
        pruned = prune_(copy.deepcopy(model), frozenset({block}))
        assert counts.total - counts.blocks[block] == sum(
            parameter.numel() for parameter in pruned.parameters()
        )


GEMMA = {"head_dim": 256}
PUBLISHED = {
    "pythia-70m": ("gpt_neox", (512, 2048, 6, 8, 50304), {}, 70_426_624),
    "gpt-neox-20b": ("gpt_neox", (6144, 24576, 44, 64, 50432), {}, 20_554_567_680),
    "gemma-2-2b": (
        "gemma2",
        (2304, 9216, 26, 8, 256000),
        GEMMA | {"num_key_value_heads": 4},
        2_614_341_888,
    ),
    "gemma-3-1b": (
        "gemma3_text",
        (1152, 6912, 26, 4, 262144),
        GEMMA | {"num_key_value_heads": 1},
        999_885_952,
    ),
    "phi-3-mini": ("phi3", (3072, 8192, 32, 32, 32064), {}, 3_821_079_552),
    "olmo-2-7b": ("olmo2", (4096, 11008, 32, 32, 100352), {}, 7_298_617_344),
    "mixtral-8x7b": (
        "mixtral",
        (4096, 14336, 32, 32, 32000),
        {"num_key_value_heads": 8, "num_local_experts": 8},
        46_702_792_704,
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        (2048, 6144, 48, 32, 151936),
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "moe_intermediate_size": 768,
        },
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name):
    """From the fields of their config.json, which leave out what is the class's default: Gemma's
    tied embeddings, and in 2022 GPT-NeoX's attention_bias and use_parallel_residual."""
    family, sizes, more, published = PUBLISHED[name]
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    config = {"model_type": family, **dict(zip(names, sizes, strict=True)), **more}
    assert count_parameters(config).total == published
    assert FAMILIES[family].is_parallel(config) == (family == "gpt_neox")


@families
@masks
def test_masked_then_exit_restores_everything(family, mask):
    """After an error, too."""
    model = tiny_model(family)
    before, logits, config = model.state_dict(), model(IDS).logits, model.config.to_dict()
    with pytest.raises(KeyError), masked(model, parse_mask(mask)):  # noqa: PT012 (a user's block)
        changed = model(IDS).logits
        raise KeyError
    assert not torch.equal(changed, logits)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(IDS).logits, logits)
    assert model.config.to_dict() == config
    attentions = [
        getattr(layer, model_family(model).mha.names(layer)[0]) for layer in decoder_layers(model)
    ]
    assert [attention.layer_idx for attention in attentions] == [0, 1, 2, 3]


@families
@masks
def test_pruned_equals_masked(family, mask):
    """Logits, greedy decoding with and without cache, static cache, left padding, and the cache's
    size."""
    model, removed = tiny_model(family), parse_mask(mask)
    with masked(model, removed):
        logits = model(IDS).logits
        tokens = generate(model, use_cache=False)
        assert torch.equal(generate(model), tokens)
    config = model.config.to_dict()
    pruned = prune_(copy.deepcopy(model), removed)
    assert (pruned(IDS).logits - logits).abs().max() <= 1e-10
    assert torch.equal(generate(pruned, use_cache=False), tokens)
    assert torch.equal(generate(pruned), tokens)
    assert torch.equal(generate(pruned, cache_implementation="static"), tokens)

    cache = pruned(IDS[:, :5], use_cache=True).cache
    growing = [layer for layer in cache.layers if hasattr(layer, "keys")]
    held = sum(layer.keys.numel() + layer.values.numel() for layer in growing)
    assert len(cache.layers) == 4 - sum(block.kind is BlockKind.MHA for block in removed)
    values = count_kv_cache(config)
    assert held == (values.total - sum(values.blocks[block] for block in removed)) * 2 * 5
    step = pruned(IDS[:, 5:6], cache=cache, use_cache=True).logits[:, -1]
    assert (step - logits[:, 5]).abs().max() <= tolerance(family)

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], dim=1)
    mask2 = (torch.arange(17) >= 3).long().expand(2, -1)
    # in float64, transformers' own is NaN where all is masked
    if pruned.config._attn_implementation == "eager":
        pruned = pruned.float()
    assert torch.equal(generate(pruned, padded, mask2)[:, 3:], tokens)


@pytest.mark.parametrize(
    "family", [name for name in VARIANTS if FAMILIES[name.split()[0]].mha.linear]
)
def test_a_hybrid_without_attentions_that_grow_decodes_with_its_states_alone(family):
    model, removed = tiny_model(family), parse_mask("mha.1,mha.3,mlp.0")
    with masked(model, removed):
        tokens = generate(model, use_cache=False)
    pruned = prune_(copy.deepcopy(model), removed)
    assert pruned.config.cache_config().layer_types == ["linear_attention"] * 2 + ["full_attention"]
    assert torch.equal(generate(pruned), tokens)
    assert torch.equal(generate(pruned, cache_implementation="static"), tokens)
    assert time_generation(pruned, IDS, 3).kv_cache_bytes > 0
    kept = pruned(IDS, use_cache=True).cache
    pruned(IDS[:, :1], cache=kept)
    # its length is 0, and all would be read again
    with pytest.raises(ValueError, match="a token at a time"):
        generate(pruned, cache=kept)


def test_a_linear_attention_is_given_what_its_own_layer_gives_it():
    model, seen = tiny_model("qwen3_5_text"), []
    hook = decoder_layers(model)[0].linear_attn.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(
            {k for k, value in kwargs.items() if value is not None}
        ),
        with_kwargs=True,
    )
    model(IDS, use_cache=False)
    Engine(model, 1000)._block(BlockId(BlockKind.MHA, 0), *Engine(model, 1000)._prepare(IDS))
    hook.remove()
    assert seen[0] == seen[1] and "hidden_states" in seen[0]


@pytest.mark.parametrize(
    ("model_type", "engines"),
    [
        ("llama_blockpruned", ("transformers", "vLLM")),
        ("llama_slicegpt", ("transformers",)),
        ("qwen3_5_text_blockpruned", ("transformers",)),
        ("ministral", ("transformers",)),
    ],
)
def test_engines_of_a_checkpoint(tmp_path, model_type, engines):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert engines_of("hf", tmp_path) == engines


def test_a_speed_budget_of_a_hybrid_is_refused_and_its_mixture_has_a_width(tmp_path):
    dense = fetch_tiny(tmp_path, "qwen3_5_moe_text")
    model, timed = LocalModel(source="path", path=str(dense), dtype="float32"), Latency()
    with pytest.raises(InputError, match="linear and full ones"):
        kept_latency(
            tmp_path / "own", tmp_path / "all", dense, model, timed, Runtime(), SilentObserver()
        )
    assert inner_size(json.loads((dense / "config.json").read_text())) == 2 * 24 + 20


@families
@pytest.mark.parametrize(
    ("mask", "layers"),
    [("mha.0,mlp.0", 3), ("mlp.1,mha.2", 3), ("mlp.0,mha.1,mlp.1,mha.2,mlp.3,mha.3", 1)],
)
def test_what_fills_whole_layers_is_a_plain_model(family, mask, layers):
    """An MHA and a later MLP share a layer where nothing is left between them."""
    model, removed = tiny_model(family), parse_mask(mask)
    with masked(model, removed):
        logits, tokens = model(IDS).logits, generate(model)
    kind = type(model)
    pruned = prune_(copy.deepcopy(model), removed)
    only_linear = layers == 1 and model_family(model).mha.linear is not None
    if model_family(model).is_parallel(model.config.to_dict()) or only_linear:
        assert type(pruned) is not kind and torch.equal(generate(pruned), tokens)
        return
    assert type(pruned) is kind and type(pruned.config) is type(model.config)
    assert pruned.config.num_hidden_layers == len(decoder_layers(pruned)) == layers
    assert (pruned(IDS).logits - logits).abs().max() <= 1e-10
    assert torch.equal(generate(pruned), tokens)
    # built anew from its config it has the same parameters, in layers of the same kinds
    fresh = kind._from_config(pruned.config, dtype=pruned.dtype, experts_implementation="eager")
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(IDS).logits, pruned(IDS).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_modelling_class_says_what_the_row_says(name):
    """The shipped file repeats what it needs of the row, since it must not import blockpruner."""
    row = FAMILIES[name]
    model = getattr(modeling_blockpruned, f"{row.prefix}BlockPrunedForCausalLM")
    branches = tuple((branch.module, *branch.norms) for branch in (row.mha, row.mlp))
    assert (model.decoder_layers, model.layer_branches) == (row.layers, branches)
    assert model.config_class.model_type == f"{row.model_type}_blockpruned"
    assert model.config_class().layers_without_mha == model.config_class().layers_without_mlp == []


LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
root, *names = sys.argv[1:]
ids = load_file(f"{root}/ids")["ids"]
options = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", trust_remote_code=True).eval()  # as the README says
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    save_file({"logits": model(ids).logits.contiguous(), "tokens": tokens}, f"{root}/{name}.out")
assert "blockpruner" not in sys.modules
"""


@pytest.mark.parametrize(
    "variants",
    [VARIANTS_DAILY, pytest.param(VARIANTS, marks=pytest.mark.slow)],
    ids=["daily", "all"],
)
def test_saved_checkpoint_in_a_fresh_process(tmp_path, variants):
    """Each family, its hardest mask; one process for all, since each would take long.

    The dense model comes from a file too, whose names of weights may be others than the model's
    (GPT-NeoX's head).
    """
    save_file({"ids": IDS}, tmp_path / "ids")
    expected = {}
    for family in variants:
        tiny_model(family, dtype=torch.float32).save_pretrained(tmp_path / "dense" / family)
        model = load_model(tmp_path / "dense" / family, "float32", "cpu")
        prune_(model, parse_mask("mha.0,mha.2,mlp.0,mlp.3"))
        expected[family] = (model(IDS).logits, generate(model))
        save_pruned(model, tmp_path / family)
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-I", "-c", LOAD, str(tmp_path), *variants]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    for family, (logits, tokens) in expected.items():
        found = load_file(tmp_path / f"{family}.out")
        assert (found["logits"] - logits).abs().max() <= 1e-5, family
        assert torch.equal(found["tokens"], tokens), family


def test_mask_beyond_the_model():
    with (
        pytest.raises(InputError, match=r"mlp\.9.*layers 0 to 3"),
        masked(tiny_model(), parse_mask("mlp.9")),
    ):
        pass


def test_dense_mask_changes_nothing():
    model = tiny_model()
    logits = model(IDS).logits
    with masked(model, DENSE):
        assert torch.equal(model(IDS).logits, logits)
