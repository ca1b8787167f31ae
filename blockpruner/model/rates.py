"""How fast this machine's CPU multiplies in each dtype, and which one a model is computed in.

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
"""Of the product that is timed: a quarter of a second where it is emulated."""

WORTH = 1.2
"""float32 is taken where it is so many times as fast: it needs twice the memory."""


def product_rate(dtype: str) -> float:
    """FLOP/s of a linear layer on the CPU, the best of some."""
    x, weight = (torch.ones(size, dtype=getattr(torch, dtype)) for size in SIZES)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        linear(x, weight)
        seconds.append(time.perf_counter() - started)
    return 2 * x.numel() * len(weight) / min(seconds)


def fast_dtype(own: str, device: str, folder: Path | None = None) -> str:
    """A model's own dtype, or float32 on a CPU that is faster in it. A folder keeps what was chosen
    for this processor, number of threads and torch: another dtype is another search."""
    if own not in ("bfloat16", "float16") or resolve_device(device).type != "cpu":
        return own
    facts = {"processor": processor(), "threads": torch.get_num_threads(), "own": own} | computing()
    kept = folder and folder / f"dtype-{fingerprint(facts)}.json"
    if kept and (known := read_kept_json(kept, lambda damaged: None)):
        return str(known["dtype"])
    found = "float32" if product_rate("float32") > WORTH * product_rate(own) else own
    if kept:
        write_sealed_json(kept, facts | {"dtype": found})
    return found
