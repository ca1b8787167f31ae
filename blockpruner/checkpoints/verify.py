"""Verification of a checkpoint by transformers, in a fresh process that knows nothing of
blockpruner.

Run as a script: `python verify.py <checkpoint> <reference.safetensors> <tolerance>`. It prints one
JSON object, and exits 0 if the checkpoint agrees with the masked dense model, 1 if not. It imports
torch and transformers alone.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

ENGINE = "transformers"
"""The Python module that runs the checkpoint."""


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Within, these compute in float32, unless they are of float64: 16 bits may be a hundred times
    as slow on a CPU. Weights keep their dtype: each module has its own as float32 while it runs, so
    a model never lies in memory so wide. So has it those of its convolutions, which linear
    attentions read themselves.
    """

    def read(module: nn.Module) -> list[nn.Module]:
        return [module, *(child for child in module.children() if isinstance(child, nn.Conv1d))]

    def run(module: nn.Module, *inputs: Any, **named: Any) -> Any:
        owners = [(part, dict(part._parameters)) for part in read(module)]
        for part, own in owners:
            wide = {
                name: nn.Parameter(weight.float(), False)
                for name, weight in own.items()
                if weight is not None
            }
            part._parameters.update(wide)
        try:
            return type(module).forward(module, *inputs, **named)
        finally:
            for part, own in owners:
                part._parameters.update(own)

    parts = [part for model in models for part in model.modules()]
    chosen = [
        part
        for part in parts
        if any(weight.dtype is not torch.float64 for weight in part.parameters(False))
    ]
    for module in chosen:
        module.forward = partial(run, module)
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


@torch.inference_mode()
def stepped(
    model: PreTrainedModel, tokens: Tensor, prompt: int, length: int
) -> tuple[Tensor, Tensor, Any]:
    """Logits [B, length, V], the first `prompt` tokens at once, then one by one; all tokens [B,
    length], those behind the given ones [B, T] the likeliest; and the KV cache."""
    out = model(tokens[:, :prompt], use_cache=True)
    logits = [out.logits]
    for position in range(prompt, length):
        if position == tokens.shape[1]:
            tokens = torch.cat([tokens, out.logits[:, -1:].argmax(-1)], dim=1)
        out = model(tokens[:, position : position + 1], cache=out.cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), tokens, out.cache


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, object]:
    """Compare with the reference: logits of prompt and greedy continuation in one pass, the same
    fed token by token through the KV cache, greedy tokens, and the attentions that hold a cache.

    No logit through the cache may differ by more than the tolerance from the reference's own
    through the cache. At half the positions, none may differ from those of one pass: elsewhere
    rounding may choose another expert of a mixture. Tokens are reported but not required: on
    another device, a near-tie may fall the other way.
    """
    reference = load_file(reference_file)
    tokens, expected = reference["tokens"], reference["logits"].double()
    # the usual one knows no float64
    experts = "eager" if reference["logits"].dtype is torch.float64 else None
    has_code = any(Path(checkpoint).glob("*.py"))  # the caller has seen that it is its own
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        trust_remote_code=has_code,
        dtype="auto",
        local_files_only=True,
        experts_implementation=experts,
    ).eval()
    prompt, length = int(reference["prompt"]), tokens.shape[1]
    new = length - prompt
    with torch.inference_mode(), in_float32(model):
        whole = model(tokens, use_cache=False).logits.double()
        cached, _, cache = stepped(model, tokens, prompt, length)
        ids = tokens[:, :prompt]
        greedy = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,  # else it would not be chosen
        )
    differences = {
        "max_logit_difference": (whole - expected).abs().max().item(),
        "max_logit_difference_cached": (
            (cached.double() - reference["cached"].double()).abs().max().item()
        ),
        "median_logit_difference_of_cached_to_whole": (
            (cached.double() - expected).abs().amax(-1).median().item()
        ),
    }
    limit = tolerance * max(1.0, expected.abs().max().item())
    attentions = int(reference["attentions"])
    grow = [layer for layer in cache.layers if getattr(layer, "is_initialized", False)]
    states = [
        layer for layer in cache.layers if any(getattr(layer, "has_previous_state", {}).values())
    ]
    held = len(grow) + len(states)
    spare = int(bool(states) and not grow)  # a slot that stays empty (`cache_config`)
    return {
        "engine": ENGINE,
        **differences,
        "tolerance": limit,
        "greedy_tokens_equal": torch.equal(greedy, tokens),
        "cache_layers": len(cache.layers) - spare,
        "cache_layers_expected": attentions,
        "class": type(model).__name__,
        "blockpruner_imported": "blockpruner" in sys.modules,
        "ok": (
            all(difference <= limit for difference in differences.values())
            and held == len(cache.layers) - spare == attentions
            and "blockpruner" not in sys.modules
        ),
    }


if __name__ == "__main__":
    logging.disable_progress_bar()
    report = verify(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
