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

ENGINE = "transformers"
"""The Python module that is asked."""


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, object]:
    """Compare with the reference: logits of prompt and greedy continuation in one pass, the same fed token by token
    through the KV cache, greedy tokens, and the attentions that hold a cache.

    Tokens are reported, not required: in low precision, and on another device, a near-tie may fall the other way.
    """
    reference = load_file(reference_file)
    tokens, expected = reference["tokens"], reference["logits"].double()
    experts = "eager" if reference["logits"].dtype is torch.float64 else None  # the usual one knows no float64
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, dtype="auto", local_files_only=True, experts_implementation=experts
    ).eval()
    prompt = int(reference["prompt"])
    new = tokens.shape[1] - prompt
    with torch.inference_mode():
        whole = model(tokens, use_cache=False).logits.double()
        out = model(tokens[:, :prompt], use_cache=True)
        stepped = [out.logits.double()]
        for position in range(prompt, tokens.shape[1]):
            out = model(tokens[:, position : position + 1], cache=out.cache, use_cache=True)
            stepped.append(out.logits.double())
        ids = tokens[:, :prompt]
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    result: dict[str, object] = {
        "engine": ENGINE,
        "max_logit_difference": (whole - expected).abs().max().item(),
        "max_logit_difference_cached": (torch.cat(stepped, dim=1) - expected).abs().max().item(),
        "tolerance": tolerance * max(1.0, expected.abs().max().item()),
        "greedy_tokens_equal": torch.equal(greedy, tokens),
        "cache_layers": len(out.cache.layers),
        "cache_layers_expected": int(reference["attentions"]),
        "class": type(model).__name__,
        "blockpruner_imported": "blockpruner" in sys.modules,
    }
    worst = max(float(str(result["max_logit_difference"])), float(str(result["max_logit_difference_cached"])))
    result["ok"] = (
        worst <= float(str(result["tolerance"]))
        and len([layer for layer in out.cache.layers if layer.is_initialized])
        == result["cache_layers"]
        == result["cache_layers_expected"]
        and not result["blockpruner_imported"]
    )
    return result


if __name__ == "__main__":
    report = verify(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
