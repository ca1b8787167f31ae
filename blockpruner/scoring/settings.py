"""The section `score`: how the blocks to remove are found."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from blockpruner.core.settings import Frozen


class Latency(Frozen):
    """The generation that is timed where a budget is a speed-up. The lengths are those of Table 6
    of the paper."""

    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    batch: int = Field(default=1, ge=1)
    repeats: int = Field(default=5, ge=1)


class Score(Frozen):
    """How the blocks to remove are found."""

    method: str = "recommended"
    """A recipe (recommended, blockpruner, ...), a plain search, or a method that searches no
    mask."""
    unit: Literal["block", "layer", "shifted"] = "block"
    """What one step removes: a block, a layer, or an MLP with the MHA behind it (a shifted
    layer)."""
    candidates: Literal["all", "mha", "mlp"] = "all"
    """Which blocks may be removed."""
    metric: str = "perplexity"
    """What a step keeps low."""
    latency: Latency = Latency()
    options: dict[str, bool | int | float | str | tuple[str | int, ...] | None] = Field(default={})
    """The options of the method, each with a model of its own in the method's file."""
    acceleration: Literal["none", "lazy", "race", "lazy+race"] | None = None
    """How candidates that can hardly win are left out; none is exact. null: the recipe decides,
    else none."""

    @model_validator(mode="after")
    def _pairs_hold_both_kinds(self) -> Score:
        if self.unit != "block" and self.candidates != "all":
            raise ValueError(
                f"candidates: {self.candidates} does not fit unit: {self.unit}, which removes a"
                " block of each kind; set candidates: all, or unit: block"
            )
        return self
