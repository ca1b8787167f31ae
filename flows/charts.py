"""Pictures of a search while it runs, in the report's style: the candidates' scores, and the blocks removed so far.

Decides what they show. Rows are those of a phase's table: "added" (a mask as text), "loss", "rows" ("used/total") and
"chosen".
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from blockpruner.core.blocks import BlockKind, Mask, parse_mask
from blockpruner.reporting.plots import BLUE, GREY, INK, ORANGE, PAPER, STYLE, block_map

DENSE = "(dense)"
PALE = 0.35
COLOURS = {BlockKind.MHA: BLUE, BlockKind.MLP: ORANGE}
CLIP = 0.9
"""The share of candidates whose bars are not cut off: the first blocks may cost a hundred times what others do."""


def candidates(rows: Sequence[Mapping[str, Any]]) -> dict[Mask, Mapping[str, Any]]:
    """The rows of candidates, by the unit that each removes."""
    return {parse_mask(row["added"]): row for row in rows if row.get("added", DENSE) != DENSE}


def scored(rows: Mapping[Mask, Mapping[str, Any]]) -> dict[Mask, Mapping[str, Any]]:
    """Those with a loss; an order given by hand or by chance has none."""
    return {unit: row for unit, row in rows.items() if math.isfinite(row["loss"])}


def scores(rows: Mapping[Mask, Mapping[str, Any]]) -> bytes:
    """A bar for each candidate, at its layer: its loss above the cheapest's. One candidate at least has a loss."""
    finite = scored(rows)
    best = min(row["loss"] for row in finite.values())
    above = {unit: row["loss"] - best for unit, row in finite.items()}
    top = 1.15 * sorted(above.values())[math.ceil(CLIP * len(above)) - 1] or 1.0

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for unit, row in finite.items():
            place, width, colour = _bar(unit)
            used, _, total = row["rows"].partition("/")
            axes.bar(place, above[unit], width, color=colour, alpha=1.0 if used == total else PALE)
            if row["chosen"]:
                axes.plot(place, 0.0, "v", color=INK, markersize=8, clip_on=False, zorder=3)
            elif above[unit] > top:
                axes.text(place, top, f"{above[unit]:.2g}", rotation=90, ha="center", va="top", color=PAPER, fontsize=7)
        axes.set_ylim(0.0, top)
        axes.set_xlabel("layer (0 is next to the embedding)")
        axes.set_ylabel("loss above the cheapest's")
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        used_kinds = [kind for kind in BlockKind if any(block.kind is kind for unit in finite for block in unit)]
        keys: list[Artist] = [Patch(color=COLOURS[kind], label=kind.upper()) for kind in used_kinds]
        keys.append(Patch(color=GREY, alpha=PALE, label="pale: not scored on all rows"))
        keys.append(Line2D([], [], linestyle="none", marker="v", color=INK, label="removed"))
        figure.legend(handles=keys, loc="outside upper right", ncols=len(keys))

    layers = 1 + max(block.layer for unit in rows for block in unit)
    return _png((max(7.0, 0.29 * layers + 1.5), 3.0), draw)


def _bar(unit: Mask) -> tuple[float, float, str]:
    """Place, width and colour: MHA is left and MLP right of the layer's number, a whole layer covers both."""
    first = min(unit, key=lambda block: block.layer)
    if len(unit) > 1:
        return first.layer, 0.76, GREY
    return first.layer + (-0.2 if first.kind is BlockKind.MHA else 0.2), 0.38, COLOURS[first.kind]


def blocks(layers: int, removed: Sequence[Mask]) -> bytes:
    """The map of blocks; a removed one bears the number of its removal."""
    gone = frozenset[Any]().union(*removed)
    return _png((max(7.0, 0.29 * layers + 1.5), 1.75), lambda figure: block_map(figure, layers, gone, removed))


def _png(size: tuple[float, float], draw: Callable[[Figure], None]) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        draw(figure)
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
