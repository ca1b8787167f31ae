"""How plots look, and how a figure becomes bytes.

Decides colours and scales. The same figure gives the same bytes every time.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
OTHER_MARKS = zip([colour for colour, _ in MARKS], SHAPES[3:] + SHAPES[:3], strict=True)
MANY_MARKS = [*MARKS, *OTHER_MARKS]
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
        # Without dates and versions the same figure gives the same bytes.
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
    # A narrow range would have one or two marks only.
    is_wide = max(values) > 10 * min(values)
    steps = (1, 2, 5) if is_wide else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def removed_map(name: str, plan: Plan) -> Plot:
    """Draw how much of each block a plan removes, with the removals in order where they have
    one."""
    order = [parse_mask(unit) for unit in plan.order] if plan.nested else []
    legend = "The numbers are those of the removals." if order else "All was chosen together."
    caption = f"The blocks of {name}: what is filled is gone. {legend}"
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
    numbers: dict[BlockId, str] = {}
    for number, removal in enumerate(removals, 1):
        numbers |= dict.fromkeys(removal, str(number))

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for row, kind in enumerate(BlockKind):
            for layer in range(layers):
                block = BlockId(kind, layer)
                _draw_block(axes, row, block, gone.get(block, 0.0), numbers.get(block, ""))
        axes.set_xlim(-0.6, layers - 0.4)
        axes.set_ylim(len(BlockKind) - 0.4, -0.6)
        axes.set_yticks(range(len(BlockKind)), [kind.upper() for kind in BlockKind])
        axes.xaxis.set_major_locator(MaxNLocator(min(layers, 16), integer=True))
        axes.set_xlabel("layer (0 is next to the embedding)")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)

    return render(name, caption, (max(10.2, 0.29 * layers + 1.5), 1.45), fill)


def _draw_block(axes: Axes, row: int, block: BlockId, share: float, number: str) -> None:
    """Draw a box that is filled from below by the share that is gone."""
    width, height = 0.92, 0.88
    x, bottom = block.layer - 0.46, row + 0.44
    frame = Rectangle(
        (x, row - 0.44), width, height, facecolor="none", edgecolor=GREY, linewidth=0.6
    )
    axes.add_patch(frame)
    filled = height * share
    colour = KIND_COLOURS[block.kind]
    axes.add_patch(Rectangle((x, bottom - filled), width, filled, facecolor=colour))
    axes.text(block.layer, row, number, color="white", ha="center", va="center", fontsize=8.5)
