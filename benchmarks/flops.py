"""FLOPs of scoring, counted from a config: what masks cost with and without what they share.

A product of [m, k] and [k, n] counts 2mkn. Attention counts all T x T scores, as a kernel that masks computes them.
Biases, norms, rotary embedding, softmax and residual adds are left out, as usual. A test compares with torch's counter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from blockpruner.core.blocks import BlockId, BlockKind, Mask
from blockpruner.core.families import Config, count_products
from blockpruner.scoring.walk import runs, steps_of


@dataclass(frozen=True)
class Flops:
    """FLOPs of the parts of a forward pass, for a batch of rows."""

    blocks: Mapping[BlockId, int]
    """One run of each block, in the order of a forward pass."""
    head: int
    """The head where it predicts a token of the batch."""
    full_head: int
    """The head on every token."""

    @classmethod
    def of(cls, config: Config, rows: int, length: int) -> Self:
        """Count for `rows` rows of `length` tokens."""
        products, attention = count_products(config)
        tokens, head = rows * length, 2 * int(config["hidden_size"]) * int(config["vocab_size"])
        blocks = {
            block: tokens * (2 * products[block] + (4 * length * attention if block.kind is BlockKind.MHA else 0))
            for (block,) in steps_of(int(config["num_hidden_layers"]), parallel=False)
        }
        return cls(blocks, rows * (length - 1) * head, tokens * head)

    def naive(self, masks: Sequence[Mask]) -> int:
        """One full forward pass for each mask, with logits of every token."""
        passes = sum(cost for mask in masks for block, cost in self.blocks.items() if block not in mask)
        return passes + len(masks) * self.full_head

    def exact(self, masks: Sequence[Mask]) -> int:
        """The walk that shares what masks have in common."""
        ran = runs([(block,) for block in self.blocks], masks)
        return sum(self.blocks[block] for _, blocks in ran for block in blocks) + len(masks) * self.head
