"""The section `score`: how the blocks to remove are found."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from blockpruner.core.settings import Frozen


class Latency(Frozen):
    """The generation that is timed where a budget is a speed-up. The lengths are those of Table 6 of the paper."""

    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    batch: int = Field(default=1, ge=1)
    repeats: int = Field(default=5, ge=1)


class Score(Frozen):
    """How the blocks to remove are found. The defaults are the paper's."""

    method: str = "greedy"
    """A recipe (recommended, blockpruner, ...), a plain search, or a method that changes weights."""
    unit: Literal["block", "layer"] = "block"
    """What one step removes."""
    candidates: Literal["all", "mha", "mlp"] = "all"
    """Which blocks may be removed."""
    metric: str = "perplexity"
    """What a step keeps low."""
    latency: Latency = Latency()
    options: dict[str, bool | int | float | str | tuple[str | int, ...] | None] = Field(default={})
    """The options of the method, each with a model of its own in the method's file."""
    acceleration: Literal["none", "lazy", "race", "lazy+race"] | None = None
    """How candidates that can hardly win are left out; none is exact. null: the recipe's own, else none."""
    confidence: float | None = Field(default=None, gt=0.5, lt=1)
    """The confidence of each comparison in a race, null for 0.999."""
    floor: int | None = Field(default=None, ge=1)
    """Candidates that enter a lazy step at least, null for 10."""
    slack: float | None = Field(default=None, ge=0)
    """Margin of the lazy rule, null for 2."""
    audit: int | None = Field(default=None, ge=0)
    """All candidates enter every n-th lazy step, null for every 6th, 0 for none."""

    @model_validator(mode="after")
    def _settings_do_something(self) -> Score:
        for part, keys in (("race", ("confidence",)), ("lazy", ("floor", "slack", "audit"))):
            idle = [key for key in keys if getattr(self, key) is not None]
            if idle and part not in (self.acceleration or "none").split("+"):
                raise ValueError(
                    f"{idle[0]} does nothing with acceleration: {self.acceleration}; remove it, or set acceleration: "
                    f"{part} or lazy+race"
                )
        return self

    @model_validator(mode="after")
    def _layers_hold_both_kinds(self) -> Score:
        if self.unit == "layer" and self.candidates != "all":
            raise ValueError(
                f"candidates: {self.candidates} does not fit unit: layer, which removes both blocks of a layer; "
                "set candidates: all, or unit: block"
            )
        return self
