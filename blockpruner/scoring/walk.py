"""The walk that scores many masks at once: the order of its steps, and where it branches.

Masks that agree on all steps so far share one state. Where they differ, the walk branches:

    walk(step j, state h, masks):
        the masks without block j    -> walk(j + 1, h)
        the others                   -> walk(j + 1, h + block_j(h))

A greedy iteration over n live blocks then takes n + n(n-1)/2 runs of a block instead of n(n-1).

A walk of `width` w takes the next w masks along at once: a block runs over all their states in one
call. The masks behind them wait with the state that they share. So at most w states are under way,
and one more waits for each branch that leads to them; with w = 1 the walk is depth first.

The caller decides what a state is: the engine walks with hidden states, counting walks with none.
No torch here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Generic, TypeVar

from blockpruner.core.blocks import BlockId, BlockKind, Mask

Step = tuple[BlockId, ...]
"""Blocks that read the same state: one block, or a whole layer where MHA and MLP both read the
layer's input."""

State = TypeVar("State")

RunBlock = Callable[[BlockId, Sequence[State]], Sequence[State]]
"""Computes what a block adds to each of some states."""

Join = Callable[[State, Sequence[State]], State]
"""Computes the state after a step, from the state before it and what its kept blocks add."""


def steps_of(layers: int, parallel: bool) -> list[Step]:
    """The steps of a forward pass: layer by layer, MHA before MLP."""
    pairs = [tuple(BlockId(kind, layer) for kind in BlockKind) for layer in range(layers)]
    return pairs if parallel else [(block,) for pair in pairs for block in pair]


@dataclass
class _Node(Generic[State]):
    """Masks that agree on all steps before the current one, and their state there."""

    masks: Sequence[Mask]
    """In the order of the walk."""
    state: State
    added: dict[BlockId, State] = field(default_factory=dict)
    """What blocks of the current step add to the state. Nodes that share a state share this."""


def walk(
    steps: Sequence[Step],
    masks: Sequence[Mask],
    state: State,
    run: RunBlock[State],
    join: Join[State],
    width: int = 1,
) -> Iterator[tuple[Sequence[Mask], State]]:
    """Yield the masks that agree on all steps, with their state after them, group by group. Masks
    that keep fewer blocks of a step come first; `width` masks go along at once."""
    # Masks with a common beginning become neighbours, and each beginning is computed once.
    ordered = sorted(masks, key=lambda mask: [_branch_order(step, mask) for step in steps])
    waiting = [(0, _Node(ordered, state))]
    while waiting:
        start, node = waiting.pop()
        front = [node]
        del node  # it would keep its state
        for position in range(start, len(steps)):
            step = steps[position]
            front = [branch for node in front for branch in _branches(step, node)]
            active = _count_active(front, width)
            while len(front) > active:
                waiting.append((position, front.pop()))
            front = _advance(step, front, run, join)
        yield from ((node.masks, node.state) for node in front)


def _branch_order(step: Step, mask: Mask) -> tuple[int, list[bool]]:
    """The sort key of masks that agree on all steps before: the fewest blocks of this step come
    before."""
    removed = [block in mask for block in step]
    return -sum(removed), removed


def _branches(step: Step, node: _Node[State]) -> list[_Node[State]]:
    """The masks of a node by what they keep of a step; they share its state."""
    groups = groupby(node.masks, lambda mask: _branch_order(step, mask))
    return [_Node(list(masks), node.state, node.added) for _, masks in groups]


def _count_active(nodes: Sequence[_Node[State]], width: int) -> int:
    """The number of nodes that hold one of the next `width` masks."""
    masks = 0
    for count, node in enumerate(nodes):
        if masks >= width:
            return count
        masks += len(node.masks)
    return len(nodes)


def _advance(
    step: Step, nodes: Sequence[_Node[State]], run: RunBlock[State], join: Join[State]
) -> list[_Node[State]]:
    """The nodes after a step."""
    for block in step:
        # One node for each state: branches of one node share `added`.
        readers = {
            id(node.added): node
            for node in nodes
            if block not in node.masks[0] and block not in node.added
        }
        if readers:
            outputs = run(block, [node.state for node in readers.values()])
            for node, output in zip(readers.values(), outputs, strict=True):
                node.added[block] = output
    advanced = []
    for node in nodes:
        outputs_left = [node.added[block] for block in step if block not in node.masks[0]]
        advanced.append(_Node(node.masks, join(node.state, outputs_left)))
    return advanced


def runs(
    steps: Sequence[Step], masks: Sequence[Mask]
) -> Iterator[tuple[Sequence[Mask], list[BlockId]]]:
    """The groups of a walk, each with the blocks that the walk runs after the group before; nothing
    is computed."""
    blocks: list[BlockId] = []

    def run(block: BlockId, states: Sequence[None]) -> Sequence[None]:
        blocks.append(block)
        return states

    for group, _ in walk(steps, masks, None, run, lambda state, added: None):
        yield group, blocks.copy()
        blocks.clear()
