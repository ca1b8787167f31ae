"""How a budget is written: a number and its unit. What that means for a model is decided in `budgets`."""

from __future__ import annotations

import math
import re

from blockpruner.errors import InputError

WRITTEN = re.compile(r"(?P<number>\d*\.?\d+)(?P<unit>blocks|layers|kv|x|)", re.ASCII)


def read_budget(text: str) -> tuple[float, str]:
    """Number and unit: "" (a share of all parameters), "blocks", "layers", "kv" (a share of the KV cache), "x" (a
    speed-up of generation).

    Raises:
        InputError: names the text and the valid forms.
    """
    match = WRITTEN.fullmatch(text)
    if match:
        number, unit = float(match["number"]), match["unit"]
        if unit in ("blocks", "layers"):
            valid = number >= 1 and match["number"].isdigit()
        else:
            share = 1 - 1 / number if unit == "x" and number > 1 else number
            valid = 0 < share < 1 and (unit != "x" or number > 1)
        if valid and math.isfinite(number):
            return number, unit
    raise InputError(
        f'budget {text!r} is not valid; give a share of all parameters between 0 and 1 ("0.22"), a number of blocks '
        '("17blocks") or of whole layers ("7layers"), a share of the KV cache ("0.30kv"), or a speed-up of generation '
        'above 1 ("1.25x")'
    )
