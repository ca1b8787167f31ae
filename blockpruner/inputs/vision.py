"""Checkpoints that also read pictures: their text model is taken out when they are fetched, and the
rest is lost.

Decides what the config and the weights of the text model are, so that it is a plain model of a
family of ours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES
from blockpruner.store.files import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = ("gemma3", "mistral3", "qwen3_vl", "qwen3_5", "qwen3_5_moe")
"""The `model_type` of models whose text model is taken out."""

RENAMED = {"qwen3_vl_text": "qwen3"}
"""Text models that compute what another family does where there are no pictures. Qwen3-VL counts a
token's position in three ways, and these are then alike."""

PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
"""Where the text model's weights are, in old and in new files, and their names in the text model
alone."""

HEAD = "lm_head.weight"
PICTURES = ("processor_config.json", "preprocessor_config.json")


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json of the text model of a model that has more; None for any other, and for families
    unknown here. Whether embeddings and head are one is as the config says, and else as is usual
    for the family."""
    nested = config.get("text_config") if config.get("model_type") in WHOLE else None
    if not isinstance(nested, dict):
        return None
    nested_type = str(nested.get("model_type"))
    model_type = RENAMED.get(nested_type, nested_type)
    if model_type not in FAMILIES:
        return None
    from transformers import AutoConfig

    family = FAMILIES[model_type]
    fields = AutoConfig.for_model(**nested).to_dict()
    if model_type != nested_type:
        # Without pictures the multimodal positions (mrope) are plain ones.
        rotary = {
            key: value
            for key, value in fields["rope_parameters"].items()
            if not key.startswith("mrope")
        }
        names = AutoConfig.for_model(model_type).to_dict().keys()
        fields = {key: value for key, value in fields.items() if key in names}
        fields["rope_parameters"] = rotary
    for key in ("dtype", "torch_dtype", "quantization_config"):
        if key in config:
            fields[key] = config[key]
    is_tied = False
    for values in (family.defaults, nested, config):
        is_tied = values.get("tie_word_embeddings", is_tied)
    return {
        **fields,
        "model_type": model_type,
        "architectures": [f"{family.prefix}ForCausalLM"],
        "tie_word_embeddings": is_tied,
    }


def take_text_(directory: Path) -> bool:
    """Rewrite a checkpoint directory to its text model, in place; returns whether there was more in
    it. Raises InputError if its weights have other names than those known."""
    config = text_config(read_json(directory / "config.json"))
    if config is None:
        return False
    from blockpruner.inputs.weights import rewrite_weights_, weight_names  # loads torch

    names = [_name(name) for name in weight_names(directory)]
    if not any(name is not None and ".layers." in name for name in names):
        raise InputError(
            "the model's files hold no text model by a name that is known; fetch it whole"
        )
    if HEAD not in names:
        config["tie_word_embeddings"] = True

    def change(name: str, tensor: "Tensor") -> "dict[str, Tensor]":
        new = _name(name)
        return (
            {} if new is None or (new == HEAD and config["tie_word_embeddings"]) else {new: tensor}
        )

    rewrite_weights_(directory, change)
    write_json(directory / "config.json", config)
    for name in PICTURES:
        (directory / name).unlink(missing_ok=True)
    return True


def _name(name: str) -> str | None:
    """A weight's name in the text model; None if it is no part of that."""
    for prefix, new in PREFIXES.items():
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return None
