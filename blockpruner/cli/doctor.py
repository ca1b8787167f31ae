"""`blockpruner doctor`: what this machine has for the command, and how to get what is missing. No
host is contacted."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from blockpruner.checkpoints.registry import QUANTIZER
from blockpruner.core.errors import package
from blockpruner.model import accelerator
from blockpruner.model.rates import product_rate
from blockpruner.reporting.formats import size
from blockpruner.store.provenance import machine

OPTIONAL = {
    "datasets": "texts from the hub",
    "matplotlib": "report",
    "gguf": "--export gguf",
    "xllamacpp": "the check of --export gguf",
    "mlx-lm": "the check of --export nas and mlx",
    "lm-eval": "zero-shot tasks",
    "peft": "--train lora",
    "ray": "several devices and machines",
}
"""Packages that some work needs."""

FREE = 2 * 2**30
"""The least free room. The hub's cache gets models; the folder of --cache gets links to them."""


@dataclass(frozen=True)
class Checkup:
    """One thing that was looked at."""

    name: str
    present: str
    """What this machine has; empty if it is missing or cannot be used."""
    problem: str = ""
    """What is wrong, and the command that mends it; shown if nothing is present."""
    is_required: bool = True
    """Whether nothing works without it."""

    @property
    def verdict(self) -> str:
        if self.present:
            return "ok"
        return "missing" if self.is_required else "optional"


def look(cache: Path) -> Iterator[Checkup]:
    """Look at this machine; `cache` is the folder of `--cache`."""
    # An older Python does not install this package, so its version is never wrong.
    yield Checkup("Python", platform.python_version())
    requirements = map(Requirement, reversed(requires("blockpruner") or ()))
    requirement_by_name = {requirement.name: requirement for requirement in requirements}
    for name, requirement in sorted(requirement_by_name.items()):
        # A requirement with a marker belongs to an extra.
        if requirement.marker is None or name in OPTIONAL:
            yield _package(requirement)
    rates = []
    for dtype in ("float32", "bfloat16", "float16"):
        rates.append(f"{dtype} {product_rate(dtype) / 1e9:.0f}")
    threads = torch.get_num_threads()
    yield Checkup("CPU", f"{machine()}, {threads} threads; GFLOP/s: {', '.join(rates)}")
    devices = accelerator.devices()
    for device in devices:
        free = size(accelerator.free_memory(device))
        total = size(accelerator.total_memory(device))
        yield Checkup(str(device), f"{accelerator.name(device)}, {free} of {total} free")
    if not devices:
        problem = f"torch {torch.__version__} finds none; the CPU is used"
        yield Checkup("GPU", "", problem, is_required=False)
    yield _folder("cache", cache, "--cache DIR", is_required=True)
    # Downloads may lie there already, so a full disk need not matter.
    downloads = Path(constants.HF_HUB_CACHE)
    yield _folder("downloads", downloads, "the environment variable HF_HOME", is_required=False)
    # The quantizer comes with llama.cpp and not with a Python package.
    program = shutil.which(QUANTIZER) or ""
    problem = f"for --export gguf:Q4_K_M: have llama.cpp's {QUANTIZER} on PATH"
    yield Checkup(QUANTIZER, program, problem, is_required=False)


def _folder(name: str, folder: Path, setting: str, is_required: bool) -> Checkup:
    """Whether a folder can be written and has room; `setting` names another one."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = 0
    if os.access(existing, os.W_OK) and existing.is_dir():
        free = shutil.disk_usage(existing).free
    room = f"{folder}, {size(free)} free"
    problem = f"{room} to write: choose another folder: {setting}"
    return Checkup(name, room if free >= FREE else "", problem, is_required)


def _package(requirement: Requirement) -> Checkup:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        installed = ""
        problem = f"for {OPTIONAL.get(requirement.name, 'all work')}"
    else:
        problem = f"{installed} is not {requirement.specifier}"
        if requirement.specifier.contains(installed, prereleases=True):
            return Checkup(requirement.name, installed)
    extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
    command = f"pip install {package(extra[1] if extra else '')}"
    problem = f"{problem}: in a clone of blockpruner, {command}"
    return Checkup(requirement.name, "", problem, is_required=requirement.marker is None)


def table_of(checks: list[Checkup]) -> Table:
    """A line for each thing that was looked at."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        style = {"ok": "green", "missing": "bold red", "optional": "yellow"}[check.verdict]
        table.add_row(check.name, Text(check.verdict, style), check.present or check.problem)
    return table
