"""Verification of a checkpoint: a fresh process must compute what the model in memory computes.

Decides what the reference holds, what follows from a report, and that it lists the files that were
verified. Each engine has a script that loads and runs a checkpoint (`verify.py` for transformers)
and does not import blockpruner.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from subprocess import TimeoutExpired
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from blockpruner.checkpoints import verify
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.methods.apply import Pruning
from blockpruner.model.classes import has_our_code
from blockpruner.store.files import new_directory, write_sealed_json
from blockpruner.store.manifest import REPORT_FILE, manifest

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""The largest difference of a logit, relative to the largest logit, by the dtype that computes."""

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 12

LIMIT = 1800.0
"""Seconds that a program may take for a checkpoint, plus as many for each GiB of it: far more than
slow disks and few cores need. A program that takes longer hangs."""


@torch.inference_mode()
def reference_outputs(model: PreTrainedModel, plan: Plan) -> dict[str, torch.Tensor]:
    """The outputs of the pruned model of a plan: greedy tokens [B, T + n] from seeded random
    prompts [B, T], and their logits [B, T + n, V], in one pass and token by token through the KV
    cache. bf16 and fp16 are computed in float32, a weight at a time."""
    generator = torch.Generator().manual_seed(0)
    shape = (PROMPTS, PROMPT_TOKENS)
    prompts = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    with verify.in_float32(model):
        cached, tokens, _ = verify.stepped(
            model, prompts.to(model.device), PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS
        )
        logits = model(tokens, use_cache=False).logits
    outputs = {
        "tokens": tokens,
        "logits": logits,
        "cached": cached,
        "attentions": torch.tensor(plan.layers - plan.blocks["mha"]),
        "prompt": torch.tensor(PROMPT_TOKENS),
        "narrow": torch.tensor(model.dtype != torch.float32),
    }
    for name, tensor in outputs.items():
        outputs[name] = tensor.cpu().contiguous().clone()
    return outputs


def load_pruned(pruning: Pruning, reference: Path, **facts: torch.Tensor) -> PreTrainedModel:
    """The pruned model, whose outputs are written to the file `reference`, with more facts for its
    engine."""

    def save_reference(reduced: PreTrainedModel) -> None:
        outputs = reference_outputs(reduced.cpu(), pruning.plan)
        save_file(outputs | facts, reference)

    return pruning.prune_(pruning.load_for_export(), save_reference)


def tolerance_of(model: PreTrainedModel) -> float:
    """The `TOLERANCE` of the dtype in which a model is verified."""
    layer_types = getattr(model.config, "layer_types", None) or ()
    # Eager and linear attention compute a part in float32, even in a model of float64.
    is_rounded = model.config._attn_implementation == "eager" or "linear_attention" in layer_types
    is_float64 = model.dtype is torch.float64 and not is_rounded
    return TOLERANCE[torch.float64 if is_float64 else torch.float32]


def write_verified(
    out: Path, write: Callable[[Path, Path], float], script: ModuleType = verify
) -> None:
    """Write a new checkpoint directory at `out` and verify it; a directory that fails is removed.
    `write` gets the directory and the file for the reference, writes both, and returns the
    tolerance."""

    def build(directory: Path) -> None:
        reference = directory.with_name("reference.safetensors")
        tolerance = write(directory, reference)
        verify_checkpoint(directory, reference, tolerance, script)

    new_directory(out, build)


@contextmanager
def limited(program: str, folder: Path) -> Iterator[float]:
    """The seconds within which a program must have read the checkpoint in a folder; raises
    InputError if it hangs."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    seconds = LIMIT * (1 + size / 2**30)
    try:
        yield seconds
    except TimeoutExpired:
        raise InputError(
            f"{program} did not end within {seconds / 60:.0f} minutes and was stopped. Nothing was"
            " left behind; see that memory and cores are free, and run again",
            rule="engine-hangs",
            value=program,
        ) from None


def verify_checkpoint(
    directory: Path, reference: Path, tolerance: float, script: ModuleType = verify
) -> None:
    """Run an engine's script in a fresh process, and keep its report as verification.json, with the
    manifest. Raises InputError if the checkpoint does not reproduce the reference, or the engine
    hangs. The report of an engine that is not installed is "unchecked". Code that is not ours is
    refused before it could run. The script prints one JSON object when called with checkpoint,
    reference and tolerance. Its ENGINE is the Python module that it needs."""
    has_our_code(directory)
    engine: str = script.ENGINE
    if find_spec(engine) is None:
        report: dict[str, Any] = {
            "ok": None,
            "engine": engine,
            "unchecked": f"{engine} is not installed",
        }
    else:
        report = _run_script(script, directory, reference, tolerance)
    report["manifest"] = manifest(directory)
    write_sealed_json(directory / REPORT_FILE, report)


def _run_script(
    script: ModuleType, directory: Path, reference: Path, tolerance: float
) -> dict[str, Any]:
    """The report of an engine's script; raises InputError if it fails."""
    modules = reference.with_name("modules")
    environment = {
        **os.environ,
        # transformers copies the code of a checkpoint into this cache.
        "HF_MODULES_CACHE": str(modules),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": _python_path(),
    }
    command = [
        sys.executable,
        "-P",
        str(script.__file__),
        str(directory),
        str(reference),
        str(tolerance),
    ]
    try:
        with limited(script.ENGINE, directory) as seconds:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=environment,
                check=False,
                timeout=seconds,
            )
    finally:
        shutil.rmtree(modules, ignore_errors=True)
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        # A report without "ok", or else the last line of a traceback.
        reason = lines[-1] if lines else result.stderr.strip().rpartition("\n")[2]
        raise InputError(
            "the exported checkpoint does not reproduce the model in memory in a fresh process"
            f" ({script.ENGINE}): {reason}. Nothing was left behind; please report this with the"
            " family and the plan"
        )
    return dict(json.loads(lines[-1]))


def _python_path() -> str:
    """PYTHONPATH without the working folder: the script must not import this package from it."""
    variable = os.environ.get("PYTHONPATH", "")
    paths = [path for path in variable.split(os.pathsep) if path]
    home = Path.cwd().resolve()
    return os.pathsep.join(path for path in paths if Path(path).resolve() != home)
