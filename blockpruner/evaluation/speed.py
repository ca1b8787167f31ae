"""Generation speed and memory of models side by side.

Decides what is timed: greedy decoding with a KV cache and no early stop, as in Table 6 of arXiv
2406.10594. The models take turns within each repeat: a drift of the machine then falls on all of
them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from blockpruner.evaluation.settings import Speed
from blockpruner.model import accelerator


@dataclass(frozen=True)
class Timing:
    """Seconds over the repeats."""

    median: float
    samples: list[float]
    """The value of each repeat, in order. Samples of two models that took turns are pairs."""


@dataclass(frozen=True)
class MeasuredSpeed:
    prefill_seconds: Timing
    """The prompt's forward pass and the first new token."""
    decode_seconds: Timing
    """The other new_tokens - 1."""
    generation_seconds: Timing
    prefill_tokens_per_second: float
    """Over the whole batch, from the median, as is the next one."""
    decode_tokens_per_second: float
    kv_cache_bytes: int
    """Keys and values at the end, of prompt + new - 1 tokens: the last token is never fed."""
    peak_memory_bytes: int
    peak_memory: str
    """What the peak is. "allocated": the largest sum of tensors on the model's (first) device while
    it generated, without weights that only other models have. "weights + KV cache": their sum, on a
    CPU, where only the process's memory is known."""
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    threads: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Generation:
    tokens: Tensor
    """[B, new_tokens], int64."""
    prefill_seconds: float
    decode_seconds: float
    kv_cache_bytes: int


def weight_bytes(model: PreTrainedModel) -> int:
    """The bytes of all parameters; shared ones count once."""
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
    held = sum(tensor.nbytes for layer in cache.layers for tensor in _held(layer))
    return Generation(torch.cat(tokens, dim=1), prefilled - started, ended - prefilled, held)


def _held(layer: Any) -> tuple[Tensor, ...]:
    """What a layer of the cache holds: keys and values, or the states of a linear attention. A slot
    may be unused."""
    if hasattr(layer, "keys"):
        return () if layer.keys is None else (layer.keys, layer.values)
    return (*layer.conv_states.values(), *layer.recurrent_states.values())


def turns(names: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """(repeat, name) in the order of measuring. Repeat 0 warms up; the order turns round with every
    repeat."""
    for repeat in range(repeats + 1):
        yield from ((repeat, name) for name in names[:: 1 if repeat % 2 else -1])


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    settings: Speed,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, MeasuredSpeed]:
    """Time every model on one random prompt. Each warms up once, then they take turns. They are on
    one device and of one vocabulary. `advance` is called with (generations done, generations in
    all), warm-up included."""
    prompts = {
        name: random_prompt(model, settings.batch, settings.prompt_tokens)
        for name, model in models.items()
    }
    runs: dict[str, list[Generation]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    for done, (repeat, name) in enumerate(turns(list(models), settings.repeats), 1):
        result, peak = _run(models, name, prompts[name], settings.new_tokens)
        if repeat:
            runs[name].append(result)
            peaks[name] = max(peaks[name], peak)
        advance(done, len(models) * (settings.repeats + 1))
    return {
        name: _speed(model, runs[name], peaks[name], settings.prompt_tokens)
        for name, model in models.items()
    }


def _run(
    models: Mapping[str, PreTrainedModel], name: str, prompt: Tensor, new_tokens: int
) -> tuple[Generation, int]:
    """One generation, and this model's peak of its device's memory (0 on a CPU); models may share
    weights."""
    model = models[name]
    if model.device.type == "cpu":
        return generate(model, prompt, new_tokens), 0
    accelerator.reset_peak(model.device)
    result = generate(model, prompt, new_tokens)
    own = {id(weight) for weight in model.parameters()}
    others = {
        id(weight): weight
        for other in models.values()
        for weight in other.parameters()
        if id(weight) not in own
    }
    here = sum(weight.nbytes for weight in others.values() if weight.device == model.device)
    return result, accelerator.peak(model.device) - here


def _speed(
    model: PreTrainedModel, runs: list[Generation], peak: int, prompt_tokens: int
) -> MeasuredSpeed:
    batch, new_tokens = runs[0].tokens.shape
    seconds = [
        (run.prefill_seconds, run.decode_seconds, run.prefill_seconds + run.decode_seconds)
        for run in runs
    ]
    prefill, decode, both = (
        Timing(median(each), list(each)) for each in zip(*seconds, strict=True)
    )
    held = runs[0].kv_cache_bytes
    return MeasuredSpeed(
        prefill_seconds=prefill,
        decode_seconds=decode,
        generation_seconds=both,
        prefill_tokens_per_second=batch * prompt_tokens / prefill.median,
        decode_tokens_per_second=batch * (new_tokens - 1) / decode.median,
        kv_cache_bytes=held,
        peak_memory_bytes=peak or weight_bytes(model) + held,
        peak_memory="allocated" if peak else "weights + KV cache",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        repeats=len(runs),
        threads=torch.get_num_threads(),
        device=accelerator.name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def random_prompt(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], the same for every model of one vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(
        model.device
    )


def _next_token(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The likeliest token [B, 1] after `ids` [B, T] and the cache, which grows by T."""
    logits: Tensor = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(dim=-1)


def _now(model: PreTrainedModel) -> float:
    accelerator.synchronize(model.device)
    return time.perf_counter()
