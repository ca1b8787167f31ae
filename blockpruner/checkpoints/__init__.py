"""Checkpoint formats: EXPORTS, one function each; every one verifies what it wrote."""

from __future__ import annotations

from blockpruner.checkpoints.gguf import export_gguf
from blockpruner.checkpoints.hf import export_hf
from blockpruner.checkpoints.nas import export_nas
from blockpruner.checkpoints.zeroed import export_zeroed

EXPORTS = {"hf": export_hf, "nas": export_nas, "gguf": export_gguf, "zeroed": export_zeroed}
