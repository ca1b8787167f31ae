"""Generation speed and memory of models side by side.

Decides what is timed: greedy decoding with a KV cache and no early stop, as in Table 6 of arXiv
2406.10594. The models take turns within each repeat: a drift of the machine then falls on all of
them.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

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
    start = _synchronized_time(model)
    token = _next_token(model, prompt, cache)
    prefill_end = _synchronized_time(model)
    tokens = [token]
    for _ in range(new_tokens - 1):
        token = _next_token(model, token, cache)
        tokens.append(token)
    decode_end = _synchronized_time(model)
    return Generation(
        torch.cat(tokens, dim=1), prefill_end - start, decode_end - prefill_end, _cache_bytes(cache)
    )


def _next_token(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The likeliest token [B, 1] after `ids` [B, T] and the cache, which grows by T."""
    logits: Tensor = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(dim=-1)


def _synchronized_time(model: PreTrainedModel) -> float:
    # A GPU computes after the call has returned.
    accelerator.synchronize(model.device)
    return time.perf_counter()


def _cache_bytes(cache: DynamicCache) -> int:
    total = 0
    for layer in cache.layers:
        tensors: list[Tensor] = []
        # A linear attention has states in place of keys and values, and a slot may be unused.
        if not hasattr(layer, "keys"):
            tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        elif layer.keys is not None:
            tensors = [layer.keys, layer.values]
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def turns(names: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """(repeat, name) in the order of measuring. Repeat 0 warms up. Every repeat reverses the order:
    no model always runs on a warmer machine."""
    for repeat in range(repeats + 1):
        direction = 1 if repeat % 2 else -1
        for name in names[::direction]:
            yield repeat, name


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    settings: Speed,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, MeasuredSpeed]:
    """Time every model on one random prompt. Each warms up once, then they take turns. They are on
    one device and of one vocabulary. `advance` is called with (generations done, generations in
    all), warm-up included."""
    total = len(models) * (settings.repeats + 1)
    generations: dict[str, list[Generation]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    for done, (repeat, name) in enumerate(turns(list(models), settings.repeats), 1):
        model = models[name]
        prompt = random_prompt(model, settings.batch, settings.prompt_tokens)
        # torch knows the peak of a GPU only.
        has_peak = model.device.type != "cpu"
        if has_peak:
            accelerator.reset_peak(model.device)
        generation = generate(model, prompt, settings.new_tokens)
        if repeat > 0:
            generations[name].append(generation)
        if repeat > 0 and has_peak:
            peak = accelerator.peak(model.device) - _other_weights(model, models.values())
            peaks[name] = max(peaks[name], peak)
        advance(done, total)
    return {
        name: _summarize(model, generations[name], peaks[name], settings)
        for name, model in models.items()
    }


def _other_weights(model: PreTrainedModel, models: Iterable[PreTrainedModel]) -> int:
    """The bytes on the model's device of weights that only other models have."""
    weights: dict[int, Tensor] = {}
    for other in models:
        weights |= {id(weight): weight for weight in other.parameters()}
    for weight in model.parameters():
        del weights[id(weight)]
    return sum(weight.nbytes for weight in weights.values() if weight.device == model.device)


def _summarize(
    model: PreTrainedModel, generations: list[Generation], peak: int, settings: Speed
) -> MeasuredSpeed:
    prefill = _timing([generation.prefill_seconds for generation in generations])
    decode = _timing([generation.decode_seconds for generation in generations])
    both = [sum(pair) for pair in zip(prefill.samples, decode.samples, strict=True)]
    kv_cache = generations[0].kv_cache_bytes
    return MeasuredSpeed(
        prefill_seconds=prefill,
        decode_seconds=decode,
        generation_seconds=_timing(both),
        prefill_tokens_per_second=settings.batch * settings.prompt_tokens / prefill.median,
        decode_tokens_per_second=settings.batch * (settings.new_tokens - 1) / decode.median,
        kv_cache_bytes=kv_cache,
        peak_memory_bytes=peak or weight_bytes(model) + kv_cache,
        peak_memory="allocated" if peak else "weights + KV cache",
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch=settings.batch,
        repeats=settings.repeats,
        threads=torch.get_num_threads(),
        device=accelerator.name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _timing(samples: list[float]) -> Timing:
    return Timing(median(samples), samples)


def random_prompt(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], the same for every model of one vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(model.device)
