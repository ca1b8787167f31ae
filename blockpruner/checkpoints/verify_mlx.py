"""Verification of a `nas` or `mlx` checkpoint by mlx-lm, in a fresh process that knows nothing of
blockpruner.

Run as a script: `python verify_mlx.py <checkpoint> <reference.safetensors> <tolerance>`. It prints
one JSON object, and exits 0 if the checkpoint agrees with the masked dense model, 1 if not. It
imports numpy, mlx and mlx_lm alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ENGINE = "mlx_lm"
"""The Python module that runs the checkpoint."""

WIDE = 1e-2
"""A larger tolerance is for rounded weights."""


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, object]:
    """Compare with the reference: logits of prompt and greedy continuation in one pass, the same
    fed token by token through the KV cache, and the attentions that hold a cache.

    No logit may differ by more than the tolerance. Where the file holds rounded weights, the
    tolerance is wide and half the positions may exceed it: SmolLM2-135M without its first
    attention, rounded to bfloat16, differs from itself by more than its largest logit at single
    positions.
    """
    # Imported late: ENGINE is read where mlx is not installed.
    import mlx.core as mx
    from mlx_lm.utils import load_model

    # The CPU gives the same numbers everywhere: no lower precision within a matrix product.
    mx.set_default_device(mx.cpu)
    reference = mx.load(reference_file, format="safetensors")
    tokens = reference["tokens"]
    prompt = int(reference["prompt"])
    length = tokens.shape[1]
    # The caller has checked that the code of a checkpoint is its own.
    model, _ = load_model(Path(checkpoint), trust_remote_code=True)
    _compute_in_float32_(model)
    expected = _array(reference["logits"])
    # The whole text in one pass, then through the KV cache.
    logits = _array(model(tokens))
    cached, cache = _stepped(model, tokens, prompt)

    difference = _distance(logits, expected)
    # The prompt is one pass on both sides.
    difference_cached = _distance(cached, expected)[:, prompt:]
    maximum = difference.max().item()
    maximum_cached = difference_cached.max().item()
    median = np.median(difference).item()
    median_cached = np.median(difference_cached).item()
    largest_logit = np.abs(expected).max().item()
    limit = tolerance * max(1.0, largest_logit)
    # Token t + 1 should be the likeliest after token t.
    likeliest = cached.argmax(axis=-1)
    predicted = likeliest[:, prompt - 1 : -1]
    continuation = np.array(tokens)[:, prompt:]
    filled = [layer for layer in cache if layer.offset == length]
    attentions = int(reference["attentions"])
    is_imported = "blockpruner" in sys.modules
    judged = max(maximum, maximum_cached)
    if tolerance > WIDE:
        judged = max(median, median_cached)
    return {
        "engine": ENGINE,
        "max_logit_difference": maximum,
        "max_logit_difference_cached": maximum_cached,
        "median_logit_difference": median,
        "median_logit_difference_cached": median_cached,
        "tolerance": limit,
        "greedy_tokens_equal": np.array_equal(predicted, continuation),
        "cache_layers": len(filled),
        "cache_layers_expected": attentions,
        "class": type(model).__module__,
        "blockpruner_imported": is_imported,
        "ok": (
            judged <= limit
            # Each slot of the cache is that of an attention.
            and len(cache) == len(filled) == attentions
            and not is_imported
        ),
    }


def _distance(logits: Any, expected: Any) -> Any:
    """The largest difference of a logit at each position, [B, T]."""
    return np.abs(logits - expected).max(axis=-1)


def _compute_in_float32_(model: Any) -> None:
    """Make the embedding return float32. mlx computes each product in the wider dtype, so no more
    than one matrix is held in float32."""
    import mlx.core as mx
    import mlx.nn as nn

    class Embedding(nn.Embedding):  # type: ignore[misc]
        def __call__(self, ids: Any) -> Any:
            return super().__call__(ids).astype(mx.float32)

    model.model.embed_tokens.__class__ = Embedding


def _stepped(model: Any, tokens: Any, prompt: int) -> tuple[Any, Any]:
    """Logits [B, T, V], the prompt at once, then token by token; and the KV cache."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    out = model(tokens[:, :prompt], cache=cache)
    logits = [_array(out)]
    for position in range(prompt, tokens.shape[1]):
        token = tokens[:, position : position + 1]
        out = model(token, cache=cache)
        logits.append(_array(out))
    return np.concatenate(logits, axis=1), cache


def _array(tensor: Any) -> Any:
    """A tensor of mlx in numpy, which has no bfloat16."""
    import mlx.core as mx

    return np.array(tensor.astype(mx.float32))


if __name__ == "__main__":
    _, checkpoint, reference_file, tolerance = sys.argv
    report = verify(checkpoint, reference_file, float(tolerance))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
