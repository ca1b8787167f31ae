"""In transformers a pruned model is a model like any other: it saves itself, batches continuously,
has other heads."""

import inspect
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from blockpruner.core.blocks import parse_mask
from blockpruner.model import modeling_blockpruned
from blockpruner.model.models import decoder_layers, masked, model_family, prune_
from blockpruner.store.files import read_json, write_json
from tests.plans import fetch_tiny, plan_of, pruning, save_pruned
from tests.tiny import GRID, tiny_model

MASK = parse_mask("mha.0,mha.2,mlp.0,mlp.3")
"""Of four layers the first one is dropped, and two have a hole."""
IDS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))
PROMPTS = [list(range(5, 17)), list(range(40, 43)), list(range(60, 90))]
"""One within the sliding windows of 6 tokens, two beyond."""

families = pytest.mark.parametrize("family", GRID)


def pruned(family, mask=MASK, **config):
    return prune_(tiny_model(family, dtype=torch.float32, **config), mask)


@families
def test_no_norm_is_without_its_block(family):
    """Tools that pair norms with the linears behind them (llm-compressor's AWQ) go by names."""
    model = tiny_model(family, dtype=torch.float32)
    names = [name for name, _ in model.named_modules()]
    with masked(model, MASK):
        assert not any(isinstance(module, torch.nn.Identity) for module in model.modules())
    assert [name for name, _ in model.named_modules()] == names, "in the same order"
    row = model_family(model)
    model = pruned(family)
    from_config = type(model)._from_config(model.config, experts_implementation="eager")
    holes = ((row.mha, modeling_blockpruned.NoMHA), (row.mlp, modeling_blockpruned.NoMLP))
    for layer in [*decoder_layers(model), *decoder_layers(from_config)]:
        for branch, hole_class in holes:
            is_hole = isinstance(getattr(layer, branch.names(layer)[0]), hole_class)
            for norm in branch.norms:
                assert (norm in layer._modules) is not is_hole


@pytest.mark.parametrize(
    ("family", "mask", "is_refused"),
    [("gemma3_text", "mha.0", True), ("gemma3_text", "mha.3", False), ("llama", "mha.0", False)],
)
def test_an_engine_that_looks_windows_up_by_number_is_refused(family, mask, is_refused):
    """As vLLM's and SGLang's backends of transformers' models do: attention i gets the window of
    layer i."""
    causal_lm = pruned(family, parse_mask(mask))
    for model in (causal_lm, AutoModel.from_config(causal_lm.config)):
        with pytest.raises(ValueError, match="plugin") if is_refused else nullcontext():
            model(IDS, attention_instances={})
    assert "logits_to_keep" in inspect.signature(causal_lm.forward).parameters


CACHE_SIZES = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)


def generate_batch(model, count=6):
    """The tokens that continuous batching generates for each prompt, or its error."""
    options = GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=-1, pad_token_id=0
    )
    outputs = model.generate_batch(
        PROMPTS, generation_config=options, continuous_batching_config=CACHE_SIZES
    )
    answers = {}
    for output in outputs.values():
        answers[tuple(output.prompt_ids)] = output.error or output.generated_tokens
    return [answers[tuple(prompt)] for prompt in PROMPTS]


@torch.no_grad()
def generate_one_by_one(model, count=6):
    """The same by plain forward passes."""
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(count):
            logits = model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.mark.parametrize(
    ("family", "mask", "layers_left"),
    [
        ("llama", "mha.0,mha.2,mlp.3", [1, 3]),
        ("gemma3_text", "mha.0,mha.3,mlp.1", [1, 2]),
        ("gemma3_text", "mha.1,mha.3,mlp.1", [0, 2]),  # all with full attention
        ("gemma3_text", "mha.0,mha.2,mlp.1", [1, 3]),  # all with a window
    ],
)
def test_continuous_batching(family, mask, layers_left):
    """It generates what forward passes of the masked model do, and caches the attentions that are
    left."""
    model = tiny_model(family, dtype=torch.float32)
    with masked(model, parse_mask(mask)):
        expected = generate_one_by_one(model)
    types = getattr(model.config, "layer_types", None) or ["same"] * 4
    prune_(model, parse_mask(mask))
    config = model.config
    manager = model.init_continuous_batching(GenerationConfig(eos_token_id=-1), CACHE_SIZES)
    allocators = manager._create_batch_processor().cache.layer_to_allocator
    assert sorted(allocators) == [0, 1]
    shares_allocator = allocators[0] is allocators[1]
    assert shares_allocator == (types[layers_left[0]] == types[layers_left[1]])
    assert generate_batch(model) == expected
    assert model.config is config


