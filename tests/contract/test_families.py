"""Invariants of every family: masked equals pruned, exit restores, parameters are counted."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpruner.checkpoints.registry import engines_of
from blockpruner.core.blocks import DENSE, BlockKind, all_blocks, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES, count_kv_cache, count_parameters
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import LocalModel, Runtime
from blockpruner.evaluation.latency import kept_latency
from blockpruner.evaluation.speed import generate as time_generation
from blockpruner.model import modeling_blockpruned
from blockpruner.model.models import decoder_layers, load_model, masked, model_family, prune_
from blockpruner.scoring.settings import Latency
from blockpruner.scoring.work import inner_size
from blockpruner.store.files import read_json
from tests.plans import fetch_tiny, save_pruned
from tests.tiny import GRID, VARIANTS, VARIANTS_DAILY, tiny_model, tolerance

MASKS = ["mlp.0,mlp.1,mlp.2", "mha.0,mha.2,mlp.0,mlp.3"]
IDS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))
GENERATE = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}

families = pytest.mark.parametrize("family", GRID)
every_family = pytest.mark.parametrize("family", VARIANTS)
masks = pytest.mark.parametrize("mask", MASKS)


def generate(model, ids=IDS, attention_mask=None, **options):
    if attention_mask is None:
        attention_mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=attention_mask, **GENERATE | options)


def masked_outputs(model, removed):
    """Logits and greedy tokens of the masked model without a cache."""
    with masked(model, removed):
        return model(IDS).logits, generate(model, use_cache=False)


def assert_same_logits(model, logits):
    assert (model(IDS).logits - logits).abs().max() <= 1e-10


@every_family
def test_parameters_are_counted_from_the_config(family):
    for tied in (True, False):
        model = tiny_model(family, tie_word_embeddings=tied)
        counts = count_parameters(model.config.to_dict())
        assert counts.total == model.num_parameters()
    for block in all_blocks(4):
        pruned = prune_(copy.deepcopy(model), frozenset({block}))
        assert counts.total - counts.blocks[block] == pruned.num_parameters()


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


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name):
    """From the fields of their config.json, which leave out what is the class's default: Gemma's
    tied embeddings, and in 2022 GPT-NeoX's attention_bias and use_parallel_residual."""
    family, sizes, fields, published = PUBLISHED[name]
    config = {"model_type": family, **dict(zip(SIZES, sizes, strict=True)), **fields}
    assert count_parameters(config).total == published
    assert FAMILIES[family].is_parallel(config) == (family == "gpt_neox")


@families
@masks
def test_masked_then_exit_restores_everything(family, mask):
    """After an error, too."""
    model = tiny_model(family)
    weights = model.state_dict()
    logits = model(IDS).logits
    config = model.config.to_dict()
    with pytest.raises(KeyError), masked(model, parse_mask(mask)):  # noqa: PT012 (a user's block)
        masked_logits = model(IDS).logits
        raise KeyError
    assert not torch.equal(masked_logits, logits)
    assert torch.equal(model(IDS).logits, logits)
    assert model.config.to_dict() == config
    restored_weights = model.state_dict()
    assert weights.keys() == restored_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(restored_weights[name], weight)
    mha = model_family(model).mha
    attentions = [getattr(layer, mha.names(layer)[0]) for layer in decoder_layers(model)]
    assert [attention.layer_idx for attention in attentions] == [0, 1, 2, 3]


@families
@masks
def test_pruned_equals_masked(family, mask):
    """Logits, greedy decoding with and without cache, static cache, and left padding."""
    model = tiny_model(family)
    removed = parse_mask(mask)
    logits, tokens = masked_outputs(model, removed)
    with masked(model, removed):
        assert torch.equal(generate(model), tokens)
    pruned = prune_(copy.deepcopy(model), removed)
    assert_same_logits(pruned, logits)
    assert torch.equal(generate(pruned, use_cache=False), tokens)
    assert torch.equal(generate(pruned), tokens)
    assert torch.equal(generate(pruned, cache_implementation="static"), tokens)

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], dim=1)
    is_token = (torch.arange(17) >= 3).long().expand(2, -1)
    # transformers' own attention is NaN in float64 where all keys are masked.
    if pruned.config._attn_implementation == "eager":
        pruned = pruned.float()
    assert torch.equal(generate(pruned, padded, is_token)[:, 3:], tokens)


