"""Verification of a checkpoint in a fresh process that knows nothing of blockpruner.

Run as a script: `python verify.py <checkpoint> <reference.safetensors> <tolerance>`; prints one JSON object and
exits 0 if the checkpoint agrees with the masked dense model, 1 if not. Imports only torch and transformers.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, object]:
    """Compare with the reference: logits, greedy tokens with and without KV cache, attentions in the cache."""
    reference = load_file(reference_file)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, dtype="auto", local_files_only=True
    ).eval()
    ids, tokens = reference["input_ids"], reference["tokens"]
    new = tokens.shape[1] - ids.shape[1]
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask).logits.double()
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
        uncached = model.generate(ids, attention_mask=mask, use_cache=False, **options)
        cache = model(ids, attention_mask=mask, use_cache=True).cache
    difference = (logits - reference["logits"].double()).abs().max().item()
    held = len([layer for layer in cache.layers if layer.is_initialized])
    result: dict[str, object] = {
        "max_logit_difference": difference,
        "tolerance": tolerance * max(1.0, reference["logits"].abs().max().item()),
        "greedy_tokens_equal": torch.equal(cached, tokens),
        "cached_equals_uncached": torch.equal(cached, uncached),
        "cache_layers": len(cache.layers),
        "cache_layers_expected": int(reference["attentions"]),
        "class": type(model).__name__,
        "blockpruner_imported": "blockpruner" in sys.modules,
    }
    result["ok"] = (
        difference <= float(str(result["tolerance"]))
        and bool(result["greedy_tokens_equal"] and result["cached_equals_uncached"])
        and held == len(cache.layers) == result["cache_layers_expected"]
        and not result["blockpruner_imported"]
    )
    return result


if __name__ == "__main__":
    report = verify(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
