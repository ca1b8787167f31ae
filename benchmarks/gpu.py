"""What a GPU shows: speed, each with its baseline from the same run. `pytest -m gpu` compares the numbers first.

    python -m benchmarks.gpu [--shape llama2-7b] [--out data/benchmarks/gpu.json] [part ...]

It needs no network and no checkpoint: models have the widths of the shape and random, seeded weights. Without an
accelerator all parts are rehearsed at tiny shapes.

A part is a function of a setting and of `Found`, which keeps each fact in the file as soon as it is known. Keys are
words with units, since they are printed as they are. A part that fails does not stop the others. Prints Markdown; exits
with 1 if a part failed or a check does not hold.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.flops import Flops
from benchmarks.scoring import full_forward, matrix_rate
from benchmarks.shapes import MODELS, random_model, random_rows
from blockpruner.api import Pruned, prune
from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, all_blocks
from blockpruner.evaluation.settings import Speed
from blockpruner.evaluation.speed import measure_speed, weight_bytes
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers, prune_, resolve_device, shared_copy
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Rows, Task
from blockpruner.store.files import read_json, write_json
from blockpruner.store.provenance import commit, environment

NO_DEVICE = "no accelerator: rehearsal at tiny shapes"
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What the parts compute with."""

    shape: str
    """A name of `shapes.MODELS`."""
    device: torch.device
    rows: int
    """Calibration rows."""
    length: int
    """Tokens of a row."""
    layers: int
    """Layers of the smaller model, where depth decides nothing."""
    sample: int
    """Masks that are scored by full forward passes, too."""
    generated: int
    """Tokens of a prompt, and new ones."""

    @property
    def is_real(self) -> bool:
        return self.device.type != "cpu"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def vocabulary(self) -> int:
        return int(MODELS[self.shape]["vocab_size"])

    @property
    def data(self) -> Rows:
        return tuple(map(tuple, random_rows(self.vocabulary, self.rows, self.length)))

    def model(self, layers: int | None = None) -> PreTrainedModel:
        """A model in bfloat16; what is timed does not depend on the values of its weights."""
        changes = {} if layers is None else {"num_hidden_layers": layers}
        return random_model(self.shape, torch.bfloat16, str(self.device), **changes)


def setting_of(shape: str, device: torch.device) -> Setting:
    """The shape's setting; without an accelerator the tiny one."""
    if device.type == "cpu" or shape == "tiny":
        return Setting("tiny", device, 2, 32, 3, 3, 4)
    return Setting(shape, device, 15, 2048, 8, 16, 64)


class Found:
    """The facts and checks of one part; each is written to the file at once."""

    def __init__(self, write: Callable[[Mapping[str, Any]], object]) -> None:
        self._write = write
        self.record: dict[str, Any] = {"ended": "killed", "facts": {}, "checks": []}
        write(self.record)

    def add(self, **facts: Any) -> None:
        self.record["facts"] |= {name.replace("_", " "): value for name, value in facts.items()}
        self._write(self.record)

    def check(self, what: str, value: float, limit: float) -> None:
        """Record whether value <= limit; NaN is not."""
        found = None if math.isnan(value) else value
        self.record["checks"].append({"what": what, "found": found, "at most": limit, "holds": value <= limit})
        self._write(self.record)

    def end(self, how: str) -> None:
        self.record["ended"] = how
        self._write(self.record)


def clean() -> None:
    gc.collect()
    accelerator.empty_cache()


