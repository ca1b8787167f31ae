"""Tables as data frames: numbers at full precision for CSV, and the same table as text for people.

A number's standard error and the ends of its interval are columns of their own, named after it: avg_pct, avg_pct_se,
ppl_x, ppl_x_low, ppl_x_high. Decides how a column is called and rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

EXTRAS = ("_se", "_low", "_high")
BLANK = "–"


@dataclass(frozen=True)
class Shown:
    """How a column of numbers is shown."""

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
    "runs": Shown("runs", 0),
    "heldout_sd": Shown("held-out PPL, sd"),
    "avg_sd": Shown("accuracy, sd", 1),
    "transformers_x": Shown("transformers"),
    "llama_cpp_f16_x": Shown("llama.cpp, F16"),
    "llama_cpp_q8_x": Shown("llama.cpp, Q8_0"),
    "vllm_x": Shown("vLLM"),
}
"""By key. A column that is not here goes by its key: texts as they are, numbers with two digits."""


@dataclass(frozen=True, eq=False)
class Table:
    """A table of a study."""

    name: str
    title: str
    frame: pd.DataFrame
    note: str = ""


def written(value: float, digits: int, signed: bool = False) -> str:
    """Write a number for people: thousands with commas, a true minus; a zero has no sign."""
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return ("+" if signed and not text.startswith("-") and value > 0 else "") + text.replace("-", "−")


def texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Write a table for people: a cell has its number, its error and its interval; columns without any value go."""
    found: dict[str, list[str]] = {}
    for key in frame.columns:
        if key.endswith(EXTRAS) or not frame[key].map(_is_known).any():
            continue
        shown = COLUMNS.get(key, Shown(key.replace("_", " ")))
        found[shown.title] = [_cell(row, key, shown) for row in frame.to_dict("records")]
    return pd.DataFrame(found)


def _is_known(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


def _cell(row: Mapping[str, Any], key: str, shown: Shown) -> str:
    value = row[key]
    if not _is_known(value):
        return BLANK
    if isinstance(value, str):
        return value
    error, low, high = (float(row[key + end]) if _is_known(row.get(key + end)) else math.inf for end in EXTRAS)
    text = written(value, shown.digits, shown.signed)
    if math.isfinite(error):
        text += f" ± {written(error, shown.digits)}"
    if math.isfinite(high - low):
        text += f" [{written(low, shown.digits, shown.signed)}, {written(high, shown.digits, shown.signed)}]"
    return text


def numeric(frame: pd.DataFrame) -> list[bool]:
    """Tell which columns of `texts` hold numbers, which are set right."""
    kept = [k for k in frame.columns if not k.endswith(EXTRAS) and frame[k].map(_is_known).any()]
    return [pd.api.types.is_numeric_dtype(frame[key]) for key in kept]


def to_markdown(frame: pd.DataFrame) -> str:
    shown = texts(frame)
    rule = ["---:" if is_number else "---" for is_number in numeric(frame)]
    rows = [list(shown.columns), rule, *shown.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def to_latex(table: Table) -> str:
    """Write a `table` for a document with the package booktabs."""
    shown = texts(table.frame)
    kinds = "".join("r" if is_number else "l" for is_number in numeric(table.frame))
    style = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    return str(style.to_latex(column_format=kinds, hrules=True, caption=table.title, label=f"tab:{table.name}"))
