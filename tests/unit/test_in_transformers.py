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


@families
def test_no_norm_is_without_its_block(family):
    """Tools that pair norms with the linears behind them (llm-compressor's AWQ) go by names."""
    model = tiny_model(family, dtype=torch.float32)
    names = [name for name, _ in model.named_modules()]
    with masked(model, MASK):
        assert all(not isinstance(module, torch.nn.Identity) for module in model.modules())
    assert [name for name, _ in model.named_modules()] == names, "in the same order"
    row = model_family(model)
    saved = pruned(family)
    fresh = type(saved)._from_config(saved.config, experts_implementation="eager")
    for n, layer in enumerate([*decoder_layers(saved), *decoder_layers(fresh)]):
        for branch, hole in ((row.mha, "NoMHA"), (row.mlp, "NoMLP")):
            is_hole = isinstance(
                getattr(layer, branch.names(layer)[0]), getattr(modeling_blockpruned, hole)
            )
            assert all((norm in layer._modules) is not is_hole for norm in branch.norms), n


@pytest.mark.parametrize(
    ("family", "mask", "told"),
    [("gemma3_text", "mha.0", True), ("gemma3_text", "mha.3", False), ("llama", "mha.0", False)],
)
def test_an_engine_that_looks_windows_up_by_number_is_refused(family, mask, told):
    """As vLLM's and SGLang's backends of transformers' models do: attention i gets the window of
    layer i."""
    kept = pruned(family, parse_mask(mask))
    for model in (kept, AutoModel.from_config(kept.config)):
        with pytest.raises(ValueError, match="plugin") if told else nullcontext():
            model(IDS, attention_instances={})
    assert "logits_to_keep" in inspect.signature(kept.forward).parameters


def pruned(family, mask=MASK, **config):
    return prune_(tiny_model(family, dtype=torch.float32, **config), mask)


def batched(model, new=6):
    """What continuous batching generates for each prompt, or its error."""
    options = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    found = model.generate_batch(
        PROMPTS, generation_config=options, continuous_batching_config=sizes
    )
    answers = {
        tuple(output.prompt_ids): output.error or output.generated_tokens
        for output in found.values()
    }
    return [answers[tuple(prompt)] for prompt in PROMPTS]


def one_by_one(model, new=6):
    """The same by plain forward passes."""
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(new):
            with torch.no_grad():
                tokens.append(
                    int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
                )
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.mark.parametrize(
    ("family", "mask"),
    [
        ("llama", "mha.0,mha.2,mlp.3"),
        ("gemma3_text", "mha.0,mha.3,mlp.1"),
        ("gemma3_text", "mha.1,mha.3,mlp.1"),  # all with full attention
        ("gemma3_text", "mha.0,mha.2,mlp.1"),  # all with a window
    ],
)
def test_continuous_batching(family, mask):
    """It generates what forward passes of the masked model do, and caches the attentions that are
    left."""
    model, removed = tiny_model(family, dtype=torch.float32), parse_mask(mask)
    with masked(model, removed):
        expected = one_by_one(model)
    types = getattr(model.config, "layer_types", None) or ["same"] * 4
    prune_(model, removed)
    config = model.config
    manager = model.init_continuous_batching(
        GenerationConfig(eos_token_id=-1),
        ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64),
    )
    cache = manager._create_batch_processor().cache
    left = [i for i in range(4) if f"mha.{i}" not in mask]
    assert sorted(cache.layer_to_allocator) == list(range(len(left)))
    groups = [cache.layer_to_allocator[k] for k in range(len(left))]
    assert [[a is b for a in groups] for b in groups] == [
        [types[i] == types[j] for i in left] for j in left
    ]
    assert batched(model) == expected
    assert model.config is config


@families
def test_a_model_pruned_in_memory_saves_itself(tmp_path, family):
    """Its holes reach transformers' own field, too."""
    model = pruned(family)
    model.save_pretrained(tmp_path / "itself")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "itself", trust_remote_code=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert [layer.skip for layer in loaded.config.per_layer_config] == [[], ["attention"], ["mlp"]]
    model.config.save_pretrained(tmp_path / "config")
    assert (tmp_path / "config" / "modeling_blockpruned.py").exists()
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@families
def test_other_classes_load_a_checkpoint(tmp_path, family):
    """The decoder alone and below a head computes what it does in the causal LM."""
    model = pruned(family)
    model.save_pretrained(tmp_path)
    states = model.base_model(IDS).last_hidden_state
    decoder, report = AutoModel.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and torch.equal(decoder(IDS).last_hidden_state, states)
    # there is no such head
    if family in (
        "baichuan",
        "cohere2",
        "ernie4_5",
        "granite",
        "qwen3_5_moe_text",
    ):
        return
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, trust_remote_code=True, num_labels=3, output_loading_info=True
    )
    assert {*report["missing_keys"]} == {"score.weight"}
    assert torch.equal(classifier.base_model(IDS).last_hidden_state, states)
    assert classifier(IDS).logits.shape == (2, 3)
    classifier.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    )
    assert torch.equal(again(IDS).logits, classifier(IDS).logits)


@families
def test_attentions_and_hidden_states(family):
    """hidden_states has every layer, attentions those that are left, in order."""
    model = pruned(family, parse_mask("mha.0,mlp.1,mha.2"), attn_implementation="eager")
    seen = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    module = model_family(model).mha.module
    left = [i for i in range(4) if i not in model.config.layers_without_mha]
    outputs = model(IDS, output_attentions=True, output_hidden_states=True)
    assert left == [1, 3] and len(outputs.attentions) == 2 and len(outputs.hidden_states) == 5
    for number, (index, found) in enumerate(zip(left, outputs.attentions, strict=True)):
        layer = decoder_layers(model)[index]
        assert getattr(layer, module).layer_idx == number
        assert found.shape[1:] == (4, 14, 14)
    states = [state[0] if isinstance(state, tuple) else state for state in seen]
    assert all(
        torch.equal(a, b) for a, b in zip(outputs.hidden_states[1:4], states[:3], strict=True)
    )


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
    sliced = plan_of(
        dense, ["mha.1"], kind="slicegpt", method="slicegpt", details={"width": 24, "hidden": 32}
    )
    for name, plan in {"pruned": plan_of(dense, ["mha.1"]), "sliced": sliced}.items():
        made = pruning(dense, plan, rows=((1, 2, 3, 4),) * 8)
        save_pruned(made.prune_(made.load()), tmp_path / name)
    found = subprocess.run(
        [sys.executable, "-c", LOADED, tmp_path / "pruned", tmp_path / "sliced"],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = ["blockpruner.model.modeling_blockpruned", "blockpruner.model.modeling_slicegpt"]
    assert found.stdout.split() == [*ours, "False", "False"], found.stderr


def test_a_checkpoint_of_a_newer_format_is_refused_by_name(tmp_path):
    dense = fetch_tiny(tmp_path)
    made = pruning(dense, plan_of(dense, ["mha.1"]))
    save_pruned(made.prune_(made.load()), tmp_path / "out")
    config = read_json(tmp_path / "out/config.json")
    assert config["blockpruner_format"] == 1
    write_json(tmp_path / "out/config.json", config | {"blockpruner_format": 2})
    with pytest.raises(
        ValueError, match="is of blockpruner's format 2, and this version reads 1; install a newer"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