def clocked(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done with some work, and its result."""
    accelerator.synchronize(device)
    started = time.perf_counter()
    result = work()
    accelerator.synchronize(device)
    return time.perf_counter() - started, result


def scored(engine: Engine, rows: Rows, masks: Sequence[Mask]) -> None:
    """Score all rows under each mask."""
    tasks = [Task(span, tuple(masks)) for span in engine.row_batches(rows, range(len(rows)))]
    for _ in engine.run(tasks, rows):
        pass


# -- sweep --


def sweep(s: Setting, found: Found) -> None:
    """The first iteration of the exact search, then some of its masks by full forward passes."""
    model, rows = s.model(), s.data
    flops, masks = Flops.of(model.config.to_dict(), s.rows, s.length), [DENSE]
    masks += [frozenset({block}) for block in all_blocks(len(decoder_layers(model)))]
    engine = Engine(model)
    rate = matrix_rate(model, s.tokens)
    scored(engine, rows, [DENSE])  # to warm up
    if s.is_real:
        accelerator.reset_peak(s.device)
    seconds, _ = clocked(s.device, partial(scored, engine, rows, masks))
    exact = flops.exact(masks)
    found.add(**{
        "masks": len(masks), "rows": s.rows, "tokens of each": s.length, "exact iteration, s": seconds,
        "PFLOP": exact / 1e15, "TFLOP/s": exact / seconds / 1e12, "matrix products alone, TFLOP/s": rate / 1e12,
        "peak memory, GiB": accelerator.peak(s.device) / GIB if s.is_real else None,
    })  # fmt: skip

    some = [masks[i * len(masks) // s.sample] for i in range(min(s.sample, len(masks)))]
    spent, size = 0.0, s.rows
    while s.is_real and size > 1 and 5 * size * s.length * 2 * s.vocabulary > accelerator.free_memory(s.device):
        size = -(-size // 2)
    parts = [torch.tensor(rows[i : i + size], device=s.device) for i in range(0, s.rows, size)]
    full_forward(model, DENSE, parts[0])
    for mask in some:
        for ids in parts:
            spent += clocked(s.device, partial(full_forward, model, mask, ids))[0]
    naive = flops.naive(some) / spent
    found.add(**{
        "full forward passes, rows at once": size, "full forward passes, TFLOP/s": naive / 1e12,
        "gain in time": flops.naive(masks) / naive / seconds, "bound by FLOPs": flops.naive(masks) / exact,
    })  # fmt: skip


# -- refit, export --


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet, 3)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pruned(s: Setting, layers: int, compensation: str) -> tuple[float, Pruned]:
    """Seconds of one-shot pruning of two blocks by the API, and its result."""
    model, letters = s.model(layers), [97 + id_ % 26 for row in random_rows(26, 16, s.length) for id_ in row]
    work = partial(
        prune, model, byte_tokenizer(), [bytes(letters).decode()], "2blocks",
        seq_len=s.length, method="one_shot", compensate=compensation, device=str(s.device),
    )  # fmt: skip
    return clocked(s.device, work)


def refit(s: Setting, found: Found) -> None:
    """The same pruning without refit and with it: what it takes, and that it does no harm on held-out rows."""
    plain, _ = pruned(s, s.layers, "none")
    clean()
    if s.is_real:
        accelerator.reset_peak(s.device)
    seconds, result = pruned(s, s.layers, "refit")
    perplexity = result.compensation["perplexity"]
    found.add(**{
        "layers": s.layers, "pruning alone, s": plain, "refit, s": seconds - plain,
        "tokens": result.compensation["tokens"],
        "peak memory, GiB": accelerator.peak(s.device) / GIB if s.is_real else None,
    })  # fmt: skip
    found.check("held-out perplexity, refitted relative to pruned", perplexity["after"] / perplexity["before"], 1.0)


def export(s: Setting, found: Found) -> None:
    """A checkpoint written and verified in a fresh process; one that differs from the pruned model raises."""
    _, result = pruned(s, min(4, s.layers), "none")
    with tempfile.TemporaryDirectory() as folder:
        seconds, places = clocked(s.device, partial(result.save_pretrained, Path(folder) / "out"))
        report = read_json(places["hf"] / "verification.json")
    found.add(seconds=seconds, **{key: value for key, value in report.items() if isinstance(value, bool | float)})


# -- generation --


def generation(s: Setting, found: Found) -> None:
    """The dense model and a pruned one over the same tensors."""
    dense = s.model()
    layers = len(decoder_layers(dense))
    mask = frozenset(BlockId(BlockKind.MHA, layer) for layer in range(layers // 2, layers, 2))
    both = {"dense": dense, "pruned": prune_(shared_copy(dense), mask)}
    measured = measure_speed(both, Speed(prompt_tokens=s.generated, new_tokens=s.generated, repeats=3))
    for name, speed in measured.items():
        found.add(**{
            f"{name}: prefill, tokens/s": speed.prefill_tokens_per_second,
            f"{name}: decode, tokens/s": speed.decode_tokens_per_second,
            f"{name}: weights, GiB": weight_bytes(both[name]) / GIB,
            f"{name}: peak ({speed.peak_memory}), GiB": speed.peak_memory_bytes / GIB,
        })  # fmt: skip
        what = f"{name}: weights, relative to the peak of generation"
        found.check(what, weight_bytes(both[name]) / speed.peak_memory_bytes, 1)
    fewer = measured["pruned"].peak_memory_bytes / measured["dense"].peak_memory_bytes
    found.check("peak of generation, pruned relative to dense", fewer, 1)


PARTS: Mapping[str, tuple[str, Callable[[Setting, Found], None]]] = {
    "sweep": ("How fast is an exact iteration, and how fast are full forward passes in the same run?", sweep),
    "refit": ("What does refit take, and does it do no harm?", refit),
    "export": ("Is a checkpoint written and verified, and how fast?", export),
    "generation": ("How fast is generation, dense and pruned?", generation),
}


def text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "–" if value is None else str(value)


def page(name: str, record: Mapping[str, Any]) -> str:
    """A part as Markdown."""
    lines = [f"\n## {name}: {record['ended']}\n", f"{PARTS[name][0]}\n", "| | |", "|---|---:|"]
    lines += [f"| {key} | {text(value)} |" for key, value in record["facts"].items()]
    for check in record["checks"]:
        holds = "holds" if check["holds"] else "**does not hold**"
        lines.append(f"| {check['what']}: at most {text(check['at most'])} {holds} | {text(check['found'])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all, if none is given")
    parser.add_argument("--shape", choices=tuple(MODELS), default="llama2-7b")
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/gpu.json"))
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"unknown part {', '.join(sorted(unknown))}; valid: {', '.join(PARTS)}")
    s = setting_of(given.shape, resolve_device("auto"))
    place = {"shape": s.shape, "device": accelerator.name(s.device) if s.is_real else NO_DEVICE, "commit": commit()}
    kept: dict[str, Any] = {"where": place | environment(), "parts": {}}
    print(f"# {s.shape} on {place['device']}", flush=True)
    for name in given.parts or PARTS:
        found = Found(lambda record, name=name: write_json(given.out, kept | {"parts": kept["parts"] | {name: record}}))
        kept["parts"][name] = found.record
        started = time.perf_counter()
        try:
            PARTS[name][1](s, found)
            found.end(f"{time.perf_counter() - started:.0f} s")
        except Exception as error:  # also errors of kernels
            traceback.print_exc()
            found.end(f"failed: {type(error).__name__}: {str(error).strip()[:300]}")
        print(page(name, found.record), flush=True)
        clean()
    records = kept["parts"].values()
    return int(not all(r["ended"].endswith(" s") and all(c["holds"] for c in r["checks"]) for r in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
