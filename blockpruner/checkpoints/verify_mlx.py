"""Verification of a `nas` or `mlx` checkpoint by mlx-lm, in a fresh process that knows nothing of
blockpruner.

Run as a script: `python verify_mlx.py <checkpoint> <reference.safetensors> <tolerance>`. It prints
one JSON object, and exits 0 if the checkpoint agrees with the masked dense model, 1 if not. It
imports numpy, mlx and mlx_lm alone.
"""

import json
import sys
from pathlib import Path

import numpy as np

ENGINE = "mlx_lm"
"""The Python module that runs the checkpoint."""

WIDE = 1e-2
"""A larger tolerance is meant for rounded weights."""


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, object]:
    """Compare with the reference: logits of prompt and greedy continuation in one pass, the same
    fed token by token through the KV cache, and the attentions that hold a cache.

    Both sides are in float32. What the embedding gives is made as wide, and mlx then computes each
    product in the wider dtype: never more than a matrix is held so. No logit may differ by more
    than the tolerance. Where the file holds rounded weights, the tolerance is wide and half the
    positions may exceed it: SmolLM2-135M without its first attention, rounded to bfloat16, differs
    from itself by more than its largest logit at single positions.
    """
    import mlx.core as mx  # here: ENGINE is read where mlx is not installed
    import mlx.nn as nn
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    # the same numbers everywhere, no lower precision within a matrix product
    mx.set_default_device(mx.cpu)
    reference = mx.load(reference_file, format="safetensors")
    tokens, expected = reference["tokens"], np.array(reference["logits"].astype(mx.float32))
    # the caller has seen that code is its own
    model, _ = load_model(Path(checkpoint), trust_remote_code=True)
    widened = {"__call__": lambda self, ids: nn.Embedding.__call__(self, ids).astype(mx.float32)}
    model.model.embed_tokens.__class__ = type("Embedding", (nn.Embedding,), widened)
    prompt, length = int(reference["prompt"]), tokens.shape[1]

    whole = model(tokens)
    mx.eval(whole)
    cache = make_prompt_cache(model)
    stepped = [model(tokens[:, :prompt], cache=cache)]
    for i in range(prompt, length):
        mx.eval(stepped)
        stepped.append(model(tokens[:, i : i + 1], cache=cache))

    cached = mx.concatenate(stepped, axis=1)
    greedy = mx.argmax(cached[:, prompt - 1 : -1], axis=-1) == tokens[:, prompt:]
    pairs = ((whole, expected), (cached[:, prompt:], expected[:, prompt:]))
    differences = [
        np.abs(np.array(found.astype(mx.float32)) - wanted).max(axis=-1) for found, wanted in pairs
    ]
    worst = [float(difference.max()) for difference in differences]
    usual = [float(np.median(difference)) for difference in differences]
    limit = tolerance * max(1.0, float(np.abs(expected).max()))
    result: dict[str, object] = {
        "engine": ENGINE,
        "max_logit_difference": worst[0],
        "max_logit_difference_cached": worst[1],
        "median_logit_difference": usual[0],
        "median_logit_difference_cached": usual[1],
        "tolerance": limit,
        "greedy_tokens_equal": bool(mx.all(greedy)),
        "cache_layers": len([layer for layer in cache if layer.offset == length]),
        "cache_layers_expected": int(reference["attentions"]),
        "class": type(model).__module__,
        "blockpruner_imported": "blockpruner" in sys.modules,
    }
    judged = usual if tolerance > WIDE else worst
    result["ok"] = (
        all(difference <= limit for difference in judged)
        and len(cache) == result["cache_layers"] == result["cache_layers_expected"]
        and not result["blockpruner_imported"]
    )
    return result


if __name__ == "__main__":
    report = verify(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
