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
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from blockpruner.checkpoints import verify_mlx
from blockpruner.checkpoints.hf import save_other_files
from blockpruner.checkpoints.packing import PackedModel, pack_model, require_fit
from blockpruner.checkpoints.registry import NARROW
from blockpruner.checkpoints.verification import load_pruned, write_verified
from blockpruner.core.plan import Plan
from blockpruner.methods.apply import Pruning
from blockpruner.model import configuration_decilm
from blockpruner.model.classes import read_config
from blockpruner.model.models import model_family
from blockpruner.store.files import let_others_read, write_json

TOLERANCE, TOLERANCE_ROUNDED = 5e-4, 0.15
"""Largest logit difference between mlx-lm and the masked model, both in float32, relative to the
largest logit. The second is for files with rounded weights (an embedding folded in bf16 or fp16).
Measured on SmolLM2-135M: at most 1.2e-4, and medians of 0.01 to 0.04 if rounded."""

CODE = Path(configuration_decilm.__file__)
"""The config's class, for vLLM and others that take configs from transformers."""

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
"""The fields that are copied from the family's config."""


def export_nas(pruning: Pruning, out: Path) -> None:
    config = read_config(pruning.dense, pruning.trust_remote_code)
    # Readers compute the width of a head from the width of the model.
    width = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width
    require_fit(
        "nas",
        config.to_dict(),
        pruning.plan,
        dtype=(pruning.dtype, NARROW),
        head_dim=(head_dim, (width,)),
    )

    def write(directory: Path, reference: Path) -> float:
        pruned = load_pruned(pruning, reference)
        packed = pack_model(pruned)
        exact_weights = nas_weights(pruned, packed)
        dtype = getattr(torch, pruning.dtype)
        weights = {name: weight.to(dtype) for name, weight in exact_weights.items()}
        is_exact = all(torch.equal(weights[name], exact_weights[name]) for name in weights)
        write_json(directory / "config.json", nas_config(pruned, packed) | {"dtype": pruning.dtype})
        save_torch_state_dict(weights, directory, max_shard_size="5GB")
        let_others_read(directory)
        shutil.copyfile(CODE, directory / CODE.name)
        parameters = sum(weight.numel() for weight in weights.values())
        save_other_files(pruning, directory, "nas", loading=_loading(pruning.plan, parameters))
        return TOLERANCE if is_exact else TOLERANCE_ROUNDED

    write_verified(out, write, verify_mlx)


def nas_config(model: PreTrainedModel, packed: PackedModel) -> dict[str, Any]:
    """config.json: Llama's fields, and `block_configs`, which lists the blocks of each layer."""
    config = model.config.to_dict()
    rope = config["rope_parameters"]
    result = {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE.stem}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        **{field: config[field] for field in FIELDS},
        "num_hidden_layers": len(packed.layers),
        "rope_parameters": rope,
        # mlx-lm reads it here.
        "rope_theta": rope["rope_theta"],
    }
    if rope["rope_type"] != "default":
        scaling = dict(rope)
        del scaling["rope_theta"]
        result["rope_scaling"] = scaling
    heads_in_group = config["num_attention_heads"] // config["num_key_value_heads"]
    block_configs = []
    for (mha, mlp), width in zip(packed.layers, packed.widths, strict=True):
        # Readers compute the width as 2/3 * ffn_mult * hidden_size.
        ffn_mult = 3 * (width + _missing_width(width)) / (2 * config["hidden_size"])
        attention = _block_config(mha, "n_heads_in_group", heads_in_group)
        ffn = _block_config(mlp, "ffn_mult", ffn_mult)
        block_configs.append({"attention": attention, "ffn": ffn})
    return {
        **result,
        "attention_bias": _has_bias(model),
        "mlp_bias": config.get("mlp_bias", False),
        "tie_word_embeddings": packed.head is None,
        "block_configs": block_configs,
    }


def nas_weights(model: PreTrainedModel, packed: PackedModel) -> dict[str, Tensor]:
    """The weights by their names in the file."""
    family = model_family(model)
    final_norm = model.model.norm.weight
    weights = {
        "model.embed_tokens.weight": packed.embedding,
        "model.norm.weight": final_norm,
    }
    if packed.head is not None:
        weights["lm_head.weight"] = packed.head
    for index, (mha, mlp) in enumerate(packed.layers):
        prefix = f"model.layers.{index}"
        for layer, branch in ((mha, family.mha), (mlp, family.mlp)):
            if layer is None:
                continue
            for module in (branch.module, *branch.norms):
                for name, weight in layer.get_submodule(module).state_dict().items():
                    weight = _padded(name, weight, _missing_width(packed.widths[index]))
                    weights[f"{prefix}.{module}.{name}"] = weight
        # With `attention_bias`, readers expect a bias of the output projection. Qwen2 has none.
        if mha is not None and _has_bias(model):
            zeros = final_norm.new_zeros(model.config.hidden_size)
            weights.setdefault(f"{prefix}.self_attn.o_proj.bias", zeros)
    return weights


def _block_config(layer: object, size_key: str, size: float) -> dict[str, Any]:
    """The config of a block; without a layer, of no block."""
    is_removed = layer is None
    return {
        "no_op": is_removed,
        "replace_with_linear": False,
        size_key: None if is_removed else size,
    }


def _has_bias(model: PreTrainedModel) -> bool:
    if model_family(model).model_type == "qwen2":
        return True
    return bool(getattr(model.config, "attention_bias", False))


def _missing_width(width: int) -> int:
    """The columns by which an MLP is too narrow for the format."""
    return -width % MULTIPLE


def _padded(name: str, weight: Tensor, missing: int) -> Tensor:
    """A weight, padded by `missing` zeros if it is of an MLP: they add nothing to its output."""
    if missing and name == "down_proj.weight":
        return pad(weight, (0, missing))
    if missing and name.startswith(("gate_proj", "up_proj")):
        # `pad` begins with the last dimension; the width is the first one.
        return pad(weight, (*[0, 0] * (weight.dim() - 1), 0, missing))
    return weight


def _loading(plan: Plan, parameters: int) -> str:
    extra = parameters - plan.parameters["pruned"]
    note = f"""
The files hold {parameters:,} parameters, {extra:,} more than the model has: zeros where the
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
{note if extra else ""}"""
