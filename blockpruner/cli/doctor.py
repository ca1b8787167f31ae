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
    name: str
    found: str
    """What is there; empty if it is missing or does not do."""
    lacks: str = ""
    """What is wrong, where something is, and the command that mends it."""
    needed: bool = True
    """Whether nothing works without it."""

    @property
    def verdict(self) -> str:
        return "ok" if self.found else "missing" if self.needed else "optional"


def look(cache: Path) -> Iterator[Checkup]:
    """Look at this machine; `cache` is the folder of `--cache`."""
    yield Checkup("Python", platform.python_version())  # an older one does not install this package
    rows = {row.name: row for row in map(Requirement, reversed(requires("blockpruner") or ()))}
    for name, row in sorted(rows.items()):
        if row.marker is None or name in OPTIONAL:
            yield _package(row)
    rates = ", ".join(
        f"{dtype} {product_rate(dtype) / 1e9:.0f}" for dtype in ("float32", "bfloat16", "float16")
    )
    yield Checkup("CPU", f"{machine()}, {torch.get_num_threads()} threads; GFLOP/s: {rates}")
    devices = accelerator.devices()
    for device in devices:
        free, whole = accelerator.free_memory(device), accelerator.total_memory(device)
        yield Checkup(
            str(device), f"{accelerator.name(device)}, {size(free)} of {size(whole)} free"
        )
    if not devices:
        yield Checkup(
            "GPU", "", f"torch {torch.__version__} finds none; the CPU is used", needed=False
        )
    for name, place, fix in (
        ("cache", cache, "--cache DIR"),
        ("downloads", Path(constants.HF_HUB_CACHE), "the environment variable HF_HOME"),
    ):
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(there).free if os.access(there, os.W_OK) and there.is_dir() else 0
        found = f"{place}, {size(free)} free"
        lacks = f"{found} to write: choose another folder: {fix}"
        # downloads may be there
        yield Checkup(name, found if free >= FREE else "", lacks, needed=name == "cache")
    program = shutil.which(QUANTIZER) or ""  # it comes with llama.cpp and not with a Python package
    yield Checkup(
        QUANTIZER,
        program,
        f"for --export gguf:Q4_K_M: have llama.cpp's {QUANTIZER} on PATH",
        needed=False,
    )


def _package(row: Requirement) -> Checkup:
    try:
        here = version(row.name)
    except PackageNotFoundError:
        here = ""
    fits = bool(here) and row.specifier.contains(here, prereleases=True)
    lacks = (
        f"{here} is not {row.specifier}" if here else f"for {OPTIONAL.get(row.name, 'all work')}"
    )
    extra = re.search(r'extra == "(\w+)"', str(row.marker))
    lacks = f"{lacks}: in a clone of blockpruner, pip install {package(extra[1] if extra else '')}"
    return Checkup(row.name, here if fits else "", lacks, needed=row.marker is None)


def words(checks: list[Checkup]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        style = {"ok": "green", "missing": "bold red", "optional": "yellow"}[check.verdict]
        table.add_row(check.name, Text(check.verdict, style), check.found or check.lacks)
    return table
