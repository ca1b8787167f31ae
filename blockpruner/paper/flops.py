"""FLOPs of scoring, from a config alone: what masks cost with and without what they share.

A product of [m, k] and [k, n] counts 2mkn. Attention counts all T x T scores, as a kernel that masks computes them;
biases, norms, rotary embedding, softmax and residual adds are left out, as usual. A test holds it against torch's
counter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask
from blockpruner.core.families import Config, count_products


@dataclass(frozen=True)
class Flops:
    """Of a batch of rows. blocks: one forward of each, in the order in which a forward pass comes to them; head: where
    it predicts a token of the batch; full_head: of every token."""

    blocks: Mapping[BlockId, int]
    head: int
    full_head: int

    @classmethod
    def of(cls, config: Config, rows: int, length: int) -> Flops:
        """Of `rows` rows of `length` tokens.

        Raises:
            InputError: an unsupported family, or one whose blocks are not one after the other.
        """
        products, attention = count_products(config)
        tokens, head = rows * length, 2 * int(config["hidden_size"]) * int(config["vocab_size"])
        blocks = {
            block: tokens * (2 * count + (4 * length * attention if block.kind is BlockKind.MHA else 0))
            for block, count in sorted(products.items(), key=lambda item: walk_order(item[0]))
        }
        return cls(blocks, rows * (length - 1) * head, tokens * head)

    def blocks_of(self, mask: Mask = DENSE) -> int:
        """One pass through the blocks that a mask leaves, without head."""
        return sum(cost for block, cost in self.blocks.items() if block not in mask)

    def full(self, mask: Mask) -> int:
        """One pass for one mask, logits where they predict a token."""
        return self.blocks_of(mask) + self.head

    def naive(self, masks: Sequence[Mask]) -> int:
        """One full forward pass for each mask, logits of every token."""
        return sum(self.blocks_of(mask) + self.full_head for mask in masks)

    def exact(self, masks: Sequence[Mask]) -> int:
        """The walk that shares what masks have in common; for one greedy iteration over n live blocks and its base,
        n + n(n - 1)/2 block forwards and n + 1 heads."""
        return self._walk(0, list(masks)) + len(masks) * self.head

    def _walk(self, position: int, masks: list[Mask]) -> int:
        total, steps = 0, list(self.blocks)
        for index in range(position, len(steps)):
            step = steps[index]
            without, masks = [m for m in masks if step in m], [m for m in masks if step not in m]
            if without and masks:
                total += self._walk(index + 1, without)
            elif without:
                masks = without
                continue
            total += self.blocks[step]
        return total

    def sweep(self, removed: Mask, units: Sequence[Mask], with_base: bool) -> int:
        """`exact` of one greedy iteration: `removed` with each unit more, and itself where asked; in one go, since
        masks of one unit more share all before it and nothing behind.

        Args:
            units: each of blocks next to each other.
        """
        last = {max(unit, key=walk_order): unit for unit in units}
        trunk = behind = before_last = branches = 0
        for block, cost in self.blocks.items():
            if block in removed:
                continue
            trunk += cost
            behind += cost * branches
            if block in last:
                branches += 1
                before_last = trunk - sum(self.blocks[part] for part in last[block])
        return (trunk if with_base else before_last) + behind + (len(units) + with_base) * self.head


def walk_order(block: BlockId) -> tuple[int, bool]:
    """Layer by layer, MHA before MLP."""
    return block.layer, block.kind is BlockKind.MLP
