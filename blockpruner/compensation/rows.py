"""The rows that a compensation is fitted to and judged by: joined rows of texts of which none is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from blockpruner.core.healing_settings import Compensate
from blockpruner.inputs.calibration import CalibrationSet, fill_rows, without_evaluated
from blockpruner.inputs.settings import Calibration


def compensation_rows(
    texts: Sequence[str], tokenizer: Any, wanted: Compensate, evaluated: Iterable[str], context: int
) -> CalibrationSet:
    """Draw at most `wanted.num_rows` full rows, every token of which counts.

    Args:
        evaluated: texts on which models are evaluated; those that share a paragraph with one are not drawn.
        context: the longest row that the model takes.
    """
    joined = Calibration(seq_len=min(wanted.seq_len, context), split="all", score="all", seed=wanted.seed)
    pool = without_evaluated(texts, evaluated)
    return fill_rows(pool, tokenizer, joined, wanted.num_rows, "compensate.num_rows", at_most=True)
