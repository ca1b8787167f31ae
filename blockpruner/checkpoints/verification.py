"""Verification of a checkpoint: a fresh process must compute what the model in memory computes.

Decides what the reference holds, what a report leads to, and that it lists the files that were
verified. Each engine has a script of its own that loads and runs a checkpoint (`verify.py` for
transformers) and knows nothing of blockpruner.
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
from transformers import PreTrainedModel

from blockpruner.checkpoints import verify
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.model.classes import has_our_code
from blockpruner.store.files import new_directory, write_sealed_json
from blockpruner.store.manifest import REPORT_FILE, manifest

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""By the dtype that is computed in: the largest difference of a logit, relative to the largest
logit."""

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 12

LIMIT = 1800.0
"""Seconds that a program may take for a checkpoint, and so many more for each GiB of it: far more
than slow disks and few cores need. What takes longer hangs."""


@torch.inference_mode()
def reference_outputs(model: PreTrainedModel, plan: Plan) -> dict[str, torch.Tensor]:
    """What the pruned model of a plan computes: greedy tokens [B, T + n] from seeded random prompts
    [B, T], and their logits, in one pass and token by token through the KV cache. 16 bits are
    computed in float32, a weight at a time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, model.config.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=generator
    ).to(model.device)
    with verify.in_float32(model):
        cached, tokens, _ = verify.stepped(model, ids, PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS)
        logits = model(tokens, use_cache=False).logits
    attentions = torch.tensor(plan.layers - plan.blocks["mha"])
    result = {"tokens": tokens, "logits": logits, "cached": cached, "attentions": attentions}
    result["prompt"] = torch.tensor(PROMPT_TOKENS)
    return {name: tensor.cpu().contiguous().clone() for name, tensor in result.items()}


def tolerance_of(model: PreTrainedModel) -> float:
    """`TOLERANCE` of what a model is verified in; that of float32 for eager and linear attention,
    never wider."""
    is_hybrid = "linear_attention" in (getattr(model.config, "layer_types", None) or ())
    is_wide = (
        model.dtype is torch.float64
        and model.config._attn_implementation != "eager"
        and not is_hybrid
    )
    return TOLERANCE[torch.float64 if is_wide else torch.float32]


def write_verified(
    out: Path, write: Callable[[Path, Path], float], script: ModuleType = verify
) -> None:
    """Write a new checkpoint directory at `out` and verify it; a directory that fails does not
    exist. `write` is called with the directory and with the file for the reference, which it
    writes; it returns the tolerance."""

    def build(directory: Path) -> None:
        reference = directory.with_name("reference.safetensors")
        tolerance = write(directory, reference)
        verify_checkpoint(directory, reference, tolerance, script)

    new_directory(out, build)


@contextmanager
def limited(program: str, folder: Path) -> Iterator[float]:
    """Within, a program reads the checkpoint in a folder, for the yielded seconds at most;
    InputError if it hangs."""
    seconds = LIMIT * (1 + sum(path.stat().st_size for path in folder.iterdir()) / 2**30)
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
    engine: str = script.ENGINE
    has_our_code(directory)
    if find_spec(engine) is None:
        report: dict[str, Any] = {
            "ok": None,
            "engine": engine,
            "unchecked": f"{engine} is not installed",
        }
        write_sealed_json(directory / REPORT_FILE, report | {"manifest": manifest(directory)})
        return
    modules = reference.with_name("modules")
    environment = os.environ | {
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
        with limited(engine, directory) as limit:
            result = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False, timeout=limit
            )
    finally:
        shutil.rmtree(modules, ignore_errors=True)
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        said = lines[-1] if lines else result.stderr.strip().rpartition("\n")[2]
        raise InputError(
            "the exported checkpoint does not reproduce the model in memory in a fresh process"
            f" ({engine}): {said}. Nothing was left behind; please report this with the family and"
            " the plan"
        )
    write_sealed_json(
        directory / REPORT_FILE, json.loads(lines[-1]) | {"manifest": manifest(directory)}
    )


def _python_path() -> str:
    """PYTHONPATH without the working folder: packages come from the rest of it, as for this
    process."""
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(path for path in named if Path(path).resolve() != Path.cwd().resolve())