@families
@masks
def test_a_cache_holds_the_attentions_that_are_left(family, mask):
    model = tiny_model(family)
    removed = parse_mask(mask)
    logits, _ = masked_outputs(model, removed)
    values = count_kv_cache(model.config.to_dict())
    values_left = values.total - sum(values.blocks[block] for block in removed)
    prune_(model, removed)
    cache = model(IDS[:, :5], use_cache=True).cache
    removed_attentions = [block for block in removed if block.kind is BlockKind.MHA]
    assert len(cache.layers) == 4 - len(removed_attentions)
    cached = 0
    for layer in cache.layers:
        # A linear attention's layer has a state of fixed size, and no keys.
        if hasattr(layer, "keys"):
            cached += layer.keys.numel() + layer.values.numel()
    assert cached == values_left * 2 * 5
    step = model(IDS[:, 5:6], cache=cache, use_cache=True).logits[:, -1]
    assert (step - logits[:, 5]).abs().max() <= tolerance(family)


HYBRIDS = [name for name in VARIANTS if FAMILIES[name.split()[0]].mha.linear]


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_without_attentions_that_grow_decodes_with_its_states_alone(family):
    model = tiny_model(family)
    removed = parse_mask("mha.1,mha.3,mlp.0")
    _, tokens = masked_outputs(model, removed)
    pruned = prune_(copy.deepcopy(model), removed)
    assert pruned.config.cache_config().layer_types == ["linear_attention"] * 2 + ["full_attention"]
    assert torch.equal(generate(pruned), tokens)
    assert torch.equal(generate(pruned, cache_implementation="static"), tokens)
    assert time_generation(pruned, IDS, 3).kv_cache_bytes > 0
    cache = pruned(IDS, use_cache=True).cache
    pruned(IDS[:, :1], cache=cache)
    # The cache's length is 0, so all tokens would be read again.
    with pytest.raises(ValueError, match="a token at a time"):
        generate(pruned, cache=cache)


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
    model = LocalModel(source="path", path=str(dense), dtype="float32")
    folders = (tmp_path / "own", tmp_path / "all")
    with pytest.raises(InputError, match="linear and full ones"):
        kept_latency(*folders, dense, model, Latency(), Runtime(), SilentObserver())
    assert inner_size(read_json(dense / "config.json")) == 2 * 24 + 20


@families
@pytest.mark.parametrize(
    ("mask", "layers"),
    [("mha.0,mlp.0", 3), ("mlp.1,mha.2", 3), ("mlp.0,mha.1,mlp.1,mha.2,mlp.3,mha.3", 1)],
)
def test_blocks_that_fill_layers_are_a_plain_model(family, mask, layers):
    """An MHA and a later MLP share a layer where nothing is left between them."""
    model = tiny_model(family)
    removed = parse_mask(mask)
    logits, tokens = masked_outputs(model, removed)
    pruned = prune_(copy.deepcopy(model), removed)
    assert_same_logits(pruned, logits)
    assert torch.equal(generate(pruned), tokens)
    plain_class = type(model)
    row = model_family(model)
    # In a hybrid, the one layer that is left is linear.
    has_linear_only = layers == 1 and row.mha.linear is not None
    if row.is_parallel(model.config.to_dict()) or has_linear_only:
        assert type(pruned) is not plain_class
        return
    assert type(pruned) is plain_class and type(pruned.config) is type(model.config)
    assert pruned.config.num_hidden_layers == len(decoder_layers(pruned)) == layers
    # The config describes the model: layers of the same kinds, with the same parameters.
    from_config = plain_class._from_config(
        pruned.config, dtype=pruned.dtype, experts_implementation="eager"
    )
    from_config.load_state_dict(pruned.state_dict())
    assert torch.equal(from_config(IDS).logits, pruned(IDS).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_modelling_class_agrees_with_the_row(name):
    """The shipped file repeats some of the row, since it must not import blockpruner."""
    row = FAMILIES[name]
    model = getattr(modeling_blockpruned, f"{row.prefix}BlockPrunedForCausalLM")
    branches = tuple((branch.module, *branch.norms) for branch in (row.mha, row.mlp))
    assert (model.decoder_layers, model.layer_branches) == (row.layers, branches)
    config = model.config_class()
    assert config.model_type == f"{row.model_type}_blockpruned"
    assert config.layers_without_mha == config.layers_without_mlp == []


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
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(tmp_path), *variants],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    for family, (logits, tokens) in expected.items():
        outputs = load_file(tmp_path / f"{family}.out")
        assert (outputs["logits"] - logits).abs().max() <= 1e-5, family
        assert torch.equal(outputs["tokens"], tokens), family


def test_mask_beyond_the_model():
    message = r"mlp\.9.*layers 0 to 3"
    with pytest.raises(InputError, match=message), masked(tiny_model(), parse_mask("mlp.9")):
        pass


def test_dense_mask_changes_nothing():
    model = tiny_model()
    logits = model(IDS).logits
    with masked(model, DENSE):
        assert torch.equal(model(IDS).logits, logits)
