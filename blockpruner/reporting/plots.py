"""How plots look, and how a figure becomes bytes.

Decides colours and scales. The same figure gives the same bytes every time.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from blockpruner.core.blocks import BlockId, BlockKind, Mask, parse_mask
from blockpruner.core.errors import extra
from blockpruner.core.plan import Plan

with extra("report"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, PAPER = "#1c1f24", "#ffffff"
BLUE, ORANGE, GREY = "#2a86c8", "#d9662b", "#8a8f98"
"""Blue and orange stay apart for every common colour blindness (after Okabe and Ito), on white and
on black."""

MARKS = (
    (BLUE, "o"),
    (ORANGE, "s"),
    ("#2e9e78", "^"),
    ("#b463a6", "D"),
    ("#b8901f", "v"),
    ("#5b6fd0", "P"),
    ("#c2455a", "X"),
    (GREY, "h"),
)
"""One for each method. A shape goes with every colour."""

SHAPES = [shape for _, shape in MARKS]
MANY_MARKS = [
    *MARKS,
    *((colour, shape) for (colour, _), shape in zip(MARKS, SHAPES[3:] + SHAPES[:3], strict=True)),
]
"""MARKS, then their colours with other shapes: twice as many methods stay apart."""

KIND_COLOURS = {BlockKind.MHA: BLUE, BlockKind.MLP: ORANGE}

REMOVED = "parameters removed, %"

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "blockpruner",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.5,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Plot:
    kind: ClassVar = "plot"
    name: str
    """The name of its files."""
    caption: str
    svg: str
    png: bytes
    width: float
    """Inches."""


def render(
    name: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]
) -> Plot:
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        draw(figure)
        bare = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=bare)
        figure.savefig(png, format="png", dpi=180, metadata={"Software": None})
    return Plot(name, caption, svg.getvalue(), png.getvalue(), size[0])


def label_(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GREY, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)


def scale_(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic scale for perplexities over a wide range."""
    if max(values) <= 3 * min(values):
        return
    wide = max(values) > 10 * min(values)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if wide else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def removed_map(name: str, plan: Plan) -> Plot:
    """Draw how much of each block a plan removes, with the removals in order where they have
    one."""
    order = [parse_mask(unit) for unit in plan.order] if plan.nested else []
    how = "The numbers are those of the removals." if order else "All was chosen together."
    caption = f"The blocks of {name}: what is filled is gone. {how}"
    return block_map(f"{name}-map", caption, plan.layers, plan.gone, order)


def block_map(
    name: str,
    caption: str,
    layers: int,
    gone: Mapping[BlockId, float],
    removals: Sequence[Mask] = (),
) -> Plot:
    """Draw what share of each block is gone, with the number of the removal that took it where they
    have an order."""
    size = (max(10.2, 0.29 * layers + 1.5), 1.45)
    return render(
        name, caption, size, partial(_blocks, layers=layers, gone=gone, removals=removals)
    )


def _blocks(
    figure: Figure, layers: int, gone: Mapping[BlockId, float], removals: Sequence[Mask]
) -> None:
    axes, kinds = figure.subplots(), list(BlockKind)
    places = {block: i for i, removal in enumerate(removals, 1) for block in removal}
    for block in (BlockId(kind, layer) for kind in kinds for layer in range(layers)):
        x, row, share = block.layer - 0.46, kinds.index(block.kind), gone.get(block, 0.0)
        axes.add_patch(
            Rectangle((x, row - 0.44), 0.92, 0.88, facecolor="none", edgecolor=GREY, linewidth=0.6)
        )
        filled = (x, row + 0.44 - 0.88 * share), 0.92, 0.88 * share
        axes.add_patch(Rectangle(*filled, facecolor=KIND_COLOURS[block.kind]))
        at = str(places.get(block, ""))
        axes.text(block.layer, row, at, color="white", ha="center", va="center", fontsize=8.5)
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_yticks(range(len(kinds)), [kind.upper() for kind in kinds])
    axes.xaxis.set_major_locator(MaxNLocator(min(layers, 16), integer=True))
    axes.set_xlabel("layer (0 is next to the embedding)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
