"""The `gguf` export: files for llama.cpp in 16 and in 8 bits, and what llama.cpp's own program
quantizes further.

Decides architecture, names and order of the tensors, and what is refused. If every layer is whole,
the architecture is the family's own; else it is `deci`, whose layers may lack an attention. A layer
without MLP gets one of zeros: where `feed_forward_length` is 0, llama.cpp skips the layer's
attention, too.
"""

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blockpruner.checkpoints import verify_llama_cpp
from blockpruner.checkpoints.card import base_of
from blockpruner.checkpoints.hf import save_other_files
from blockpruner.checkpoints.packing import PackedModel, pack_model, require_fit
from blockpruner.checkpoints.registry import QUANTIZER
from blockpruner.checkpoints.verification import limited, reference_outputs, write_verified
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

TOLERANCE = 1e-3
"""Root mean square error of log probabilities, relative to the largest logit, that is always
accepted. SmolLM2-135M in 16 bits has 1.3e-4, dense or pruned, and 2e-2 where something is wrong."""

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
    plan, dense, trusted = pruning.plan, pruning.dense, pruning.trust_remote_code
    config = read_config(dense, trusted).to_dict()
    require_fit("gguf", config, plan)
    tokenizer = load_tokenizer(dense, trusted)
    (base, is_hub), more = base_of(dense), facts(tokenizer, config)
    words = vocabulary(tokenizer, config) | {"name": plan.target, **licence_of(dense)}
    words |= {"base_model_count": 1, "base_model_name": (0, base)}
    words |= {"base_model_repo_url": (0, f"https://huggingface.co/{base}")} if is_hub else {}

    def note(reduced: PreTrainedModel, reference: Path) -> None:
        narrow = torch.tensor(reduced.dtype != torch.float32)
        save_file(reference_outputs(reduced, plan) | more | {"narrow": narrow}, reference)

    def write_all(directory: Path, reference: Path) -> float:
        model = pruning.load_for_export()
        pruned = pruning.prune_(model, partial(note, reference=reference))
        for precision in verify_llama_cpp.PRECISIONS:
            write(pruned, words, precision, directory / f"model-{precision}.gguf")
        for name in quantizations:
            _quantize(directory, name)
        save_other_files(pruning, directory, "gguf", loading=LOADING, more=())
        return TOLERANCE

    write_verified(out, write_all, verify_llama_cpp)


def require_quantizations(names: Sequence[str]) -> None:
    """Raise InputError for a quantization that llama.cpp has not, or if its program is not here."""
    valid = [
        kind.name.removeprefix("MOSTLY_")
        for kind in LlamaFileType
        if kind.name.startswith("MOSTLY_")
    ]
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
    command = [QUANTIZER, "model-F16.gguf", target := f"model-{name}.gguf", name]
    options: dict[str, Any] = {"text": True, "errors": "replace"}  # it prints tokens
    with limited(QUANTIZER, directory) as seconds:
        result = subprocess.run(
            command, cwd=directory, capture_output=True, check=False, timeout=seconds, **options
        )
    if result.returncode or not (directory / target).is_file():
        said = result.stderr.strip().rpartition("\n")[2] or f"exit code {result.returncode}"
        raise InputError(
            f"export gguf:{name}: {QUANTIZER} failed: {said}. Choose another quantization, or"
            " export gguf"
        )


