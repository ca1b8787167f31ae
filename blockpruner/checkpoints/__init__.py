"""Checkpoint formats: EXPORTS, one function each; every one verifies what it wrote."""

from __future__ import annotations

from blockpruner.checkpoints.hf import export_hf
from blockpruner.checkpoints.zeroed import export_zeroed

EXPORTS = {"hf": export_hf, "zeroed": export_zeroed}
