"""The speed of this machine's CPU in each dtype, and the dtype that a model is computed in.

Many processors have no product of 16-bit numbers. torch then emulates it, at times a hundred times
as slowly.
"""

import time
from pathlib import Path

import torch
from torch.nn.functional import linear

from blockpruner.model.models import resolve_device
from blockpruner.store.files import read_kept_json, write_sealed_json
from blockpruner.store.provenance import computing, fingerprint, processor

SIZES = ((128, 512), (512, 512))
"""The sizes of the product that is timed: a quarter of a second where it is emulated."""

MIN_SPEEDUP = 1.2
"""float32 is taken from this speedup on: it needs twice the memory."""


def product_rate(dtype: str) -> float:
    """FLOP/s of a linear layer on the CPU, the best of four runs."""
    x_size, weight_size = SIZES
    x = torch.ones(x_size, dtype=getattr(torch, dtype))
    weight = torch.ones(weight_size, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * x.numel() * len(weight) / min(seconds)


def fast_dtype(model_dtype: str, device: str, folder: Path | None = None) -> str:
    """A model's own dtype, or float32 on a CPU that is faster in it.

    A folder keeps the choice for this processor, number of threads and torch, since another dtype
    is another search.
    """
    if model_dtype not in ("bfloat16", "float16") or resolve_device(device).type != "cpu":
        return model_dtype
    facts = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "own": model_dtype,
        **computing(),
    }
    choice_file = folder and folder / f"dtype-{fingerprint(facts)}.json"
    if choice_file:
        choice = read_kept_json(choice_file, lambda damaged: None)
        if choice:
            return str(choice["dtype"])
    is_faster = product_rate("float32") > MIN_SPEEDUP * product_rate(model_dtype)
    dtype = "float32" if is_faster else model_dtype
    if choice_file:
        write_sealed_json(choice_file, facts | {"dtype": dtype})
    return dtype
