"""The peak memory of a device, by part of the work, without the device: a calculation from shapes.

    python -m benchmarks.memory [llama2-7b | llama2-13b | tiny] [GB of the device]

Each part runs on a made-up device whose tensors have shapes and no values (`tests/fake_devices.py`), in bfloat16 and
with fused attention. What a device holds beside tensors (its context, a kernel's workspace, gaps between tensors) is
not counted. Exports run on the CPU: their rows are of main memory, for which the made-up device stands.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import PreTrainedModel, Trainer

from benchmarks.shapes import MODELS, random_model, random_rows
from blockpruner.checkpoints import gguf, nas, verify
from blockpruner.checkpoints.packing import pack_model
from blockpruner.checkpoints.verification import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, in_float32
from blockpruner.core.blocks import DENSE, Mask, parse_mask
from blockpruner.core.errors import DeviceMemoryError
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import HubTexts, Speed, Train
from blockpruner.evaluation.choices import DEVICE_TOKENS, answers
from blockpruner.evaluation.perplexity import measure_perplexity
from blockpruner.evaluation.speed import measure_speed
from blockpruner.healing.trainer import train_
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.healed import set_weights_
from blockpruner.model.models import masked, prune_, shared_copy
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.work import Task
from tests.fake_devices import Card, fake_devices, start_gradients

LENGTH, SPEED = 2048, Speed(prompt_tokens=254, new_tokens=2, repeats=1)
"""Tokens of a row; and a generation whose KV cache ends as large as that of 128 + 128 tokens."""


def removed(layers: int) -> Mask:
    """Of 32 layers 12 MHA and 5 MLP blocks, 22 % of Llama2-7B: as many as the paper removes."""
    mha, mlp = range(layers - layers * 3 // 8 - 1, layers - 1), range(layers - layers * 5 // 32 - 1, layers - 1)
    return parse_mask(",".join([*(f"mha.{layer}" for layer in mha), *(f"mlp.{layer}" for layer in mlp)]))


def score(model: PreTrainedModel, mask: Mask, rows: list[list[int]]) -> None:
    """One batch of a sweep, by perplexity and by JS divergence, in the batches that a CUDA device gets."""
    engine, masks = Engine(model), (DENSE, *(mask | parse_mask(block) for block in ("mlp.0", "mha.1", "mlp.1")))
    batch = engine.row_batches(rows, range(len(rows)))[0]
    with patch.object(Engine, "_widens", True):
        list(engine.run([Task(batch, masks), Task(batch, masks, METRICS["js"])], rows))


def evaluate(model: PreTrainedModel, rows: list[list[int]]) -> None:
    measure_perplexity(model, rows[:1])
    items = [(n, *rows[0][:99]) for n in range(DEVICE_TOKENS // 100)]  # which fill a pass
    answers(model, [(item, tuple(rows[1][k : k + 20])) for item in items for k in range(4)], LENGTH)


def time(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    measure_speed({"pruned": pruned, "dense": dense}, SPEED)


def export(model: PreTrainedModel, mask: Mask, form: str) -> None:
    """What the reference and the files of a format take; widths are those of `checkpoints`."""
    tokens = torch.zeros(PROMPTS, PROMPT_TOKENS + NEW_TOKENS, dtype=torch.long).to(model.device)
    with masked(model, mask), in_float32(model), torch.inference_mode():
        model(tokens, use_cache=False)
        verify.stepped(model, tokens, PROMPT_TOKENS)
    pruned = prune_(model, mask)
    parts = pack_model(pruned)
    if form == "nas":
        list(nas.nas_weights(pruned, parts).items())
    else:
        for _, tensor in gguf.tensors(pruned, parts, "deci"):
            tensor.float()


def train(model: PreTrainedModel, teacher: PreTrainedModel | None, rows: list[list[int]], **how: object) -> None:
    """A step of four rows."""
    recipe = Train(data=HubTexts(source="hub", repo="a/b"), distill=float(teacher is not None), **how)
    with tempfile.TemporaryDirectory() as folder, patch.object(Trainer, "_save_checkpoint"):
        train_(
            model, CalibrationSet(tuple(map(tuple, rows[:4]))), recipe, teacher=teacher, validation=None,
            states=Path(folder), observer=SilentObserver(),
        )  # fmt: skip


def peak(card: Card, work: Callable[[], object]) -> int:
    """Bytes, of what lives at most while this runs."""
    gc.collect()
    before, card.peak = card.live, card.live
    work()
    found = card.peak - before
    gc.collect()
    return found


def parts(shape: str, rows: list[list[int]]) -> Mapping[str, Callable[[], object]]:
    """By title, what is done; each makes its models itself."""
    mask = removed(int(MODELS[shape]["num_hidden_layers"]))

    def dense() -> PreTrainedModel:
        return random_model(shape, torch.bfloat16, "gpu:0")

    def shared(*changed: str) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The dense model, and the pruned one with weights of its own where their names say so."""
        whole = dense()
        pruned = prune_(shared_copy(whole), mask)
        own = {
            name: weight.clone() for name, weight in pruned.named_parameters() if any(part in name for part in changed)
        }
        set_weights_(pruned, own, shared=True)
        return whole, pruned

    def student(teacher: bool, **how: object) -> None:
        whole, pruned = shared()
        train(pruned, whole if teacher else None, rows, **how)

    def alone(**how: object) -> None:
        train(prune_(dense(), mask), None, rows, **how)

    return {
        "score": lambda: score(dense(), frozenset(), rows),
        "benchmark: perplexity and tasks": lambda: evaluate(dense(), rows),
        "benchmark: speed": lambda: time(*shared()),
        "benchmark: speed, refitted": lambda: time(*shared("o_proj", "down_proj")),
        "benchmark: speed, trained": lambda: time(*shared("proj")),
        "train: LoRA": lambda: alone(),
        "train: LoRA, distilled": lambda: student(True),
        "train: all weights": lambda: alone(weights="all"),
        "export: nas (main memory)": lambda: export(dense(), mask, "nas"),
        "export: gguf (main memory)": lambda: export(dense(), mask, "gguf"),
    }


def main(shape: str, gigabytes: float) -> int:
    start_gradients()
    rows = random_rows(int(MODELS[shape]["vocab_size"]), 15, LENGTH)
    print(f"| {shape}, bfloat16 | peak, GB |\n|---|---:|")
    for title, work in parts(shape, rows).items():
        with fake_devices(1, hollow=True) as (card,):
            card.limit = int(1e9 * gigabytes) if title == "score" else card.limit  # its batches are what fits
            try:
                found = f"{peak(card, work) / 1e9:.1f}"
            except DeviceMemoryError as error:
                found = str(error)
        print(f"| {title} | {found} |", flush=True)
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    if given and given[0] not in MODELS:
        sys.exit(f"shape {given[0]!r} is unknown; valid: {', '.join(MODELS)}")
    sys.exit(main(given[0] if given else "llama2-7b", float(given[1]) if len(given) > 1 else 24.0))
