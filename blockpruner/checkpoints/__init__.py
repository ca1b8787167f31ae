"""Checkpoint formats: EXPORTS, one function each; every one verifies what it wrote."""

from __future__ import annotations

from blockpruner.checkpoints.hf import export_hf
from blockpruner.checkpoints.nas import export_nas

EXPORTS = {"hf": export_hf, "nas": export_nas}
