"""What a GPU shows: an iteration of the search, a refit and generation, and how fast each is.

    python -m benchmarks.gpu [--shape llama3-8b] [--memory 24]
        [--out data/benchmarks/gpu.json] [part ...]

It needs no network and no checkpoint: models have the widths of the shape and random, seeded
weights. A large card is held to `--memory` GiB, as a small one. Without an accelerator all parts
are rehearsed at tiny shapes.

A part yields facts, and each is in the file as soon as it is known. Keys have units, since they are
printed as they are. A part that fails does not stop the others. Prints what the file holds; exits
with 1 if a part failed.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from blockpruner.api import prune
from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, all_blocks
from blockpruner.core.families import Config, attention_heads, count_parameters
from blockpruner.core.progress import SilentObserver
from blockpruner.evaluation.settings import Speed
from blockpruner.evaluation.speed import measure_speed, weight_bytes
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers, prune_, resolve_device, shared_copy
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.walk import runs, steps_of
from blockpruner.scoring.work import Rows, Task
from blockpruner.store.files import write_json
from blockpruner.store.provenance import commit, environment

NO_DEVICE = "no accelerator: rehearsal at tiny shapes"
GIB = 2**30

Facts = Mapping[str, Any]

MODELS: Mapping[str, Config] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    },
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def random_model(
    shape: str, dtype: torch.dtype, device: str = "cpu", **changes: Any
) -> PreTrainedModel:
    """A Llama of a named shape on `device`, weights uniform with a deviation of 0.02, norms 1."""
    config = LlamaConfig(**{"max_position_embeddings": 4096, **MODELS[shape], **changes})
    torch.manual_seed(0)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    bound = 0.02 * 3**0.5
    for name, parameter in model.named_parameters():
        # Uniform numbers are drawn faster than normal ones, and speed does not depend on them.
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.uniform_(-bound, bound)
    return model.eval().requires_grad_(False)


def random_rows(vocabulary: int, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (rows, length), generator=generator).tolist()


@dataclass(frozen=True)
class Flops:
    """FLOPs of the parts of a forward pass, for a batch of rows. A product of [m, k] and [k, n]
    counts 2mkn. Attention counts all T x T scores, as a kernel that masks computes them. Biases,
    norms, rotary embedding, softmax and residual adds are left out, as usual. A test compares with
    torch's counter."""

    blocks: Mapping[BlockId, int]
    """One run of each block, in the order of a forward pass."""
    head: int
    """The head where it predicts a token of the batch."""
    full_head: int
    """The head on every token."""

    @classmethod
    def of(cls, config: Config, rows: int, length: int) -> Self:
        parameters = count_parameters(config).blocks
        heads, _, width = attention_heads(config)
        tokens = rows * length
        hidden = int(config["hidden_size"])
        head = 2 * hidden * int(config["vocab_size"])
        # Scores and the sum of values: two products of [T, width] and [width, T] for each head.
        attention = 4 * length * heads * width
        blocks = {}
        for (block,) in steps_of(int(config["num_hidden_layers"]), parallel=False):
            # The parameters of a block are those of its matrices and its norm.
            token_flops = 2 * (parameters[block] - hidden)
            if block.kind is BlockKind.MHA:
                token_flops += attention
            blocks[block] = tokens * token_flops
        # The last token of a row predicts nothing.
        return cls(blocks, rows * (length - 1) * head, tokens * head)

    def naive(self, masks: Sequence[Mask]) -> int:
        """One full forward pass for each mask, with logits of every token."""
        total = len(masks) * self.full_head
        for mask in masks:
            total += sum(cost for block, cost in self.blocks.items() if block not in mask)
        return total

    def exact(self, masks: Sequence[Mask]) -> int:
        """The walk of the engine: masks share the blocks before their first difference."""
        total = len(masks) * self.head
        for _, blocks in runs([(block,) for block in self.blocks], masks):
            total += sum(self.blocks[block] for block in blocks)
        return total


@dataclass(frozen=True)
class Setting:
    shape: str
    """A name of MODELS."""
    device: torch.device
    rows: int
    length: int

    @property
    def is_real(self) -> bool:
        return self.device.type != "cpu"

    def data(self, rows: int, length: int) -> Rows:
        return tuple(map(tuple, random_rows(int(MODELS[self.shape]["vocab_size"]), rows, length)))

    def model(self, layers: int | None = None) -> PreTrainedModel:
        changes = {} if layers is None else {"num_hidden_layers": layers}
        return random_model(self.shape, torch.bfloat16, str(self.device), **changes)


def at_most(name: str, value: float, limit: float) -> Facts:
    """A fact; raises ValueError if the value is above the limit, or NaN."""
    if value <= limit:
        return {f"{name}; at most {limit:g}": value}
    raise ValueError(f"{name} is {value:.4g}, and at most {limit:g} is right")