@families
def test_a_model_pruned_in_memory_saves_itself(tmp_path, family):
    """Its holes reach transformers' own field, too."""
    model = pruned(family)
    model.save_pretrained(tmp_path / "once")
    model.config.save_pretrained(tmp_path / "config")
    assert (tmp_path / "config" / "modeling_blockpruned.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True)
    assert [layer.skip for layer in loaded.config.per_layer_config] == [[], ["attention"], ["mlp"]]
    loaded.save_pretrained(tmp_path / "twice")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True)
    logits = model(IDS).logits
    assert torch.equal(loaded(IDS).logits, logits)
    assert torch.equal(reloaded(IDS).logits, logits)


WITHOUT_CLASSIFIER = ("baichuan", "cohere2", "ernie4_5", "granite", "qwen3_5_moe_text")
"""Families for which transformers has no classifier."""


@families
def test_other_classes_load_a_checkpoint(tmp_path, family):
    """The decoder alone and below a head computes the same as in the causal LM."""

    def load(auto_class, folder, **options):
        return auto_class.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, **options
        )

    model = pruned(family)
    model.save_pretrained(tmp_path)
    states = model.base_model(IDS).last_hidden_state
    decoder, report = load(AutoModel, tmp_path)
    assert not report["missing_keys"]
    assert torch.equal(decoder(IDS).last_hidden_state, states)
    if family in WITHOUT_CLASSIFIER:
        return
    classifier, report = load(AutoModelForSequenceClassification, tmp_path, num_labels=3)
    assert {*report["missing_keys"]} == {"score.weight"}
    assert torch.equal(classifier.base_model(IDS).last_hidden_state, states)
    logits = classifier(IDS).logits
    assert logits.shape == (2, 3)
    classifier.save_pretrained(tmp_path / "classifier")
    reloaded, _ = load(AutoModelForSequenceClassification, tmp_path / "classifier")
    assert torch.equal(reloaded(IDS).logits, logits)


@families
def test_attentions_and_hidden_states(family):
    """hidden_states has every layer, attentions those that are left, in order."""
    model = pruned(family, parse_mask("mha.0,mlp.1,mha.2"), attn_implementation="eager")
    layers = decoder_layers(model)
    layer_outputs = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: layer_outputs.append(output))
    outputs = model(IDS, output_attentions=True, output_hidden_states=True)
    assert model.config.layers_without_mha == [0, 2]
    module = model_family(model).mha.module
    for cache_index, index in enumerate((1, 3)):
        assert getattr(layers[index], module).layer_idx == cache_index
    assert [attention.shape for attention in outputs.attentions] == [(2, 4, 14, 14)] * 2
    assert len(outputs.hidden_states) == 5
    # The last hidden state is behind the final norm.
    for index in range(3):
        output = layer_outputs[index]
        states = output[0] if isinstance(output, tuple) else output
        assert torch.equal(outputs.hidden_states[index + 1], states)


LOADED = """
import sys
import blockpruner
assert not {"torch", "transformers"} & sys.modules.keys(), "importing blockpruner is no longer cheap"
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
names = [type(AutoModelForCausalLM.from_pretrained(path)).__module__ for path in sys.argv[1:]]
import blockpruner.api
print(*names, "baichuan" in CONFIG_MAPPING, "nemotron-nas" in CONFIG_MAPPING)
"""


def test_after_an_import_our_checkpoints_load_without_their_code_and_others_as_before(tmp_path):
    dense = fetch_tiny(tmp_path)
    details = {"width": 24, "hidden": 32}
    plans = {
        "pruned": plan_of(dense, ["mha.1"]),
        "sliced": plan_of(dense, ["mha.1"], kind="slicegpt", method="slicegpt", details=details),
    }
    rows = ((1, 2, 3, 4),) * 8
    for name, plan in plans.items():
        save_pruned(pruned_by(dense, plan, rows=rows), tmp_path / name)
    process = subprocess.run(
        [sys.executable, "-c", LOADED, tmp_path / "pruned", tmp_path / "sliced"],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = ["blockpruner.model.modeling_blockpruned", "blockpruner.model.modeling_slicegpt"]
    assert process.stdout.split() == [*ours, "False", "False"], process.stderr


def pruned_by(dense, plan, **options):
    step = pruning(dense, plan, **options)
    return step.prune_(step.load())


def test_a_checkpoint_of_a_newer_format_is_refused_by_name(tmp_path):
    dense = fetch_tiny(tmp_path)
    save_pruned(pruned_by(dense, plan_of(dense, ["mha.1"])), tmp_path / "out")
    config = read_json(tmp_path / "out/config.json")
    assert config["blockpruner_format"] == 1
    write_json(tmp_path / "out/config.json", config | {"blockpruner_format": 2})
    message = "is of blockpruner's format 2, and this version reads 1; install a newer"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
