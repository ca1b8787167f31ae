"""In transformers a pruned model is a model like any other: it saves itself, batches continuously, has other heads."""

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
from blockpruner.model.models import decoder_layers, masked, model_family, prune_
from tests.tiny import GRID, tiny_model

MASK = parse_mask("mha.0,mha.2,mlp.0,mlp.3")
"""Of four layers the first one is dropped, and two have a hole."""
IDS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))
PROMPTS = [list(range(5, 17)), list(range(40, 43)), list(range(60, 90))]
"""One within the sliding windows of 6 tokens, two beyond."""

families = pytest.mark.parametrize("family", GRID)


def pruned(family, mask=MASK, **config):
    return prune_(tiny_model(family, dtype=torch.float32, **config), mask)


def batched(model, new=6):
    """What continuous batching generates for each prompt, or its error."""
    options = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    found = model.generate_batch(PROMPTS, generation_config=options, continuous_batching_config=sizes)
    answers = {tuple(output.prompt_ids): output.error or output.generated_tokens for output in found.values()}
    return [answers[tuple(prompt)] for prompt in PROMPTS]


def one_by_one(model, new=6):
    """The same by plain forward passes."""
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(new):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
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
    """It generates what forward passes of the masked model do, and caches the attentions that are left."""
    model, removed = tiny_model(family, dtype=torch.float32), parse_mask(mask)
    with masked(model, removed):
        expected = one_by_one(model)
    types = getattr(model.config, "layer_types", None) or ["same"] * 4
    prune_(model, removed)
    config = model.config
    manager = model.init_continuous_batching(
        GenerationConfig(eos_token_id=-1), ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    )
    cache = manager._create_batch_processor().cache
    left = [i for i in range(4) if f"mha.{i}" not in mask]
    assert sorted(cache.layer_to_allocator) == list(range(len(left)))
    groups = [cache.layer_to_allocator[k] for k in range(len(left))]
    assert [[a is b for a in groups] for b in groups] == [[types[i] == types[j] for i in left] for j in left]
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
    decoder, report = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and torch.equal(decoder(IDS).last_hidden_state, states)
    if family == "baichuan":  # transformers has no head for it
        return
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, trust_remote_code=True, num_labels=3, output_loading_info=True
    )
    assert {*report["missing_keys"]} == {"score.weight"}
    assert torch.equal(classifier.base_model(IDS).last_hidden_state, states)
    assert classifier(IDS).logits.shape == (2, 3)
    classifier.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again", trust_remote_code=True)
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
    assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states[1:4], states[:3], strict=True))
