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

from blockpruner.core.blocks import DENSE, BlockKind, all_blocks
from blockpruner.core.errors import InputError
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Runtime
from blockpruner.evaluation.speed import device_name, generate, random_prompt
from blockpruner.inputs.checkpoints import checkpoint_identity
from blockpruner.model.models import decoder_layers, load_model, masked, set_threads
from blockpruner.store.files import read_json, set_aside, write_json
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import LATENCY_VERSION


def kept_latency(
    folder: Path,
    shared: Path,
    checkpoint: Path,
    dtype: str,
    timed: Mapping[str, int],
    runtime: Runtime,
    trust_remote_code: bool,
    observer: Observer,
) -> dict[str, Any]:
    """What was measured for a model and kept; measured now if there is none, or none that is whole.

    It is not measured again on another device or day, so that what was decided by it stays decided; whoever wants that
    deletes the file.

    Args:
        folder: the run's own, which travels with its scores.
        shared: for all runs of this machine, so that a speed-up means the same in all that name one model.
        timed: prompt_tokens, new_tokens, batch, repeats, as of `measure_latency`.

    Raises:
        InputError: a model that is streamed, since it is larger than memory, or scored by the workers of a cluster,
            whose devices are not this process's.
    """
    facts = {"version": LATENCY_VERSION, "model": checkpoint_identity(checkpoint), "dtype": dtype, **timed}
    name = f"latency-{fingerprint(facts)}.json"
    for path in (folder / name, shared / name):
        if path.exists():
            found: dict[str, Any] = read_json(path)
            if {"total", "mha", "mlp"} <= found.keys():
                observer.note(f"{_words(found)} (kept: {path})")
                write_json(folder / name, found)
                return found
            observer.note(f"warning: {path} is no measurement; set aside as {set_aside(path).name}")
    for key, value, cause in (
        ("streaming", runtime.streaming, "is larger than it"),
        ("ray_address", runtime.ray_address, "is scored on other machines"),
    ):
        if value:
            raise InputError(
                f"a speed-up is measured with the model in this process's memory, and with runtime.{key}: "
                f"{value} it {cause}; give budgets in parameters or KV cache, or measure first, without it"
            )
    observer.begin("latency of blocks")
    set_threads(runtime.threads)
    model = load_model(checkpoint, dtype, runtime.device, trust_remote_code, runtime.attention)
    found = measure_latency(model, **timed, advance=observer.advance)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for place in (shared, folder):
        write_json(place / name, found)
    observer.end(_words(found))
    if found["scale"] < 1:
        observer.note(
            f"warning: all blocks together seemed to take {1 / found['scale']:.2f} times as long as the model, so the "
            "times are noise; raise score.latency.repeats or new_tokens"
        )
    return found


def _words(found: Mapping[str, Any]) -> str:
    return (
        f"{found['total'] / 1e9:.3f} s for {found['batch']} x ({found['prompt_tokens']} + {found['new_tokens']}) "
        f"tokens on {found['device']}; an MHA block {found['mha'] / 1e6:.2f}, an MLP block {found['mlp'] / 1e6:.2f} ms"
    )


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
        measured; scale: what these were multiplied by so that all blocks take no more than the whole; seconds: the
        medians that they are made of; and what was timed, on what.
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
    saved = {name: max(0.0, medians["dense"] - medians[name]) / len(mask) for name, mask in masks.items() if mask}
    all_of_them = sum(saved.values()) * len(blocks) / 2
    scale = min(1.0, medians["dense"] / all_of_them) if all_of_them else 1.0
    return {
        "total": round(1e9 * medians["dense"]),
        **{name: int(1e9 * scale * each) for name, each in saved.items()},
        "scale": scale,
        "seconds": medians,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "repeats": repeats,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
