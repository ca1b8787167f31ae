"""FLOPs of scoring, from a config alone: what each mask costs with and without the shared prefix.

A product of [m, k] and [k, n] counts 2mkn. Attention counts all T x T scores, as a kernel that masks computes them;
norms, rotary embedding, softmax and residual adds are left out, as usual. A test holds it against torch's counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockpruner.blocks import BlockId, BlockKind, Mask


class Flops:
    """Per batch of `rows` rows of `length` tokens through a Llama-like decoder."""

    def __init__(self, config: Any, rows: int, length: int) -> None:
        hidden, heads = config.hidden_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or hidden // heads
        key_values = config.num_key_value_heads or heads
        self.config = config
        tokens = rows * length
        projections = 2 * hidden * head * (2 * heads + 2 * key_values)
        self.block = {
            BlockKind.MHA: tokens * (projections + 4 * length * heads * head),
            BlockKind.MLP: tokens * 6 * hidden * config.intermediate_size,
        }
        self.head = rows * (length - 1) * 2 * hidden * config.vocab_size
        self.full_head = tokens * 2 * hidden * config.vocab_size
        self._steps = [BlockId(kind, layer) for layer in range(config.num_hidden_layers) for kind in BlockKind]

    def naive(self, masks: Sequence[Mask]) -> int:
        """One full forward pass for each mask, logits of every token."""
        blocks = sum(self.block[step.kind] for mask in masks for step in self._steps if step not in mask)
        return blocks + len(masks) * self.full_head

    def exact(self, masks: Sequence[Mask]) -> int:
        """The walk that shares what masks have in common; for one greedy iteration over n live blocks and its base,
        n + n(n - 1)/2 block forwards and n + 1 heads."""
        return self._walk(0, list(masks)) + len(masks) * self.head

    def _walk(self, position: int, masks: list[Mask]) -> int:
        total = 0
        for index in range(position, len(self._steps)):
            step = self._steps[index]
            without, masks = [m for m in masks if step in m], [m for m in masks if step not in m]
            if without and masks:
                total += self._walk(index + 1, without)
            elif without:
                masks = without
                continue
            total += self.block[step.kind]
        return total
