"""What a GPU shows: that `blockpruner prune` and training run there, and how fast, each with its
baseline from the run.

    python -m benchmarks.gpu [--shape llama3-8b] [--memory 24]
        [--out data/benchmarks/gpu.json] [part ...]

It needs no network and no checkpoint: models have the widths of the shape and random, seeded
weights. A large card is held to `--memory` GiB, as a small one. Without an accelerator all parts
are rehearsed at tiny shapes.

A part yields facts, and each is in the file as soon as it is known. Keys are words with units,
since they are printed as they are. The parts that say most come first, and one that fails does not
stop the others. Prints what the file holds; exits with 1 if a part failed.
"""

import argparse
import gc
import json
import sys
import tempfile
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
from blockpruner.healing.settings import Train
from blockpruner.healing.trainer import train_
from blockpruner.inputs.calibration import CalibrationSet
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
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.uniform_(-bound, bound)
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
        parameters, (heads, _, width) = count_parameters(config).blocks, attention_heads(config)
        tokens, hidden = rows * length, int(config["hidden_size"])
        head, attention = 2 * hidden * int(config["vocab_size"]), 4 * length * heads * width
        blocks = {  # the parameters of a block are those of its matrices and its norm
            block: (
                tokens
                * (
                    2 * (parameters[block] - hidden)
                    + (attention if block.kind is BlockKind.MHA else 0)
                )
            )
            for (block,) in steps_of(int(config["num_hidden_layers"]), parallel=False)
        }
        return cls(blocks, rows * (length - 1) * head, tokens * head)

    def naive(self, masks: Sequence[Mask]) -> int:
        """One full forward pass for each mask, with logits of every token."""
        passes = sum(
            cost for mask in masks for block, cost in self.blocks.items() if block not in mask
        )
        return passes + len(masks) * self.full_head

    def exact(self, masks: Sequence[Mask]) -> int:
        ran = runs([(block,) for block in self.blocks], masks)
        return (
            sum(self.blocks[block] for _, blocks in ran for block in blocks)
            + len(masks) * self.head
        )


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


def at_most(what: str, value: float, limit: float) -> Facts:
    """A fact; raises ValueError if the value is above the limit, or NaN."""
    if value <= limit:
        return {f"{what}; at most {limit:g}": value}
    raise ValueError(f"{what} is {value:.4g}, and at most {limit:g} is right")