def clocked(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done with some work, and its result."""
    accelerator.synchronize(device)
    started = time.perf_counter()
    result = work()
    accelerator.synchronize(device)
    return time.perf_counter() - started, result


def reset_peak(setting: Setting) -> None:
    if setting.is_real:
        accelerator.reset_peak(setting.device)


def peak(setting: Setting) -> float | None:
    """GiB that tensors took at once since the last reset; None for a rehearsal."""
    if not setting.is_real:
        return None
    return accelerator.peak(setting.device) / GIB


def scored(engine: Engine, rows: Rows, masks: Sequence[Mask]) -> None:
    tasks = [Task(span, tuple(masks)) for span in engine.row_batches(rows, range(len(rows)))]
    for _ in engine.run(tasks, rows):
        pass


def iteration(setting: Setting) -> Iterator[Facts]:
    """The first iteration of the exact search."""
    model = setting.model()
    rows = setting.data(setting.rows, setting.length)
    masks = [DENSE]
    for block in all_blocks(len(decoder_layers(model))):
        masks.append(frozenset({block}))
    flops = Flops.of(model.config.to_dict(), setting.rows, setting.length)
    exact_flops = flops.exact(masks)
    engine = Engine(model)
    # The first pass warms up.
    scored(engine, rows, [DENSE])
    reset_peak(setting)
    seconds, _ = clocked(setting.device, partial(scored, engine, rows, masks))
    yield {
        "masks": len(masks),
        "rows": setting.rows,
        "tokens of each": setting.length,
        "exact iteration, s": seconds,
        "gain over full passes, bound by FLOPs": flops.naive(masks) / exact_flops,
        "PFLOP": exact_flops / 1e15,
        "TFLOP/s": exact_flops / seconds / 1e12,
        "peak memory, GiB": peak(setting),
    }


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={byte: i for i, byte in enumerate(alphabet, 3)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts(setting: Setting) -> list[str]:
    """Random letters that fill the rows of searches, fits and validation."""
    size = max(4 * setting.length, 512)
    count = max(4 * setting.rows * setting.length // size, 16)
    letters = []
    for row in random_rows(26, count, size):
        letters.append(bytes(97 + number for number in row).decode())
    return letters


def refit(setting: Setting) -> Iterator[Facts]:
    """What `blockpruner prune` does by default: searches, refits, and the choice among them."""
    model = setting.model()
    # Blocks differ in importance, as in a trained model.
    for number, weight in enumerate(model.parameters()):
        if weight.dim() == 2 and weight.shape[0] == model.config.hidden_size:
            weight.mul_(0.1 + number * 7 % 11 / 10)
    reset_peak(setting)
    run = partial(
        prune,
        model,
        byte_tokenizer(),
        texts(setting),
        "0.1" if setting.is_real else "0.2",
        seq_len=setting.length,
        num_rows=setting.rows,
        device=str(setting.device),
        observer=SilentObserver(),
    )
    seconds, result = clocked(setting.device, run)
    yield {"removed": result.plan.ratio, "seconds": seconds, "peak memory, GiB": peak(setting)}
    perplexity = result.compensation["perplexity"]
    ratio = perplexity["after"] / perplexity["before"]
    yield at_most("held-out perplexity, refitted relative to pruned", ratio, 1)


def generation(setting: Setting) -> Iterator[Facts]:
    """The dense model and a pruned one over the same tensors."""
    dense = setting.model()
    layers = len(decoder_layers(dense))
    mask = frozenset(BlockId(BlockKind.MHA, layer) for layer in range(layers // 2, layers, 2))
    models_by_name = {"dense": dense, "pruned": prune_(shared_copy(dense), mask)}
    speeds = measure_speed(models_by_name, Speed(prompt_tokens=64, new_tokens=64, repeats=3))
    for name, speed in speeds.items():
        weights = weight_bytes(models_by_name[name])
        yield {
            f"{name}: prefill, tokens/s": speed.prefill_tokens_per_second,
            f"{name}: decode, tokens/s": speed.decode_tokens_per_second,
            f"{name}: weights, GiB": weights / GIB,
            f"{name}: peak ({speed.peak_memory}), GiB": speed.peak_memory_bytes / GIB,
        }
        share = weights / speed.peak_memory_bytes
        yield at_most(f"{name}: weights, relative to the peak of generation", share, 1)
    ratio = speeds["pruned"].peak_memory_bytes / speeds["dense"].peak_memory_bytes
    yield at_most("peak of generation, pruned relative to dense", ratio, 1)


PARTS: Mapping[str, Callable[[Setting], Iterator[Facts]]] = {
    function.__name__: function for function in (iteration, refit, generation)
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{names}; all by default")
    parser.add_argument("--shape", choices=tuple(MODELS), default="llama3-8b")
    parser.add_argument("--memory", type=float, default=24.0, help="GiB of the card to use")
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/gpu.json"))
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - PARTS.keys()
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; valid: {names}")
    device = resolve_device("auto")
    if device.type == "cpu" or options.shape == "tiny":
        setting = Setting("tiny", device, rows=2, length=32)
    else:
        setting = Setting(options.shape, device, rows=16, length=2048)
    if setting.is_real:
        limit_memory(device, options.memory)
    machine = {
        "shape": setting.shape,
        "device": accelerator.name(device) if setting.is_real else NO_DEVICE,
        "commit": commit(),
        "memory": f"{options.memory:g} GiB",
        **environment(),
    }
    print(json.dumps(machine, indent=1), flush=True)
    records: dict[str, Any] = {}
    has_failed = False
    for name in options.parts or PARTS:
        record = records[name] = {"ended": "killed", "facts": {}}
        start = time.perf_counter()
        try:
            for facts in PARTS[name](setting):
                record["facts"] |= facts
                write_json(options.out, {"where": machine, "parts": records})
            record["ended"] = f"{time.perf_counter() - start:.0f} s"
        # A missing kernel or too little memory raises errors of many classes.
        except Exception as error:
            traceback.print_exc()
            has_failed = True
            record["ended"] = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
        write_json(options.out, {"where": machine, "parts": records})
        print(json.dumps({name: record}, indent=1), flush=True)
        gc.collect()
        accelerator.empty_cache()
    return int(has_failed)


def limit_memory(device: torch.device, gib: float) -> None:
    """Let torch and the planning of work use a part of the card."""
    total = accelerator.total_memory(device)
    limit = min(int(gib * GIB), total)
    module = torch.get_device_module(device)
    module.set_per_process_memory_fraction(limit / total)
    accelerator.total_memory = lambda device: limit
    accelerator.free_memory = lambda device: limit - module.memory_allocated(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
