"""What one block costs in time of generation: measured on the device at hand, once for a run.

Decides what is timed, and how it becomes a cost of blocks. Three models generate the same text in
turns: the dense one, the one without every other MHA block, and the one without every other MLP
block. Time is taken to be a constant plus a sum over blocks, with one cost for each kind. Every
mask then has a time, although nobody ran it. The benchmark measures the time of the pruned model
itself.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, BlockKind, all_blocks
from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Model, Runtime
from blockpruner.evaluation.speed import generate, random_prompt, turns
from blockpruner.inputs.checkpoints import checkpoint_identity
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers, load_model, masked, set_threads
from blockpruner.scoring.settings import Latency
from blockpruner.store.files import read_json, read_kept_json, write_sealed_json
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import EVAL_VERSION


def kept_latency(
    folder: Path,
    shared: Path,
    checkpoint: Path,
    model: Model,
    timed: Latency,
    runtime: Runtime,
    observer: Observer,
) -> dict[str, Any]:
    """The measurement that was kept for a model; it is made now if there is none, or if the kept
    one is damaged. Raises InputError if it must be made and the model is not in this process's
    memory: it is streamed, or a cluster scores it.

    Another device or day does not repeat it: decisions rest on it. Delete the file to measure
    again. It is kept in the run's own `folder`, to travel with its scores, and in a `shared` one
    for all runs of this machine: a speed-up then means the same in all runs of one model.
    """
    facts = {
        "version": EVAL_VERSION,
        "model": checkpoint_identity(checkpoint),
        "dtype": model.dtype,
    }
    name = f"latency-{fingerprint(facts | timed.model_dump())}.json"
    for path in (folder / name, shared / name):
        found: dict[str, Any] | None = read_kept_json(path, observer.note)
        if found is not None:
            observer.note(f"{_words(found)} (kept: {path})")
            write_sealed_json(folder / name, found)
            return found
    if FAMILIES[str(read_json(checkpoint / "config.json")["model_type"])].mha.linear is not None:
        raise InputError(
            "a speed-up is measured as so much for each attention, and this model has linear and"
            " full ones, which differ; give the budget in parameters or KV cache",
            rule="latency-hybrid",
        )
    if runtime.streaming or runtime.ray_address:
        raise InputError(
            "a speed-up is measured with the model in this process's memory, which"
            " runtime.streaming and runtime.ray_address exclude; give budgets in parameters or KV"
            " cache, or measure first, without them",
            rule="latency-elsewhere",
        )
    observer.begin("latency of blocks")
    set_threads(runtime.threads)
    loaded = load_model(
        checkpoint, model.dtype, runtime.device, model.trust_remote_code, runtime.attention
    )
    found = measure_latency(loaded, timed, observer.advance)
    del loaded
    accelerator.empty_cache()
    for place in (shared, folder):
        write_sealed_json(place / name, found)
    observer.end(_words(found))
    return found


def _words(found: Mapping[str, Any]) -> str:
    return (
        f"{found['total'] / 1e9:.3f} s for {found['batch']} x ({found['prompt_tokens']} +"
        f" {found['new_tokens']}) tokens on {found['device']}; an MHA block"
        f" {found['mha'] / 1e6:.2f}, an MLP block {found['mlp'] / 1e6:.2f} ms"
    )


def measure_latency(
    model: PreTrainedModel,
    timed: Latency,
    advance: Callable[[int, int, str], object] = lambda done, total, detail: None,
) -> dict[str, Any]:
    """Time generation of a dense model, which is restored to the bit, with and without blocks; each
    of the three models warms up once. `advance` is called with (generations done, generations in
    all, which), warm-up included.

    Returns:
        total: nanoseconds of one generation of the dense model.
        mha, mlp: nanoseconds of one block; 0 where its absence saved no time.
        scale: the factor in both that keeps the sum of all blocks below the total.
        seconds: the medians behind these numbers.
    """
    blocks = all_blocks(len(decoder_layers(model)))
    masks = {"dense": DENSE} | {
        kind.value: frozenset(
            block for block in blocks if block.kind is kind and block.layer % 2 == 0
        )
        for kind in BlockKind
    }
    prompt = random_prompt(model, timed.batch, timed.prompt_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in masks}
    for done, (repeat, name) in enumerate(turns(list(masks), timed.repeats), 1):
        with masked(model, masks[name]):
            result = generate(model, prompt, timed.new_tokens)
        if repeat:
            seconds[name].append(result.prefill_seconds + result.decode_seconds)
        advance(done, len(masks) * (timed.repeats + 1), name)
    medians = {name: median(times) for name, times in seconds.items()}
    saved = {
        name: max(0.0, medians["dense"] - medians[name]) / len(mask)
        for name, mask in masks.items()
        if mask
    }
    all_of_them = sum(saved.values()) * len(blocks) / 2
    scale = min(1.0, medians["dense"] / all_of_them) if all_of_them else 1.0
    return {
        "total": round(1e9 * medians["dense"]),
        **{name: int(1e9 * scale * each) for name, each in saved.items()},
        "scale": scale,
        "seconds": medians,
        **timed.model_dump(),
        "device": accelerator.name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
