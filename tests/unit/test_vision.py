"""Models that also read pictures: their text model is taken out of them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from blockpruner.core.errors import InputError
from blockpruner.core.families import count_parameters
from blockpruner.core.settings import LocalModel
from blockpruner.inputs.checkpoints import cached_checkpoint, fetch_config
from blockpruner.inputs.vision import text_config
from blockpruner.model.models import load_model
from blockpruner.store.files import read_json, write_json
from tests.tiny import tiny_tokenizer

TEXT = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "sliding_window": 6,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
MODELS = {
    "gemma3": (
        {"query_pre_attn_scalar": 8},
        VISION,
        {"mm_tokens_per_image": 4},
        "Gemma3ForCausalLM",
    ),
    "mistral3": (
        {},
        VISION | {"head_dim": 8},
        {"tie_word_embeddings": False},
        "MistralForCausalLM",
    ),
    "mistral3 ministral3": ({}, VISION | {"head_dim": 8}, {}, "Ministral3ForCausalLM"),
    "qwen3_vl": (
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e3,
                "mrope_section": [2, 1, 1],
            }
        },
        {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
        {"tie_word_embeddings": False},
        "Qwen3ForCausalLM",
    ),
    "qwen3_5": (
        DELTA
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e3,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
            }
        },
        {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
        {"tie_word_embeddings": False},
        "Qwen3_5ForCausalLM",
    ),
}
IDS = torch.tensor([[5, 17, 200, 3, 99, 41, 8, 250, 77]])


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


def save_model(folder, name):
    """A random model that reads pictures, in float32, saved."""
    text_fields, vision_fields, fields, _ = MODELS[name]
    model_type, _, text_type = name.partition(" ")
    text_config = TEXT | text_fields
    if text_type:
        text_config["model_type"] = text_type
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        model_type, text_config=text_config, vision_config=vision_fields, **fields
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return model


def replace_weights(folder, weights):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fetched(root, note=print):
    """The text model of the model in `root / "all"`."""
    source = LocalModel(source="path", path=str(root / "all"), dtype="float32")
    return cached_checkpoint(source, root / "cache", root / "pins", note)


@pytest.mark.parametrize("name", MODELS)
def test_the_text_model_computes_as_the_full_model_without_pictures(tmp_path, name):
    model = save_model(tmp_path / "all", name)
    notes = []
    folder = fetched(tmp_path, notes.append)
    assert any("reads pictures" in note for note in notes)
    assert not (folder / "preprocessor_config.json").exists()
    config = read_json(folder / "config.json")
    assert config["architectures"] == [MODELS[name][3]]
    assert "vision_config" not in config
    source = LocalModel(source="path", path=str(tmp_path / "all"), dtype="float32")
    assert json.loads(json.dumps(fetch_config(source, tmp_path / "pins"))) == config
    text_model = load_model(folder, "float32", "cpu")
    assert type(text_model).__name__ == MODELS[name][3]
    assert torch.equal(logits_of(text_model), logits_of(model))
    assert count_parameters(config).total == text_model.num_parameters()


def test_weights_by_the_names_in_memory(tmp_path):
    """transformers writes the names of the first versions of these models, which are others."""
    model = save_model(tmp_path / "all", "mistral3")
    index = read_json(tmp_path / "all" / "model.safetensors.index.json")
    assert not index["weight_map"].keys() & model.state_dict().keys() - {"lm_head.weight"}
    replace_weights(tmp_path / "all", model.state_dict())
    text_model = load_model(fetched(tmp_path), "float32", "cpu")
    assert torch.equal(logits_of(text_model), logits_of(model))


def test_other_models_are_not_touched():
    assert text_config({"model_type": "idefics3", "text_config": {"model_type": "llama"}}) is None


def test_weights_of_other_names_are_refused(tmp_path):
    save_model(tmp_path / "all", "gemma3")
    replace_weights(tmp_path / "all", {"model.text_model.layers.0.weight": IDS})
    with pytest.raises(InputError, match="no text model by a name that is known"):
        fetched(tmp_path)


def test_a_text_model_of_another_family_is_refused(tmp_path):
    save_model(tmp_path / "all", "gemma3")
    path = tmp_path / "all" / "config.json"
    write_json(path, read_json(path) | {"text_config": {"model_type": "gpt2"}})
    with pytest.raises(InputError, match="gemma3"):
        fetched(tmp_path)
