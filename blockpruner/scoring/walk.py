"""The walk that scores many masks at once: the order of its steps, and where it branches.

Masks that agree on all steps so far share one state. Where they part, the walk branches:

    walk(step j, state h, masks):
        the masks without block j    -> walk(j + 1, h)
        the others                   -> walk(j + 1, h + block_j(h))

A greedy iteration over n live blocks then takes n + n(n-1)/2 runs of a block instead of n(n-1).
What a state is, the caller decides: the engine walks with hidden states, counting walks with none. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from blockpruner.core.blocks import BlockId, BlockKind, Mask

Step = tuple[BlockId, ...]
"""Blocks that read the same state: one block, or a whole layer where MHA and MLP both read the layer's input."""

State = TypeVar("State")


def steps_of(layers: int, parallel: bool) -> list[Step]:
    """The steps of a forward pass: layer by layer, MHA before MLP."""
    pairs = [tuple(BlockId(kind, layer) for kind in BlockKind) for layer in range(layers)]
    return pairs if parallel else [(block,) for pair in pairs for block in pair]


def parts(step: Step, masks: Sequence[Mask]) -> list[tuple[Step, list[Mask]]]:
    """The masks by the blocks that they keep of a step, fewest blocks first."""
    found: dict[Step, list[Mask]] = {}
    for mask in masks:
        found.setdefault(tuple(block for block in step if block not in mask), []).append(mask)
    return sorted(found.items(), key=lambda part: len(part[0]))


def walk(
    steps: Sequence[Step],
    masks: Sequence[Mask],
    state: State,
    forward: Callable[[Step, State, dict[BlockId, State]], State],
) -> Iterator[tuple[Sequence[Mask], State]]:
    """Yield the masks that agree on all steps, with their state after them, group by group.

    Args:
        forward: gives the state after a step, from the blocks that are kept of it, the state before it, and what
            blocks of this step have added to that state already. It enters there what it computes.
    """
    for position, step in enumerate(steps, 1):
        *branches, (kept, masks) = parts(step, masks)
        added: dict[BlockId, State] = {}
        for fewer, part in branches:
            yield from walk(steps[position:], part, forward(fewer, state, added), forward)
        state = forward(kept, state, added)
    yield masks, state


def runs(steps: Sequence[Step], masks: Sequence[Mask]) -> Iterator[tuple[Sequence[Mask], list[BlockId]]]:
    """The groups of a walk, each with the blocks that the walk runs after the group before; nothing is computed."""
    ran: list[BlockId] = []

    def forward(kept: Step, state: None, added: dict[BlockId, None]) -> None:
        ran.extend(block for block in kept if block not in added)
        added.update(dict.fromkeys(kept))

    for group, _ in walk(steps, masks, None, forward):
        yield group, ran.copy()
        ran.clear()
