"""The `gguf` export: files for llama.cpp in F16 and Q8_0, and further quantizations by llama.cpp's
own program.

Decides architecture, names and order of the tensors, and what is refused. If every layer is whole,
the architecture is the family's own; else it is `deci`, whose layers may lack an attention. A layer
without MLP gets one of zeros: where `feed_forward_length` is 0, llama.cpp skips the layer's
attention, too.
"""

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blockpruner.checkpoints import verify_llama_cpp
from blockpruner.checkpoints.card import base_of
from blockpruner.checkpoints.hf import save_other_files
from blockpruner.checkpoints.packing import PackedModel, pack_model, require_fit
from blockpruner.checkpoints.registry import QUANTIZER
from blockpruner.checkpoints.verification import limited, load_pruned, write_verified
from blockpruner.checkpoints.vocabulary import vocabulary
from blockpruner.core.errors import InputError, extra
from blockpruner.core.families import attention_heads
from blockpruner.inputs.checkpoints import licence_of
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.apply import Pruning
from blockpruner.model.classes import read_config
from blockpruner.model.models import model_family

with extra("gguf"):
    from gguf import (
        GGML_QUANT_SIZES,
        GGMLQuantizationType,
        GGUFWriter,
        LlamaFileType,
        RopeScalingType,
        quants,
    )

WHOLE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""By family: llama.cpp's architecture of a model whose layers are all whole."""

NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}

NORMS = ("attn_norm", "ffn_norm")

TOLERANCE = 1e-3
"""Root mean square error of log probabilities, relative to the largest logit, that is always
accepted. SmolLM2-135M in F16 has 1.3e-4, dense or pruned, and 2e-2 where something is wrong."""

STUB = 32
"""Width of an MLP of zeros: one block of llama.cpp's quantizations."""

TEXT = """It's 1984, and we'll pay $3.50 for 1234567 items (that's 12%!).
    def f(x):\treturn {"a": x ** 2}  # indented

Zażółć gęślą jaźń, ça va? Ещё раз: 你好，世界 🙂👩‍💻 ½ co-op's   end  """
"""Contractions, digits, runs of blanks, several scripts: what tokenizers split differently. It has
no adjacent capitals beyond ASCII: llama.cpp and Mistral's tokenizers split them differently."""

LOADING = """```sh
llama-cli -m model-Q8_0.gguf
```

`model-F16.gguf` is the same in 16 bits, from which
`llama-quantize model-F16.gguf model-Q4_K_M.gguf Q4_K_M` makes smaller ones.
"""


def export_gguf(pruning: Pruning, out: Path, quantizations: Sequence[str] = ()) -> None:
    """Write the pruned model as GGUF files; `quantizations` are more files, by llama.cpp's names,
    for instance Q4_K_M (`require_quantizations`)."""
    config = read_config(pruning.dense, pruning.trust_remote_code).to_dict()
    require_fit("gguf", config, pruning.plan)
    tokenizer = load_tokenizer(pruning.dense, pruning.trust_remote_code)
    metadata = {
        **vocabulary(tokenizer, config),
        "name": pruning.plan.target,
        **licence_of(pruning.dense),
        **_base_metadata(pruning.dense),
    }

    def write_all(directory: Path, reference: Path) -> float:
        pruned = load_pruned(pruning, reference, **facts(tokenizer, config))
        for precision in verify_llama_cpp.PRECISIONS:
            write(pruned, metadata, precision, directory / f"model-{precision}.gguf")
        for name in quantizations:
            _quantize(directory, name)
        save_other_files(pruning, directory, "gguf", patterns=(), loading=LOADING)
        return TOLERANCE

    write_verified(out, write_all, verify_llama_cpp)


def _base_metadata(dense: Path) -> dict[str, Any]:
    base, is_hub = base_of(dense)
    metadata: dict[str, Any] = {
        "base_model_count": 1,
        "base_model_name": (0, base),
    }
    if is_hub:
        metadata["base_model_repo_url"] = (0, f"https://huggingface.co/{base}")
    return metadata


def require_quantizations(names: Sequence[str]) -> None:
    """Raise InputError for an unknown quantization, or if llama.cpp's program is not installed."""
    kinds = [kind.name for kind in LlamaFileType]
    valid = [name.removeprefix("MOSTLY_") for name in kinds if name.startswith("MOSTLY_")]
    for name in names:
        if name not in valid:
            raise InputError(
                f"export gguf:{name}: the quantization is unknown; valid: {', '.join(valid)}"
            )
        if shutil.which(QUANTIZER) is None:
            raise InputError(
                f"export gguf:{name} needs llama.cpp's program {QUANTIZER}, which is not on PATH;"
                " install llama.cpp (https://github.com/ggml-org/llama.cpp), or export gguf, whose"
                " model-F16.gguf it reads later"
            )


def _quantize(directory: Path, name: str) -> None:
    target = f"model-{name}.gguf"
    with limited(QUANTIZER, directory) as seconds:
        result = subprocess.run(
            [QUANTIZER, "model-F16.gguf", target, name],
            cwd=directory,
            capture_output=True,
            check=False,
            text=True,
            # It prints tokens, which may be parts of characters.
            errors="replace",
            timeout=seconds,
        )
    if result.returncode or not (directory / target).is_file():
        last_line = result.stderr.strip().rpartition("\n")[2]
        reason = last_line or f"exit code {result.returncode}"
        raise InputError(
            f"export gguf:{name}: {QUANTIZER} failed: {reason}. Choose another quantization, or"
            " export gguf"
        )


