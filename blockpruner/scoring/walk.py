"""The walk that scores many masks at once: the order of its steps, and where it branches.

Masks that agree on all steps so far share one state. Where they part, the walk branches:

    walk(step j, state h, masks):
        the masks without block j    -> walk(j + 1, h)
        the others                   -> walk(j + 1, h + block_j(h))

A greedy iteration over n live blocks then takes n + n(n-1)/2 runs of a block instead of n(n-1).

A walk of `width` w takes the next w masks along at once: a block runs over all their states in one
call. The masks behind them wait with the state that they share. So at most w states are under way,
and one more waits for each branch that leads to them; with w = 1 the walk is depth first.

What a state is, the caller decides: the engine walks with hidden states, counting walks with none.
No torch here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, islice
from typing import Generic, TypeVar

from blockpruner.core.blocks import BlockId, BlockKind, Mask

Step = tuple[BlockId, ...]
"""Blocks that read the same state: one block, or a whole layer where MHA and MLP both read the
layer's input."""

State = TypeVar("State")

RunBlock = Callable[[BlockId, Sequence[State]], Sequence[State]]
"""Gives what a block adds to each of some states."""

Join = Callable[[State, Sequence[State]], State]
"""Gives the state after a step, from the state before it and what its kept blocks add."""


def steps_of(layers: int, parallel: bool) -> list[Step]:
    """The steps of a forward pass: layer by layer, MHA before MLP."""
    pairs = [tuple(BlockId(kind, layer) for kind in BlockKind) for layer in range(layers)]
    return pairs if parallel else [(block,) for pair in pairs for block in pair]


@dataclass
class _Node(Generic[State]):
    """Masks that agree on all steps before one, and their state there."""

    masks: Sequence[Mask]
    """In the order of the walk."""
    state: State
    added: dict[BlockId, State] = field(default_factory=dict)
    """What blocks of this step add to the state, as far as it is known."""


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
    ordered = sorted(masks, key=lambda mask: [_place(step, mask) for step in steps])
    waiting = [(0, _Node(ordered, state))]
    while waiting:
        start, node = waiting.pop()
        front = [node]
        del node  # it would keep its state
        for position in range(start, len(steps)):
            front = [piece for node in front for piece in _parts(steps[position], node)]
            along = _along(front, width)
            while len(front) > along:
                waiting.append((position, front.pop()))
            front = _behind(steps[position], front, run, join)
        yield from ((node.masks, node.state) for node in front)


def _place(step: Step, mask: Mask) -> tuple[int, list[bool]]:
    """Where a mask comes among those that agree on all steps before: the fewest blocks first."""
    removed = [block in mask for block in step]
    return -sum(removed), removed


def _parts(step: Step, node: _Node[State]) -> list[_Node[State]]:
    """The masks of a node by what they keep of its step; they share its state."""
    parts = (list(part) for _, part in groupby(node.masks, lambda mask: _place(step, mask)))
    return [_Node(part, node.state, node.added) for part in parts]


def _along(pieces: Sequence[_Node[State]], width: int) -> int:
    """How many of the pieces go along: those that hold one of the first `width` masks."""
    before = accumulate((len(piece.masks) for piece in pieces), initial=0)
    return sum(count < width for count in islice(before, len(pieces)))


def _behind(
    step: Step, pieces: Sequence[_Node[State]], run: RunBlock[State], join: Join[State]
) -> list[_Node[State]]:
    """The pieces after their step."""
    kept = [[block for block in step if block not in piece.masks[0]] for piece in pieces]
    for block in step:
        asking = {
            id(p.added): p
            for p, own in zip(pieces, kept, strict=True)
            if block in own and block not in p.added
        }
        if asking:
            found = run(block, [piece.state for piece in asking.values()])
            for piece, adds in zip(asking.values(), found, strict=True):
                piece.added[block] = adds
    return [
        _Node(p.masks, join(p.state, [p.added[b] for b in own]))
        for p, own in zip(pieces, kept, strict=True)
    ]


def runs(
    steps: Sequence[Step], masks: Sequence[Mask]
) -> Iterator[tuple[Sequence[Mask], list[BlockId]]]:
    """The groups of a walk, each with the blocks that the walk runs after the group before; nothing
    is computed."""
    ran: list[BlockId] = []

    def run(block: BlockId, states: Sequence[None]) -> Sequence[None]:
        ran.append(block)
        return states

    for group, _ in walk(steps, masks, None, run, lambda state, added: None):
        yield group, ran.copy()
        ran.clear()
