"""Draws docs/performance-*.svg and .png from the figures that `benchmarks.scoring` kept in data/benchmarks/.

python -m benchmarks.plots
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.scoring import RESULTS
from blockpruner.reporting.plots import BLUE, GREY, ORANGE, STYLE

DOCS = Path("docs")
PLAIN = STYLE | {"text.color": "#222222", "axes.labelcolor": "#222222", "figure.facecolor": "white"}


def cost(figure: Figure, shapes: list[dict[str, Any]]) -> None:
    """Seconds of one iteration, full forward passes being 1, with the bound of the FLOPs as a mark."""
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, found in zip(panels, shapes, strict=True):
        for place, (name, colour) in enumerate((("naive", GREY), ("exact", BLUE), ("race", ORANGE))):
            height = found["seconds"][name] / found["seconds"]["naive"]
            axes.bar(place, height, 0.62, color=colour)
            axes.annotate(
                f"{found['seconds'][name]:.1f} s", (place, height), (0, 3), textcoords="offset points", ha="center"
            )
            share = found["flops"][name] / found["flops"]["naive"]
            axes.plot([place - 0.38, place + 0.38], [share, share], color="black", linewidth=1.4,
                      label="share of the FLOPs" if name == "naive" else None)  # fmt: skip
        axes.set_xticks(range(3), ["full forward\npasses", "exact", "exact,\nraced"])
        axes.set_title(f"{found['shape']}: one iteration, {found['masks']} masks")
        axes.set_ylim(0, 1.15)
    panels[0].set_ylabel("time, of full forward passes")
    panels[0].legend(loc="upper right")


def search(figure: Figure, found: dict[str, Any]) -> None:
    """Calibration NLL against what it cost, in full forward passes of the dense model's FLOPs per naive search."""
    axes = figure.subplots()
    for mode, colour, label in (("exact", BLUE, "exact"), ("lazy+race", ORANGE, "lazy + race")):
        for seed, records in found[mode].items():
            naive = sum(r["naive_flops"] for r in records)
            spent = [total / naive for total in accumulate(r["flops"] for r in records)]
            axes.plot(spent, [r["nll"] for r in records], color=colour, marker="o", markersize=3, linewidth=1.2,
                      label=label if seed == next(iter(found[mode])) else None)  # fmt: skip
            audits = [i for i, r in enumerate(records) if r["audit"]]
            squares = "audit" if audits and seed == next(iter(found[mode])) else None
            places = [spent[i] for i in audits], [records[i]["nll"] for i in audits]
            axes.plot(*places, "s", color=colour, markersize=6, markerfacecolor="none", label=squares)
    axes.axvline(1 / 6, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate("1/6", (1 / 6, axes.get_ylim()[0]), (3, 3), textcoords="offset points", color=GREY)
    axes.set_xlabel("FLOPs spent, as a share of full forward passes for the same removals")
    axes.set_ylabel("calibration NLL, nats per token")
    axes.set_title(f"{found['removals']} removals, three calibration draws (one line each)")
    axes.legend(loc="lower right")


def growth(figure: Figure, found: dict[str, Any]) -> None:
    """Measured seconds (dots) and the formula at the median rate of all points (lines)."""
    points = found["points"]
    rates = sorted(p["flops"] / p["seconds"] for p in points)
    rate = rates[len(rates) // 2]
    sizes = list(dict.fromkeys(p["size"] for p in points))
    names = {"num_hidden_layers": "layers", "rows": "rows of 128 tokens", "vocab_size": "vocabulary"}
    for axes, size in zip(figure.subplots(1, len(sizes)), sizes, strict=True):
        own = [p for p in points if p["size"] == size]
        axes.plot([p["value"] for p in own], [p["flops"] / rate for p in own], color=GREY, label="formula")
        axes.plot([p["value"] for p in own], [p["seconds"] for p in own], "o", color=BLUE, label="measured")
        axes.set_xlabel(names[size])
        axes.set_ylim(0)
        axes.set_xlim(0)
    figure.axes[0].set_ylabel("seconds of one exact iteration")
    figure.axes[0].legend(loc="upper left")


def draw(name: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> None:
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=size)
        paint(figure)
        for ending in ("svg", "png"):
            figure.savefig(
                DOCS / f"performance-{name}.{ending}", dpi=130, metadata={"Date": None} if ending == "svg" else None
            )


def main() -> None:
    read = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    shapes = [read[name] for name in ("iteration-smollm2", "iteration-llama2-7b") if name in read]
    if shapes:
        draw("iteration", (4.2 * len(shapes), 3.2), lambda figure: cost(figure, shapes))
    if "search" in read:
        draw("search", (6.6, 3.8), lambda figure: search(figure, read["search"]))
    if "growth" in read:
        draw("growth", (9.0, 2.9), lambda figure: growth(figure, read["growth"]))
    print(f"drawn from {', '.join(read) or f'nothing: {RESULTS} is empty, run python -m benchmarks.scoring first'}")


if __name__ == "__main__":
    main()
