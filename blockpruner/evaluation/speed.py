"""Generation speed and memory of models side by side.

Decides what is timed: greedy decoding with a KV cache and no early stop, as in Table 6 of arXiv 2406.10594, the
models taking turns within each repeat so that a drift of the machine falls on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

PROMPT_SEED = 0


@dataclass(frozen=True)
class Timing:
    """Seconds over the repeats; samples: of each, in order, so that those of two models taking turns are pairs."""

    median: float
    min: float
    max: float
    samples: list[float]


@dataclass(frozen=True)
class Speed:
    """One model's speed.

    prefill: the prompt's forward and the first new token; decode: the other new_tokens - 1; generation: both;
    *_tokens_per_second: over the whole batch, from the medians;
    kv_cache_bytes: keys and values held at the end (the last token is never fed, so of prompt + new - 1 tokens);
    weight_bytes: of all parameters, shared ones once;
    peak_memory_bytes, peak_memory: "allocated", the largest sum of tensors on the CUDA device while this model
    generated, less what other models hold there; on a CPU, where memory is the process's, "weights + KV cache".
    """

    prefill_seconds: Timing
    decode_seconds: Timing
    generation_seconds: Timing
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    kv_cache_bytes: int
    weight_bytes: int
    peak_memory_bytes: int
    peak_memory: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    threads: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Generation:
    tokens: Tensor  # [B, new_tokens] int64
    prefill_seconds: float
    decode_seconds: float
    kv_cache_bytes: int


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Generation:
    """Greedy decoding of exactly `new_tokens` tokens after `prompt` [B, T], timed."""
    cache = DynamicCache(config=model.config)
    started = _now(model)
    token = _next_token(model, prompt, cache)
    prefilled = _now(model)
    tokens = [token]
    for _ in range(new_tokens - 1):
        token = _next_token(model, token, cache)
        tokens.append(token)
    ended = _now(model)
    layers: list[Any] = cache.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return Generation(torch.cat(tokens, dim=1), prefilled - started, ended - prefilled, held)


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    batch: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Speed]:
    """Time every model on one random prompt; each warms up once, then they take turns, the order turning round.

    Args:
        models: by name, all on one device, of one vocabulary.
        advance: called with (generations done, generations in all), warm-up included.
    """
    prompts = {name: random_prompt(model, batch, prompt_tokens) for name, model in models.items()}
    runs: dict[str, list[Generation]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    done, total = 0, len(models) * (repeats + 1)
    for repeat in range(repeats + 1):
        for name in list(models)[:: 1 if repeat % 2 else -1]:
            result, peak = _run(models, name, prompts[name], new_tokens)
            if repeat:
                runs[name].append(result)
                peaks[name] = max(peaks[name], peak)
            done += 1
            advance(done, total)
    return {name: _speed(model, runs[name], peaks[name], prompt_tokens) for name, model in models.items()}


def _run(models: Mapping[str, PreTrainedModel], name: str, prompt: Tensor, new_tokens: int) -> tuple[Generation, int]:
    """One generation, and the peak of CUDA memory that is this model's (0 on a CPU)."""
    model = models[name]
    if model.device.type != "cuda":
        return generate(model, prompt, new_tokens), 0
    torch.cuda.reset_peak_memory_stats(model.device)
    result = generate(model, prompt, new_tokens)
    others = sum(weight_bytes(other) for key, other in models.items() if key != name)
    return result, torch.cuda.max_memory_allocated(model.device) - others


def _speed(model: PreTrainedModel, runs: list[Generation], peak: int, prompt_tokens: int) -> Speed:
    batch, new_tokens = runs[0].tokens.shape
    prefill = _timing([run.prefill_seconds for run in runs])
    decode = _timing([run.decode_seconds for run in runs])
    weights, held = weight_bytes(model), runs[0].kv_cache_bytes
    return Speed(
        prefill_seconds=prefill,
        decode_seconds=decode,
        generation_seconds=_timing([run.prefill_seconds + run.decode_seconds for run in runs]),
        prefill_tokens_per_second=batch * prompt_tokens / prefill.median,
        decode_tokens_per_second=batch * (new_tokens - 1) / decode.median,
        kv_cache_bytes=held,
        weight_bytes=weights,
        peak_memory_bytes=peak or weights + held,
        peak_memory="allocated" if peak else "weights + KV cache",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        repeats=len(runs),
        threads=torch.get_num_threads(),
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def random_prompt(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], the same for every model of one vocabulary."""
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def _next_token(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The likeliest token [B, 1] after `ids` [B, T] and the cache, which grows by T."""
    logits: Tensor = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(dim=-1)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _timing(seconds: list[float]) -> Timing:
    return Timing(median(seconds), min(seconds), max(seconds), seconds)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