def facts(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is compared apart from logits: the tokens [T] of a text that ends with a special one,
    and the bytes that an attention caches for each token."""
    text, (_, kv_heads, head) = TEXT + (tokenizer.eos_token or ""), attention_heads(config)
    return {
        "text": torch.tensor(list(text.encode()), dtype=torch.uint8),
        "text_tokens": torch.tensor(tokenizer(text).input_ids),
        "cache_bytes": torch.tensor(2 * 2 * kv_heads * head),
    }


def write(model: PreTrainedModel, words: Mapping[str, Any], precision: str, path: Path) -> None:
    """Write a pruned model as one file. Norms and biases stay in 32 bits; a matrix whose rows are
    no multiple of the quantization's block stays in 16."""
    parts = pack_model(model)
    architecture = WHOLE[model_family(model).model_type] if parts.is_whole else "deci"

    def kind(tensor: Tensor) -> Any:
        wanted = GGMLQuantizationType[precision]
        if tensor.ndim == 1:
            return GGMLQuantizationType.F32
        return GGMLQuantizationType.F16 if tensor.shape[1] % GGML_QUANT_SIZES[wanted][0] else wanted

    writer = GGUFWriter(path, architecture)
    keys = hyperparameters(model.config.to_dict(), parts, architecture) | dict(words)
    keys |= {"file_type": LlamaFileType[f"MOSTLY_{precision}"], "quantization_version": 2}
    for name, value in keys.items():
        getattr(writer, f"add_{name}")(*(value if isinstance(value, tuple) else (value,)))
    for name, tensor in tensors(model, parts, architecture):
        block, size = GGML_QUANT_SIZES[kind(tensor)]
        writer.add_tensor_info(
            name, tensor.shape, None, tensor.numel() // block * size, kind(tensor)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # once more: the whole model is never held twice
    for _, tensor in tensors(model, parts, architecture):
        writer.write_tensor_data(quants.quantize(tensor.float().cpu().numpy(), kind(tensor)))
    writer.close()


def hyperparameters(
    config: Mapping[str, Any], parts: PackedModel, architecture: str
) -> dict[str, Any]:
    """By the name of the `GGUFWriter.add_*` that takes each. `deci` has numbers of heads and widths
    for each layer."""
    (heads, kv_heads, head), rope = attention_heads(config), config["rope_parameters"]
    counts: dict[str, Any] = {
        "head_count": [heads if mha else 0 for mha, _ in parts.layers],
        "head_count_kv": [kv_heads if mha else 0 for mha, _ in parts.layers],
        "feed_forward_length": [width or STUB for width in parts.widths],
    }
    if architecture != "deci":
        counts = {name: values[0] for name, values in counts.items()}
    scaling = {
        "rope_scaling_type": RopeScalingType.LINEAR,
        "rope_scaling_factor": rope.get("factor"),
    }
    return {
        "block_count": len(parts.layers),
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "rope_freq_base": rope["rope_theta"],
        **dict.fromkeys(("rope_dimension_count", "key_length", "value_length"), head),
        **counts,
        **(scaling if rope["rope_type"] == "linear" else {}),
    }


def tensors(
    model: PreTrainedModel, parts: PackedModel, architecture: str
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights in llama.cpp's form."""
    family, config = model_family(model), model.config
    query_heads, kv_heads, head = attention_heads(config.to_dict())
    heads = {"q_proj": query_heads, "k_proj": kv_heads}
    yield "token_embd.weight", parts.embedding
    yield "output_norm.weight", model.get_decoder().norm.weight
    if parts.head is not None:
        yield "output.weight", parts.head
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head, 2) / head)
        yield (
            "rope_freqs.weight",
            plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0],
        )
    for n, layer in enumerate(parts.layers):
        for source, branch, norm in zip(
            layer, (family.mha, family.mlp), ("attn_norm", "ffn_norm"), strict=True
        ):
            if source is None:
                continue
            yield f"blk.{n}.{norm}.weight", getattr(source, str(branch.norm)).weight
            for name, weight in getattr(source, branch.module).named_parameters():
                projection, part = name.split(".")
                if projection in heads and architecture != "qwen2":
                    weight = _interleaved(weight, heads[projection])
                yield f"blk.{n}.{NAMES[projection]}.{part}", weight
        if layer[1] is None:
            yield f"blk.{n}.ffn_norm.weight", torch.ones(config.hidden_size)
            wide, high = (STUB, config.hidden_size), (config.hidden_size, STUB)
            for name, shape in (("gate", wide), ("up", wide), ("down", high)):
                yield f"blk.{n}.ffn_{name}.weight", torch.zeros(shape)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys [heads x d, ...] in the order of llama.cpp's `llama` and `deci`. The
    two numbers that a rotation mixes are neighbours there; in transformers they are half a head
    apart."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
