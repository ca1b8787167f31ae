"""The plan: all that a search hands on. One frozen value, one JSON file.

Stages after the search read plans and do not need to know which method made them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict

from blockpruner.core.blocks import BlockId, Cut, Mask, parse_block, parse_channels, parse_mask


@dataclass(frozen=True)
class Plan:
    """How one pruned model differs from the dense one, and how that was found."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)

    kind: str
    """The kind of method: "mask" (blocks are removed), or that of another method, such as
    "laco"."""
    target: str
    run: str
    budget: str
    method: str
    metric: str
    search: str
    """Fingerprint of the search."""
    layers: int
    """The number of layers of the dense model."""
    removed: tuple[str, ...]
    """All removed blocks, sorted."""
    order: tuple[str, ...]
    """What each step took, in order."""
    ratio: float
    """Share of all parameters removed."""
    ratios: tuple[float, ...]
    """The cumulative ratio after each removal."""
    blocks: Mapping[str, int]
    """How many blocks of each kind are gone."""
    parameters: Mapping[str, int]
    """The parameters of the dense and of the pruned model."""
    calibration: Mapping[str, Any]
    """Rows, tokens, and the perplexity on them of the dense and the pruned model (null: known once
    it is made)."""
    kinds: Mapping[str, Mapping[str, float]] | None = None
    """The perplexity of each kind of text, of rows that neither search nor fit has seen: `dense`,
    and `after` compensation; None where no such rows of a mix judged."""
    compensate: str = "none"
    """How the weights of the pruned model are compensated for what is gone, without training."""
    train: bool = False
    """Whether the pruned model is trained after that."""
    nested: bool = True
    """Whether the first steps of `order` meet smaller budgets."""
    removes: Mapping[str, float] = field(default_factory=dict)
    """The share of each resource that is gone; of the time of generation where it was measured."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's options."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a method that searches no mask will do."""
    base: str | None = None
    """The dense model, by content (`checkpoint_identity`), or as <repository>@<commit> of the hub;
    None for a plan in the folder of its model."""
    weights: str | None = None
    """The dense model's files of weights, by content (`manifest.weights_identity`); None where they
    are not known."""

    @property
    def mask(self) -> Mask:
        return parse_mask(",".join(self.removed))

    @property
    def cut(self) -> Cut:
        """All that is taken out: blocks, and channels of narrowed MLPs."""
        texts: Mapping[str, str] = self.details.get("channels", {})
        channels = {parse_block(name): parse_channels(text) for name, text in texts.items()}
        return Cut(self.mask, channels)

    @property
    def gone(self) -> dict[BlockId, float]:
        """The removed share of each block that lacks something; rough for MLPs of few channels."""
        shares = dict.fromkeys(self.mask, 1.0)
        for block, channels in self.cut.channels.items():
            # A hexadecimal digit is four channels.
            width = 4 * len(self.details["channels"][str(block)])
            shares[block] = 1 - len(channels) / width
        return shares
