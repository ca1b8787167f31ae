"""Verification of a checkpoint by transformers, in a fresh process that knows nothing of blockpruner.

Run as a script: `python verify.py <checkpoint> <reference.safetensors> <tolerance>`. It prints one JSON object, and
exits 0 if the checkpoint agrees with the masked dense model, 1 if not. It imports torch and transformers alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

ENGINE = "transformers"
"""The Python module that runs the checkpoint."""


@torch.inference_mode()
def stepped(model: PreTrainedModel, tokens: torch.Tensor, prompt: int) -> tuple[torch.Tensor, Any]:
    """Logits [B, T, V] of tokens [B, T], the first `prompt` at once, then one by one; and the KV cache."""
    out = model(tokens[:, :prompt], use_cache=True)
    logits = [out.logits]
    for position in range(prompt, tokens.shape[1]):
        out = model(tokens[:, position : position + 1], cache=out.cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), out.cache


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, object]:
    """Compare with the reference: logits of prompt and greedy continuation in one pass, the same fed token by token
    through the KV cache, greedy tokens, and the attentions that hold a cache.

    No logit through the cache may differ by more than the tolerance from the reference's own through the cache. At half
    the positions, none may differ from those of one pass: elsewhere rounding may choose another expert of a mixture.
    Tokens are reported but not required: in low precision or on another device, a near-tie may fall the other way.
    """
    reference = load_file(reference_file)
    tokens, expected = reference["tokens"], reference["logits"].double()
    experts = "eager" if reference["logits"].dtype is torch.float64 else None  # the usual one knows no float64
    has_code = any(Path(checkpoint).glob("*.py"))  # the caller has seen that it is its own
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=has_code, dtype="auto", local_files_only=True, experts_implementation=experts
    ).eval()
    prompt = int(reference["prompt"])
    new = tokens.shape[1] - prompt
    with torch.inference_mode():
        whole = model(tokens, use_cache=False).logits.double()
        cached, cache = stepped(model, tokens, prompt)
        ids = tokens[:, :prompt]
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    differences = {
        "max_logit_difference": (whole - expected).abs().max().item(),
        "max_logit_difference_cached": (cached.double() - reference["cached"].double()).abs().max().item(),
        "median_logit_difference_of_cached_to_whole": (cached.double() - expected).abs().amax(-1).median().item(),
    }
    limit = tolerance * max(1.0, expected.abs().max().item())
    attentions = int(reference["attentions"])
    held = len([layer for layer in cache.layers if layer.is_initialized])
    return {
        "engine": ENGINE,
        **differences,
        "tolerance": limit,
        "greedy_tokens_equal": torch.equal(greedy, tokens),
        "cache_layers": len(cache.layers),
        "cache_layers_expected": attentions,
        "class": type(model).__name__,
        "blockpruner_imported": "blockpruner" in sys.modules,
        "ok": all(difference <= limit for difference in differences.values())
        and held == len(cache.layers) == attentions
        and "blockpruner" not in sys.modules,
    }


if __name__ == "__main__":
    report = verify(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
