"""The `nas` export: a DeciLM (`nemotron-nas`) directory, whose layers may lack a block, for mlx-lm.

Decides how a pruned model is written in that format, and which models fit it. The directory also
holds the files of the hf export, and `verification.json` from mlx-lm in a fresh process. A
directory that failed does not exist.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from blockpruner.checkpoints import verify_mlx
from blockpruner.checkpoints.hf import save_other_files
from blockpruner.checkpoints.packing import PackedModel, pack_model, require_fit
from blockpruner.checkpoints.registry import NARROW
from blockpruner.checkpoints.verification import reference_outputs, write_verified
from blockpruner.core.plan import Plan
from blockpruner.methods.apply import Pruning
from blockpruner.model import configuration_decilm
from blockpruner.model.classes import read_config
from blockpruner.model.models import model_family
from blockpruner.store.files import let_others_read, write_json

TOLERANCE, TOLERANCE_ROUNDED = 5e-4, 0.15
"""Largest logit difference between mlx-lm and the masked model, both in float32, relative to the
largest logit; the second is for files with rounded weights (an embedding folded in 16 bits). Seen
on SmolLM2-135M: at most 1.2e-4, and medians of 0.01 to 0.04 if rounded."""

CODE = Path(configuration_decilm.__file__)
"""The config's class, for vLLM and others that take configs from transformers; mlx-lm needs
none."""

MULTIPLE = 256
"""The width of an MLP must be a multiple of it: readers compute the width from `ffn_mult` and round
up."""

FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What the config takes over from the family's config."""


def export_nas(pruning: Pruning, out: Path) -> None:
    plan, dense = pruning.plan, pruning.dense
    config = read_config(dense, pruning.trust_remote_code)
    width = config.hidden_size // config.num_attention_heads
    head = getattr(config, "head_dim", None) or width
    require_fit(
        "nas", config.to_dict(), plan, dtype=(pruning.dtype, NARROW), head_dim=(head, (width,))
    )
    narrow = getattr(torch, pruning.dtype)

    def write(directory: Path, reference: Path) -> float:
        model = pruning.load_for_export()
        pruned = pruning.prune_(
            model, lambda reduced: save_file(reference_outputs(reduced, plan), reference)
        )
        blocks = pack_model(pruned)
        wide = nas_weights(pruned, blocks)
        weights = {name: weight.to(narrow) for name, weight in wide.items()}
        is_exact = all(torch.equal(weight, wide[name]) for name, weight in weights.items())
        write_json(directory / "config.json", nas_config(pruned, blocks) | {"dtype": pruning.dtype})
        save_torch_state_dict(weights, directory, max_shard_size="5GB")
        let_others_read(directory)
        held = sum(weight.numel() for weight in weights.values())
        shutil.copyfile(CODE, directory / CODE.name)
        save_other_files(pruning, directory, "nas", loading=_loading(plan, held))
        return TOLERANCE if is_exact else TOLERANCE_ROUNDED

    write_verified(out, write, verify_mlx)


def nas_config(model: PreTrainedModel, blocks: PackedModel) -> dict[str, Any]:
    """config.json: Llama's fields, and `block_configs`, which lists the blocks of each layer."""
    config = model.config.to_dict()
    rope = config["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    wide = [3 * (width + _missing(width)) / (2 * config["hidden_size"]) for width in blocks.widths]
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE.stem}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        **{field: config[field] for field in FIELDS},
        "num_hidden_layers": len(blocks.layers),
        "rope_parameters": rope,
        # where mlx-lm looks for it
        "rope_theta": rope["rope_theta"],
        **({} if rope["rope_type"] == "default" else {"rope_scaling": scaling}),
        "attention_bias": _has_bias(model),
        "mlp_bias": config.get("mlp_bias", False),
        "tie_word_embeddings": blocks.head is None,
        "block_configs": [
            {"attention": _block(mha, n_heads_in_group=group), "ffn": _block(mlp, ffn_mult=size)}
            for (mha, mlp), size in zip(blocks.layers, wide, strict=True)
        ],
    }


def nas_weights(model: PreTrainedModel, blocks: PackedModel) -> dict[str, Tensor]:
    """The weights by their names in the file. MLPs are padded to a multiple of 256 with zeros,
    which add nothing. With `attention_bias`, readers expect a bias of the output projection too.
    Qwen2 has none: it is zero."""
    family = model_family(model)
    result = {
        "model.embed_tokens.weight": blocks.embedding,
        "model.norm.weight": model.model.norm.weight,
    }
    if blocks.head is not None:
        result["lm_head.weight"] = blocks.head
    for number, (layers, width) in enumerate(zip(blocks.layers, blocks.widths, strict=True)):
        for layer, branch in zip(layers, (family.mha, family.mlp), strict=True):
            if layer is None:
                continue
            for name in (branch.module, *branch.norms):
                for key, weight in getattr(layer, name).state_dict().items():
                    result[f"model.layers.{number}.{name}.{key}"] = _padded(
                        key, weight, _missing(width)
                    )
        if layers[0] is not None and _has_bias(model):
            name = f"model.layers.{number}.self_attn.o_proj.bias"
            result.setdefault(name, model.model.norm.weight.new_zeros(model.config.hidden_size))
    return result


def _block(layer: object, **size: float) -> dict[str, Any]:
    """The config of a block, which no layer may hold."""
    return {"no_op": layer is None, "replace_with_linear": False} | (
        dict.fromkeys(size) if layer is None else size
    )


def _has_bias(model: PreTrainedModel) -> bool:
    return model_family(model).model_type == "qwen2" or bool(
        getattr(model.config, "attention_bias", False)
    )


def _missing(width: int) -> int:
    """Columns by which an MLP is too narrow for the format."""
    return -width % MULTIPLE


def _padded(key: str, weight: Tensor, missing: int) -> Tensor:
    if missing and key == "down_proj.weight":
        return pad(weight, (0, missing))
    if missing and key.startswith(("gate_proj", "up_proj")):
        return pad(weight, (*[0, 0] * (weight.dim() - 1), 0, missing))
    return weight


def _loading(plan: Plan, held: int) -> str:
    pruned = plan.parameters["pruned"]
    more = f"""
The files hold {held:,} parameters, {held - pruned:,} more than the model has: zeros where the
format wants them (MLP widths that are a multiple of {MULTIPLE}, biases), and a head of its own
where leading MLPs are folded into the embedding.
"""
    return f"""The format is DeciLM's (`nemotron-nas`), whose layers may lack a block.

```sh
mlx_lm.generate --model <this directory> --prompt "..."
# reads `{CODE.name}` beside this card, and needs no plugin
vllm serve <this directory> --trust-remote-code
```

transformers has no model for it; the `hf` export of the same plan has.
{more if held != pruned else ""}"""
