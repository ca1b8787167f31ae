"""`blockpruner doctor`: what this machine has for the command, and how to get what is missing.

Decides what is looked at. No host is contacted.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.table import Table

from blockpruner.checkpoints.gguf import QUANTIZER
from blockpruner.model import accelerator
from blockpruner.reporting.formats import size
from blockpruner.store.provenance import machine

OPTIONAL = {
    "accelerate": "one model over several GPUs",
    "datasets": "texts from the hub",
    "matplotlib": "report, and the pictures of curve",
    "gguf": "--export gguf",
    "xllamacpp": "verifies --export gguf",
    "mlx-lm": "verifies --export nas",
    "lm-eval": "zero-shot tasks",
    "peft": "training after pruning (LoRA)",
    "ray": "several devices and machines",
}
"""Packages that some work needs."""

FREE = 2 * 2**30
"""The least room of the cache folder, which gets a copy of the model."""


@dataclass(frozen=True)
class Checkup:
    """One thing that was looked at."""

    name: str
    found: str
    """What is there; empty if it is missing or does not do."""
    lacks: str = ""
    """What is wrong, where something is."""
    fix: str = ""
    """The command that mends it."""
    needed: bool = True
    """Whether nothing works without it."""

    @property
    def verdict(self) -> str:
        return "ok" if self.found else "missing" if self.needed else "optional"


def look(cache: Path) -> list[Checkup]:
    """Look at this machine.

    Args:
        cache: the folder of `--cache`.
    """
    return [*_packages(), *_devices(), _cache(cache), _quantizer(), _hub()]


def _packages() -> Iterator[Checkup]:
    yield Checkup("Python", platform.python_version())  # an older one does not install this package
    rows = {row.name: row for row in map(Requirement, reversed(requires("blockpruner") or ()))}
    for name, row in sorted(rows.items()):
        needed = row.marker is None
        if not needed and name not in OPTIONAL:
            continue
        try:
            here = version(name)
        except PackageNotFoundError:
            here = ""
        fits = bool(here) and row.specifier.contains(here, prereleases=True)
        purpose = "" if needed else OPTIONAL[name]
        lacks = f"{here} is not {row.specifier}" if here else f"for {purpose}" if purpose else "not installed"
        yield Checkup(name, here if fits else "", lacks, f"pip install '{name}{row.specifier}'", needed)


def _devices() -> Iterator[Checkup]:
    yield Checkup("CPU", f"{machine()}, {torch.get_num_threads()} threads")
    devices = accelerator.devices()
    for device in devices:
        free, whole = accelerator.free_memory(device), accelerator.total_memory(device)
        yield Checkup(str(device), f"{accelerator.name(device)}, {size(free)} of {size(whole)} free")
    if not devices:
        fix = "if there is one: https://pytorch.org/get-started/locally"
        yield Checkup("GPU", "", f"torch {torch.__version__} finds none; the CPU is used", fix, needed=False)


def _cache(folder: Path) -> Checkup:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, fix = shutil.disk_usage(there).free, "choose another folder: --cache DIR"
    if not os.access(there, os.W_OK) or not there.is_dir():
        return Checkup("cache", "", f"{folder} cannot be written", fix)
    return Checkup(
        "cache", f"{folder}, {size(free)} free" if free >= FREE else "", f"{size(free)} free at {folder}", fix
    )


def _quantizer() -> Checkup:
    """It comes with llama.cpp and not with a Python package."""
    found = shutil.which(QUANTIZER) or ""
    fix = f"install llama.cpp, and have {QUANTIZER} on PATH"
    return Checkup(QUANTIZER, found, "for --export gguf:Q4_K_M", fix, needed=False)


def _hub() -> Checkup:
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        return Checkup("hub", "", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE", needed=False)
    return Checkup("hub", "a token is there" if get_token() else "no token: gated models want `hf auth login`")


def words(checks: list[Checkup]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        style = {"ok": "green", "missing": "bold red", "optional": "yellow"}[check.verdict]
        table.add_row(check.name, f"[{style}]{check.verdict}[/]", check.found or f"{check.lacks}: {check.fix}")
    return table
