"""Checkpoint formats: EXPORTS, one function each; every one verifies what it wrote."""

from __future__ import annotations

from blockpruner.checkpoints.gguf import export_gguf
from blockpruner.checkpoints.hf import export_hf

EXPORTS = {"hf": export_hf, "gguf": export_gguf}