def facts(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The reference apart from logits: the tokens [T] of a text that ends with a special one, and
    the bytes that an attention caches for each token."""
    text = TEXT + (tokenizer.eos_token or "")
    text_bytes = list(text.encode())
    _, kv_heads, head_dim = attention_heads(config)
    return {
        "text": torch.tensor(text_bytes, dtype=torch.uint8),
        "text_tokens": torch.tensor(tokenizer(text).input_ids),
        # keys and values, of two bytes
        "cache_bytes": torch.tensor(2 * 2 * kv_heads * head_dim),
    }


def write(model: PreTrainedModel, metadata: Mapping[str, Any], precision: str, path: Path) -> None:
    """Write a pruned model as one file. `metadata` is by the name of the `GGUFWriter.add_*` that
    takes each value, or tuple of values."""
    packed = pack_model(model)
    architecture = "deci"
    if packed.is_whole:
        architecture = WHOLE[model_family(model).model_type]
    writer = GGUFWriter(path, architecture)
    values = hyperparameters(model.config.to_dict(), packed, architecture)
    values.update(metadata)
    values["file_type"] = LlamaFileType[f"MOSTLY_{precision}"]
    values["quantization_version"] = 2
    for name, value in values.items():
        arguments = value if isinstance(value, tuple) else (value,)
        getattr(writer, f"add_{name}")(*arguments)
    # The file begins with the sizes of all tensors. The tensors are made a second time for their
    # content, so that the whole model is never held twice.
    for name, tensor in tensors(model, packed, architecture):
        kind = _quantization(tensor, precision)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        size = tensor.numel() // block_size * block_bytes
        writer.add_tensor_info(name, tensor.shape, None, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors(model, packed, architecture):
        array = tensor.float().cpu().numpy()
        kind = _quantization(tensor, precision)
        writer.write_tensor_data(quants.quantize(array, kind))
    writer.close()


def _quantization(tensor: Tensor, precision: str) -> Any:
    """The type of a tensor in a file of some precision."""
    if tensor.ndim == 1:
        # llama.cpp wants norms and biases in fp32.
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[precision]
    block_size, _ = GGML_QUANT_SIZES[kind]
    # A row must hold whole blocks.
    if tensor.shape[1] % block_size:
        return GGMLQuantizationType.F16
    return kind


def hyperparameters(
    config: Mapping[str, Any], packed: PackedModel, architecture: str
) -> dict[str, Any]:
    """By the name of the `GGUFWriter.add_*` that takes each. `deci` has numbers of heads and widths
    for each layer."""
    heads, kv_heads, head_dim = attention_heads(config)
    rope = config["rope_parameters"]
    has_attention = [layer is not None for layer, _ in packed.layers]
    counts: dict[str, Any] = {
        "head_count": [heads * is_present for is_present in has_attention],
        "head_count_kv": [kv_heads * is_present for is_present in has_attention],
        "feed_forward_length": [width or STUB for width in packed.widths],
    }
    if architecture != "deci":
        counts = {name: counts_by_layer[0] for name, counts_by_layer in counts.items()}
    values = {
        "block_count": len(packed.layers),
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "rope_freq_base": rope["rope_theta"],
        "rope_dimension_count": head_dim,
        "key_length": head_dim,
        "value_length": head_dim,
        **counts,
    }
    if rope["rope_type"] == "linear":
        values["rope_scaling_type"] = RopeScalingType.LINEAR
        values["rope_scaling_factor"] = rope.get("factor")
    return values


def tensors(
    model: PreTrainedModel, packed: PackedModel, architecture: str
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights in llama.cpp's form."""
    yield "token_embd.weight", packed.embedding
    yield "output_norm.weight", model.get_decoder().norm.weight
    if packed.head is not None:
        yield "output.weight", packed.head
    if model.config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _rope_factors(model.config)
    family = model_family(model)
    branches = (family.mha, family.mlp)
    heads, kv_heads, _ = attention_heads(model.config.to_dict())
    # llama.cpp rotates `qwen2` as transformers does.
    rotated = {}
    if architecture != "qwen2":
        rotated = {"q_proj": heads, "k_proj": kv_heads}
    for index, blocks in enumerate(packed.layers):
        prefix = f"blk.{index}"
        for layer, branch, norm in zip(blocks, branches, NORMS, strict=True):
            if layer is None:
                continue
            yield f"{prefix}.{norm}.weight", layer.get_parameter(f"{branch.norm}.weight")
            module = layer.get_submodule(branch.module)
            for name, weight in module.state_dict().items():
                projection, parameter = name.split(".")
                if projection in rotated:
                    weight = _interleaved(weight, rotated[projection])
                yield f"{prefix}.{NAMES[projection]}.{parameter}", weight
        if blocks[1] is None:
            width = model.config.hidden_size
            yield f"{prefix}.ffn_norm.weight", torch.ones(width)
            yield f"{prefix}.ffn_gate.weight", torch.zeros(STUB, width)
            yield f"{prefix}.ffn_up.weight", torch.zeros(STUB, width)
            yield f"{prefix}.ffn_down.weight", torch.zeros(width, STUB)


def _rope_factors(config: Any) -> Tensor:
    """By how much Llama 3 slows each rotation down, [head_dim / 2]."""
    _, _, head_dim = attention_heads(config.to_dict())
    exponents = torch.arange(0, head_dim, 2) / head_dim
    plain_frequencies = config.rope_parameters["rope_theta"] ** -exponents
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return cast(Tensor, plain_frequencies / frequencies)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys [heads x d, ...] in the order of llama.cpp's `llama` and `deci`. The
    two numbers that a rotation mixes are neighbours there; in transformers they are half a head
    apart."""
    halves = weight.view(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
