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

from blockpruner.core.blocks import DENSE, BlockId, BlockKind
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
    settings: Latency,
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
        **settings.model_dump(),
    }
    name = f"latency-{fingerprint(facts)}.json"
    for path in (folder / name, shared / name):
        stored: dict[str, Any] | None = read_kept_json(path, observer.note)
        if stored is not None:
            observer.note(f"{_summary(stored)} (kept: {path})")
            write_sealed_json(folder / name, stored)
            return stored
    _check_measurable(checkpoint, runtime)
    observer.begin("latency of blocks")
    set_threads(runtime.threads)
    loaded = load_model(
        checkpoint, model.dtype, runtime.device, model.trust_remote_code, runtime.attention
    )
    measured = measure_latency(loaded, settings, observer.advance)
    # The search loads the model anew, and a device may not hold it twice.
    del loaded
    accelerator.empty_cache()
    write_sealed_json(shared / name, measured)
    write_sealed_json(folder / name, measured)
    observer.end(_summary(measured))
    return measured


def _check_measurable(checkpoint: Path, runtime: Runtime) -> None:
    config = read_json(checkpoint / "config.json")
    if FAMILIES[str(config["model_type"])].mha.linear is not None:
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


def _summary(latency: Mapping[str, Any]) -> str:
    seconds = latency["total"] / 1e9
    tokens = f"{latency['prompt_tokens']} + {latency['new_tokens']}"
    mha_ms, mlp_ms = latency["mha"] / 1e6, latency["mlp"] / 1e6
    return (
        f"{seconds:.3f} s for {latency['batch']} x ({tokens}) tokens on {latency['device']}; an MHA"
        f" block {mha_ms:.2f}, an MLP block {mlp_ms:.2f} ms"
    )


def measure_latency(
    model: PreTrainedModel,
    settings: Latency,
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
    layers = len(decoder_layers(model))
    # Every other block of a kind is removed, and the saving is divided among them.
    masks = {"dense": DENSE}
    for kind in BlockKind:
        masks[kind.value] = frozenset(BlockId(kind, layer) for layer in range(0, layers, 2))
    prompt = random_prompt(model, settings.batch, settings.prompt_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in masks}
    for done, (repeat, name) in enumerate(turns(list(masks), settings.repeats), 1):
        with masked(model, masks[name]):
            generation = generate(model, prompt, settings.new_tokens)
        if repeat > 0:
            seconds[name].append(generation.prefill_seconds + generation.decode_seconds)
        advance(done, len(masks) * (settings.repeats + 1), name)
    medians = {name: median(times) for name, times in seconds.items()}
    dense_seconds = medians["dense"]
    block_seconds = {}
    for kind in BlockKind:
        saved = max(0.0, dense_seconds - medians[kind.value])
        block_seconds[kind.value] = saved / len(masks[kind.value])
    # A noisy measurement may give all blocks together more time than the whole model has.
    all_blocks = sum(block_seconds.values()) * layers
    scale = min(1.0, dense_seconds / all_blocks) if all_blocks else 1.0
    return {
        "total": round(1e9 * dense_seconds),
        **{kind: int(1e9 * scale * cost) for kind, cost in block_seconds.items()},
        "scale": scale,
        "seconds": medians,
        **settings.model_dump(),
        "device": accelerator.name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
