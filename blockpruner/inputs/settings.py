"""The section `calibration`: the token rows on which blocks are scored."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from blockpruner.core.settings import ALPACA, Frozen, MixedTexts, Texts


def _has_responses(data: Any) -> bool:
    if isinstance(data, MixedTexts):
        return any(map(_has_responses, data.of))
    return getattr(data, "repo", None) == ALPACA.repo or getattr(data, "format", None) == "alpaca"


class Calibration(Frozen):
    """The token rows on which blocks are scored. The defaults are the paper's."""

    data: Texts = ALPACA
    num_samples: int = Field(default=256, ge=1)
    """How many texts are drawn."""
    num_rows: int | None = Field(default=None, ge=1)
    """The number of joined rows to fill with samples, in place of num_samples; with split: all."""
    seq_len: int = Field(default=2048, ge=2)
    """Tokens in a row."""
    packing: Literal["joined", "per_sample"] = "joined"
    """How rows are made. joined: they are cut from all samples joined; per_sample: a row is one
    sample's beginning."""
    split: Literal["paper", "all"] = "paper"
    """Which texts are drawn from: all, or (the default) the tenth that the paper's code splits
    off."""
    score: Literal["all", "response"] = Field(
        default_factory=lambda values: (
            "response" if values["split"] == "all" and _has_responses(values["data"]) else "all"
        )
    )
    """Which tokens are scored: all, or only those of responses (of a text without one, all). The
    default is response for the Alpaca format, and all with split: paper, as the paper does."""
    seed: int = 42

    @model_validator(mode="after")
    def _fits_the_data(self) -> Self:
        if isinstance(self.data, MixedTexts) and self.split == "paper":
            raise ValueError(
                "split: paper draws from a tenth of one source, and data is a mix, whose kinds are"
                " drawn by their shares; set split: all"
            )
        if self.num_rows is not None and (self.packing != "joined" or self.split != "all"):
            raise ValueError(
                "num_rows is for joined rows of all texts; set packing: joined and split: all, or"
                " num_samples"
            )
        return self
