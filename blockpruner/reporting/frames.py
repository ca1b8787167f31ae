"""Tables of data frames. Decides how a column is called and rounded.

A number's standard error and the ends of its interval are columns of their own, named after it:
avg_pct, avg_pct_se, ppl_x, ppl_x_low, ppl_x_high.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from blockpruner.reporting.statistics import Effect
from blockpruner.reporting.table import EXTRAS, Cell, Column, Number, Table


@dataclass(frozen=True)
class Shown:
    """How a column is shown."""

    title: str
    digits: int = 2
    signed: bool = False


COLUMNS: Mapping[str, Shown] = {
    "removed_pct": Shown("removed, %", 1),
    "kv_pct": Shown("KV cache, %", 0, signed=True),
    "mha": Shown("MHA", 0),
    "mlp": Shown("MLP", 0),
    "heldout_ppl": Shown("held-out PPL"),
    "heldout_x": Shown("held-out, × dense"),
    "wikitext2_ppl": Shown("WikiText-2 PPL"),
    "wikitext2_x": Shown("WikiText-2, × dense"),
    "avg_pct": Shown("accuracy, %", 1),
    "avg9_pct": Shown("average of nine, %"),
    "p_gold_pct": Shown("p of the right answer, %", 1),
    "generation_x": Shown("generation, × dense"),
    "generation_ms": Shown("generation, ms", 1),
    "weights_mib": Shown("weights, MiB", 0),
    "minutes": Shown("search, minutes", 1),
    "trials_asked": Shown("scores asked for", 0),
    "trials_computed": Shown("scores computed", 0),
    "ppl_against": Shown("held-out PPL, × [95 %, Holm]", 3),
    "avg_against": Shown("accuracy, points [95 %, Holm]", 1, signed=True),
    "p_gold_against": Shown("p of the right answer, points [95 %, Holm]", 1, signed=True),
    "score_against": Shown("accuracy, points [95 %, Holm]", 1, signed=True),
    "mha_share_pct": Shown("MHA among removed blocks, %", 0),
    "samples": Shown("calibration samples", 0),
    "worst_x": Shown("worst kind of text, × dense"),
    "draws": Shown("draws", 0),
    "masks": Shown("masks", 0),
    "avg_vs_dense": Shown("points against dense", 1, signed=True),
    "avg_vs_blockpruner": Shown("points against BlockPruner", 1, signed=True),
    "p_gold_vs_blockpruner": Shown(
        "p of the right answer, points against BlockPruner", 1, signed=True
    ),
    "between_pct": Shown("between values, %", 1),
    "draws_pct": Shown("between draws, %", 1),
    "share_pct": Shown("share of variance, %", 0),
    "trials_10": Shown("scores on all rows", 0),
    "over_best_10": Shown("over the best, same rows"),
    "at_10_x": Shown("test texts, × dense"),
    "at_10": Shown("at 10 %"),
    "at_20": Shown("at 20 %"),
    "at_30": Shown("at 30 %"),
    "transformers_x": Shown("transformers"),
    "transformers_kv_x": Shown("transformers, 8 × 2,048 tokens"),
    "llama_cpp_x": Shown("llama.cpp, F16"),
    "llama_cpp_f16_x": Shown("llama.cpp, F16"),
    "llama_cpp_q8_x": Shown("llama.cpp, Q8_0"),
    "vllm_x": Shown("vLLM"),
    "file_mb": Shown("file, MB", 0),
}
"""By key. A column that is not here goes by its key: texts as they are, numbers with two digits."""


def table_of_frame(name: str, title: str, frame: pd.DataFrame, note: str = "") -> Table:
    """Make a table for people: a cell has its number, its error and its interval; columns without
    any value go."""
    shown = {}
    for key in frame.columns:
        is_extra = key.endswith(tuple(EXTRAS))
        if not is_extra and frame[key].map(_is_known).any():
            shown[key] = COLUMNS.get(key, Shown(_title(key)))
    columns = tuple(Column(key, style.title) for key, style in shown.items())
    rows = []
    for record in frame.to_dict("records"):
        cells = [_cell(record, key, style) for key, style in shown.items()]
        rows.append(tuple(cells))
    notes = (note,) if note else ()
    return Table(name, title, columns, tuple(rows), notes)


def _title(key: str) -> str:
    """The title of a column that is not in COLUMNS."""
    title = key.removesuffix("_x").replace("_pct", " %").replace("_", " ")
    return f"{title}, × dense" if key.endswith("_x") else title


def table_of_lines(
    name: str, title: str, lines: Sequence[Mapping[str, Any]], note: str = ""
) -> Table | None:
    """Make a table of rows by column; None without a row."""
    return table_of_frame(name, title, pd.DataFrame(lines), note) if lines else None


def interval(key: str, effect: Effect | None, scale: float = 1.0) -> dict[str, float]:
    """Give a number and the ends of its interval, each in its column; nothing where it was not
    measured."""
    if effect is None:
        return {}
    return {
        key: scale * effect.value,
        f"{key}_low": scale * effect.interval.low,
        f"{key}_high": scale * effect.interval.high,
    }


def _is_known(value: Any) -> bool:
    if value is None or value == "":
        return False
    return not (isinstance(value, float) and math.isnan(value))


def _cell(row: Mapping[str, Any], key: str, style: Shown) -> Cell:
    value = row[key]
    if not _is_known(value):
        return None
    if isinstance(value, str):
        return value
    stderr, low, high = (_optional_number(row.get(key + suffix)) for suffix in EXTRAS)
    return Number(float(value), style.digits, stderr, low, high, style.signed)


def _optional_number(value: Any) -> float | None:
    return float(value) if _is_known(value) else None
