"""The methods that arXiv 2406.10594 compares, and some beyond it: names, titles, settings of the search.

Decides what a name in `studies/*.yaml` and in the tables means. How a search runs is decided by `search`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PaperMethod:
    """A method that the tables know."""

    title: str
    """Its name in tables and figures."""
    score: Mapping[str, Any] = field(default_factory=dict)
    """What it changes in the `score` section of a run."""
    published: tuple[str, ...] = ()
    """The names of its rows in data/paper."""


DENSE = "dense"
"""The name of the dense model's rows, here and in data/paper."""
BLOCKPRUNER = "blockpruner"

BI, RM = "block_influence", "relative_magnitude"
ONE_SHOT_LAYERS = {"method": "one_shot", "unit": "layer"}
PAPER_METHODS: Mapping[str, PaperMethod] = {
    BLOCKPRUNER: PaperMethod("BlockPruner", {"method": "greedy"}, ("blockpruner", "ppl", "block")),
    "slicegpt": PaperMethod("SliceGPT", {"method": "slicegpt"}, ("slicegpt",)),
    "laco": PaperMethod("LaCo", {"method": "laco"}, ("laco",)),
    "laco-3": PaperMethod("LaCo, 3 layers a merge", {"method": "laco", "options": {"count": 3}}, ("laco",)),
    "laco-7": PaperMethod("LaCo, 7 layers a merge", {"method": "laco", "options": {"count": 7}}, ("laco",)),
    "relative-magnitude": PaperMethod("Relative Magnitude", {**ONE_SHOT_LAYERS, "metric": RM}, (RM,)),
    "relative-magnitude-frobenius": PaperMethod(
        "Relative Magnitude, Frobenius", {**ONE_SHOT_LAYERS, "metric": f"{RM}_frobenius"}, (RM,)
    ),
    "shortgpt": PaperMethod("ShortGPT", {**ONE_SHOT_LAYERS, "metric": BI}, ("shortgpt",)),
    "taylor": PaperMethod("Taylor", {**ONE_SHOT_LAYERS, "metric": "taylor"}),
    "one-shot-perplexity": PaperMethod("one-shot perplexity", {"method": "one_shot"}, ("one_shot_ppl",)),
    "greedy-layers": PaperMethod(
        "greedy layers", {"method": "greedy", "unit": "layer"}, ("layer_greedy_ppl", "layer")
    ),
    "blockpruner-per-parameter": PaperMethod(
        "BlockPruner per parameter", {"method": "greedy", "options": {"per": "parameters"}}
    ),
    "floating": PaperMethod("floating search", {"method": "floating"}),
    "swap": PaperMethod("swap from BlockPruner", {"method": "swap"}),
    "blockpruner-by-js": PaperMethod("BlockPruner by JS", {"method": "greedy", "metric": "js"}, ("js",)),
    "blockpruner-by-bi": PaperMethod("BlockPruner by BI", {"method": "greedy", "metric": BI}),
    "blockpruner-by-rm": PaperMethod("BlockPruner by RM", {"method": "greedy", "metric": RM}),
    "mha-only": PaperMethod("MHA only", {"method": "greedy", "candidates": "mha"}),
    "mlp-only": PaperMethod("MLP only", {"method": "greedy", "candidates": "mlp"}),
    "angular-distance": PaperMethod(
        "angular distance", {"method": "contiguous", "unit": "layer", "metric": "angular_distance"}
    ),
    "random": PaperMethod("random", {"method": "random"}),
}  # fmt: skip
"""By the name of the recipe."""


def title_of(method: str) -> str:
    """Find a method's title; a search that the tables do not know goes by its own name."""
    if method == DENSE:
        return DENSE
    return PAPER_METHODS[method].title if method in PAPER_METHODS else method
