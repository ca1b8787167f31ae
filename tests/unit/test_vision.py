"""Models that also read pictures: what is taken out of them is their text model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from blockpruner.core.errors import InputError
from blockpruner.core.families import count_parameters
from blockpruner.core.settings import LocalModel
from blockpruner.inputs.checkpoints import cached_checkpoint, fetch_config
from blockpruner.inputs.vision import text_config
from blockpruner.model.models import load_model
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
EYES = {
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
    "gemma3": ({"query_pre_attn_scalar": 8}, EYES, {"mm_tokens_per_image": 4}, "Gemma3ForCausalLM"),
    "mistral3": ({}, EYES | {"head_dim": 8}, {"tie_word_embeddings": False}, "MistralForCausalLM"),
    "mistral3 ministral3": ({}, EYES | {"head_dim": 8}, {}, "Ministral3ForCausalLM"),
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


def saved(folder, name):
    """A random model with eyes, in float32, saved."""
    text, eyes, more, _ = MODELS[name]
    kind, _, inner = name.partition(" ")
    parts = {
        "text_config": TEXT | text | ({"model_type": inner} if inner else {}),
        "vision_config": eyes,
    }
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **parts, **more)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_text_model_is_what_the_whole_is_without_pictures(tmp_path, name):
    model, notes = saved(tmp_path / "whole", name), []
    source = LocalModel(source="path", path=str(tmp_path / "whole"), dtype="float32")
    taken = cached_checkpoint(source, tmp_path / "cache", tmp_path / "pins", notes.append)
    assert (
        any("reads pictures" in line for line in notes)
        and not (taken / "preprocessor_config.json").exists()
    )
    config = json.loads((taken / "config.json").read_text())
    assert config["architectures"] == [MODELS[name][3]] and "vision_config" not in config
    told = json.loads(json.dumps(fetch_config(source, tmp_path / "pins")))
    assert told == config
    text = load_model(taken, "float32", "cpu")
    assert type(text).__name__ == MODELS[name][3]
    with torch.no_grad():
        assert torch.equal(text(IDS).logits, model(input_ids=IDS).logits)
    assert count_parameters(config).total == sum(weight.numel() for weight in text.parameters())


def test_weights_by_their_new_names(tmp_path):
    """As in memory, where the first models have other names on disk; with a head that is no
    embedding."""
    model = saved(tmp_path / "whole", "mistral3")
    for path in tmp_path.glob("whole/*.safetensors*"):
        assert path.suffix == ".json" or not any(
            name.startswith("model.language") for name in load_file(path)
        )
        path.unlink()
    save_file(
        model.state_dict(), tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"}
    )
    source = LocalModel(source="path", path=str(tmp_path / "whole"), dtype="float32")
    text = load_model(
        cached_checkpoint(source, tmp_path / "cache", tmp_path / "pins"), "float32", "cpu"
    )
    with torch.no_grad():
        assert torch.equal(text(IDS).logits, model(input_ids=IDS).logits)


def test_other_models_are_not_touched(tmp_path):
    """Whatever their text models are; and one whose weights have other names is refused."""
    assert text_config({"model_type": "idefics3", "text_config": {"model_type": "llama"}}) is None
    saved(tmp_path / "whole", "gemma3")
    for path in tmp_path.glob("whole/*.safetensors*"):
        path.unlink()
    save_file({"model.text_model.layers.0.weight": IDS}, tmp_path / "whole" / "model.safetensors")
    with pytest.raises(InputError, match="no text model by a name that is known"):
        cached_checkpoint(
            LocalModel(source="path", path=str(tmp_path / "whole")),
            tmp_path / "cache",
            tmp_path / "pins",
        )


def test_a_text_model_of_another_family_is_refused(tmp_path):
    folder = tmp_path / "whole"
    saved(folder, "gemma3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"text_config": {"model_type": "gpt2"}})
    )
    with pytest.raises(InputError, match="gemma3"):
        cached_checkpoint(
            LocalModel(source="path", path=str(folder)), tmp_path / "cache", tmp_path / "pins"
        )