def clocked(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done with some work, and its result."""
    accelerator.synchronize(device)
    started = time.perf_counter()
    result = work()
    accelerator.synchronize(device)
    return time.perf_counter() - started, result


def peak(s: Setting, reset: bool = False) -> float | None:
    """GiB that tensors took at once since the last reset."""
    if s.is_real and reset:
        accelerator.reset_peak(s.device)
    return accelerator.peak(s.device) / GIB if s.is_real else None


def scored(engine: Engine, rows: Rows, masks: Sequence[Mask]) -> None:
    tasks = [Task(span, tuple(masks)) for span in engine.row_batches(rows, range(len(rows)))]
    for _ in engine.run(tasks, rows):
        pass


def machine(s: Setting) -> Iterator[Facts]:
    """Rates of products on the card, and of copies between it and the host."""
    size, count = (4096, 2**28) if s.is_real else (64, 2**20)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(size, size, device=s.device).to(dtype)
        seconds = min(clocked(s.device, partial(torch.mm, x, x))[0] for _ in range(5))
        yield {f"products in {dtype}, TFLOP/s": 2 * size**3 / seconds / 1e12}
    here, there = (
        torch.zeros(count, dtype=torch.uint8),
        torch.zeros(count, dtype=torch.uint8, device=s.device),
    )
    for name, host in (("pageable", here), ("pinned", here.pin_memory() if s.is_real else here)):
        for way, target, source in (("to the card", there, host), ("from the card", host, there)):
            seconds = min(clocked(s.device, partial(target.copy_, source))[0] for _ in range(3))
            yield {f"copies {way}, {name}, GB/s": count / seconds / 1e9}


def iteration(s: Setting) -> Iterator[Facts]:
    """The first iteration of the exact search."""
    model, rows = s.model(), s.data(s.rows, s.length)
    flops, masks = Flops.of(model.config.to_dict(), s.rows, s.length), [DENSE]
    masks += [frozenset({block}) for block in all_blocks(len(decoder_layers(model)))]
    engine = Engine(model)
    scored(engine, rows, [DENSE])  # to warm up
    peak(s, reset=True)
    seconds, _ = clocked(s.device, partial(scored, engine, rows, masks))
    exact = flops.exact(masks)
    yield {
        "masks": len(masks),
        "rows": s.rows,
        "tokens of each": s.length,
        "exact iteration, s": seconds,
        "gain over full passes, bound by FLOPs": flops.naive(masks) / exact,
        "PFLOP": exact / 1e15,
        "TFLOP/s": exact / seconds / 1e12,
        "peak memory, GiB": peak(s),
    }


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={byte: i for i, byte in enumerate(alphabet, 3)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts(s: Setting) -> list[str]:
    """Letters that fill the rows of searches, fits and judging."""
    size = max(4 * s.length, 512)
    count = max(4 * s.rows * s.length // size, 16)
    return [bytes(97 + id_ for id_ in row).decode() for row in random_rows(26, count, size)]


class Phases(SilentObserver):
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = ("", 0.0)

    def begin(self, phase: str, overall: float | None = None) -> None:
        self._begun = (phase.partition(",")[0], time.perf_counter())

    def end(
        self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False
    ) -> None:
        phase, began = self._begun
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def recommended(s: Setting) -> Iterator[Facts]:
    """What `blockpruner prune` does by default: widths, searches, refits, and the choice among
    them."""
    model, phases = s.model(), Phases()
    # blocks that matter differently, as in a trained model
    for number, weight in enumerate(model.parameters()):
        if weight.dim() == 2 and weight.shape[0] == model.config.hidden_size:
            weight.mul_(0.1 + number * 7 % 11 / 10)
    peak(s, reset=True)
    options: dict[str, Any] = {
        "seq_len": s.length,
        "num_rows": s.rows,
        "device": str(s.device),
        "observer": phases,
    }
    budget = "0.1" if s.is_real else "0.2"
    seconds, result = clocked(
        s.device, partial(prune, model, byte_tokenizer(), texts(s), budget, **options)
    )
    yield {"layers": len(decoder_layers(model)), "removed": result.plan.ratio, "seconds": seconds}
    yield {f"{phase}, s": spent for phase, spent in phases.seconds.items()} | {
        "peak memory, GiB": peak(s)
    }
    perplexity = result.compensation["perplexity"]
    yield at_most(
        "held-out perplexity, refitted relative to pruned",
        perplexity["after"] / perplexity["before"],
        1,
    )


def training(s: Setting) -> Iterator[Facts]:
    """Ten distilled steps of adapters, student and teacher over the same tensors."""
    dense = s.model()
    layers = len(decoder_layers(dense))
    student = prune_(shared_copy(dense), frozenset({BlockId(BlockKind.MLP, layers // 2)}))
    rows = CalibrationSet(s.data(20, min(512, s.length)))
    recipe = Train(
        data={"source": "path", "path": "random"},
        distill=1.0,
        batch=2,
        accumulation=1,
        learning_rate=1e-3,
    )
    peak(s, reset=True)
    with tempfile.TemporaryDirectory() as folder:
        rest = {
            "teacher": dense,
            "validation": None,
            "states": Path(folder),
            "observer": SilentObserver(),
        }
        seconds, facts = clocked(s.device, partial(train_, student, rows, recipe, **rest))
    losses = facts["losses"]
    yield {"tokens of a step": 2 * len(rows.rows[0]), "seconds of a step": seconds / len(losses)}
    yield {"first loss": losses[0], "last loss": losses[-1], "peak memory, GiB": peak(s)}


def generation(s: Setting) -> Iterator[Facts]:
    """The dense model and a pruned one over the same tensors."""
    dense = s.model()
    layers = len(decoder_layers(dense))
    mask = frozenset(BlockId(BlockKind.MHA, layer) for layer in range(layers // 2, layers, 2))
    both = {"dense": dense, "pruned": prune_(shared_copy(dense), mask)}
    measured = measure_speed(both, Speed(prompt_tokens=64, new_tokens=64, repeats=3))
    for name, speed in measured.items():
        yield {
            f"{name}: prefill, tokens/s": speed.prefill_tokens_per_second,
            f"{name}: decode, tokens/s": speed.decode_tokens_per_second,
            f"{name}: weights, GiB": weight_bytes(both[name]) / GIB,
            f"{name}: peak ({speed.peak_memory}), GiB": speed.peak_memory_bytes / GIB,
        }
    for name, speed in measured.items():
        what = f"{name}: weights, relative to the peak of generation"
        yield at_most(what, weight_bytes(both[name]) / speed.peak_memory_bytes, 1)
    fewer = measured["pruned"].peak_memory_bytes / measured["dense"].peak_memory_bytes
    yield at_most("peak of generation, pruned relative to dense", fewer, 1)


PARTS: Mapping[str, Callable[[Setting], Iterator[Facts]]] = {
    part.__name__: part for part in (machine, iteration, training, recommended, generation)
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all, if none is given"
    )
    parser.add_argument("--shape", choices=tuple(MODELS), default="llama3-8b")
    parser.add_argument(
        "--memory", type=float, default=24.0, help="GiB of the card that may be used"
    )
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/gpu.json"))
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"unknown part {', '.join(sorted(unknown))}; valid: {', '.join(PARTS)}")
    device = resolve_device("auto")
    s = Setting(given.shape, device, rows=16, length=2048)
    if device.type == "cpu" or given.shape == "tiny":
        s = Setting("tiny", device, rows=2, length=32)
    if s.is_real:
        room = min(int(given.memory * GIB), accelerator.total_memory(s.device))
        torch.get_device_module(s.device).set_per_process_memory_fraction(
            room / accelerator.total_memory(s.device)
        )
        accelerator.total_memory = lambda device: room
        accelerator.free_memory = lambda device: (
            room - torch.get_device_module(device).memory_allocated(device)
        )
    place = {
        "shape": s.shape,
        "device": accelerator.name(s.device) if s.is_real else NO_DEVICE,
        "commit": commit(),
    }
    place["memory"] = f"{given.memory:g} GiB"
    kept: dict[str, Any] = {"where": place | environment(), "parts": {}}
    print(json.dumps(kept["where"], indent=1), flush=True)
    for name in given.parts or PARTS:
        record = kept["parts"][name] = {"ended": "killed", "facts": {}}
        started = time.perf_counter()
        try:
            for facts in PARTS[name](s):
                record["facts"] |= facts
                write_json(given.out, kept)
            record["ended"] = f"{time.perf_counter() - started:.0f} s"
        except Exception as error:  # also errors of kernels
            traceback.print_exc()
            record["ended"] = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
        write_json(given.out, kept)
        print(json.dumps({name: record}, indent=1), flush=True)
        gc.collect()
        accelerator.empty_cache()
    return int(any(record["ended"].startswith("failed") for record in kept["parts"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
