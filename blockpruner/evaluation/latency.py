"""What one block costs in time of generation: measured on the device at hand, once for a run.

Decides what is timed, and how it becomes a cost of blocks. Of the dense model, of it without every other MHA block and
of it without every other MLP block the same generation is timed, in turns. Time is taken to be a constant and a sum
over blocks, those of a kind alike, so that any mask has a time without having been run; what the pruned model then
takes is measured by the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.blocks import DENSE, BlockKind, all_blocks
from blockpruner.errors import InputError
from blockpruner.evaluation.speed import device_name, generate, random_prompt
from blockpruner.models import decoder_layers, load_model, masked, set_threads
from blockpruner.progress import Observer
from blockpruner.provenance import fingerprint
from blockpruner.sources import checkpoint_identity
from blockpruner.tables import read_json, write_json


def kept_latency(
    folder: Path,
    checkpoint: Path,
    dtype: str,
    timed: Mapping[str, int],
    runtime: Mapping[str, Any],
    trust_remote_code: bool,
    observer: Observer,
) -> dict[str, Any]:
    """What was measured for a model and kept in a folder; measured now if there is none.

    It is not measured again on another device or day, so that what was decided by it stays decided; whoever wants that
    deletes the file.

    Args:
        timed: prompt_tokens, new_tokens, batch, repeats, as of `measure_latency`.
        runtime: as in params.yaml.

    Raises:
        InputError: a model that is streamed, since it is larger than memory.
    """
    identity = checkpoint_identity(checkpoint)
    path = folder / f"latency-{fingerprint({'model': identity, 'dtype': dtype, **timed})}.json"
    known = path.exists()
    if not known:
        if runtime["streaming"]:
            raise InputError(
                "a speed-up is measured with the model in memory, and runtime.streaming is true; give budgets in "
                "parameters or KV cache, or set streaming: false"
            )
        observer.begin("latency of blocks")
        set_threads(runtime["threads"])
        model = load_model(checkpoint, dtype, runtime["device"], trust_remote_code, runtime["attention"])
        write_json(path, measure_latency(model, **timed, advance=observer.advance))
    found: dict[str, Any] = read_json(path)
    seconds = found["seconds"]
    observer.note(
        f"latency: {seconds['dense']:.3f} s for {found['batch']} x ({found['prompt_tokens']} + {found['new_tokens']}) "
        f"tokens on {found['device']}; an MHA block {found['mha'] / 1e6:.2f} ms, an MLP block {found['mlp'] / 1e6:.2f} "
        f"ms ({'kept' if known else 'measured'}: {path})"
    )
    return found


def measure_latency(
    model: PreTrainedModel,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeats: int,
    advance: Callable[[int, int, str], object] = lambda done, total, detail: None,
) -> dict[str, Any]:
    """Time generation with and without blocks; each of the three models warms up once.

    Args:
        model: dense; restored to the bit.
        advance: called with (generations done, generations in all, which), warm-up included.

    Returns:
        total: nanoseconds of one generation of the dense model; mha, mlp: of one block, 0 where none could be
        measured; seconds: the medians that they are made of; and what was timed, on what.
    """
    blocks = all_blocks(len(decoder_layers(model)))
    masks = {"dense": DENSE} | {
        kind.value: frozenset(block for block in blocks if block.kind is kind and block.layer % 2 == 0)
        for kind in BlockKind
    }
    prompt = random_prompt(model, batch, prompt_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in masks}
    total = len(masks) * (repeats + 1)
    for repeat in range(repeats + 1):
        for place, name in enumerate(list(masks)[:: 1 if repeat % 2 else -1]):
            with masked(model, masks[name]):
                timed = generate(model, prompt, new_tokens)
            if repeat:
                seconds[name].append(timed.prefill_seconds + timed.decode_seconds)
            advance(repeat * len(masks) + place + 1, total, name)
    medians = {name: median(times) for name, times in seconds.items()}
    saved = {name: (medians["dense"] - medians[name]) / len(mask) for name, mask in masks.items() if mask}
    return {
        "total": round(1e9 * medians["dense"]),
        **{name: max(0, round(1e9 * each)) for name, each in saved.items()},
        "seconds": medians,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "repeats": repeats,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
