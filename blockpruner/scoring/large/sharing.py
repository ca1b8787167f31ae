"""How tasks are shared out among workers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from blockpruner.core.blocks import Mask
from blockpruner.scoring.walk import Step, runs
from blockpruner.scoring.work import Rows, ScoredRows, Task


def share_out(
    tasks: Sequence[Task], rows: Rows, pieces: int, steps: Sequence[Step]
) -> list[list[Task]]:
    """Split tasks into at most `pieces` pieces of about the same work.

    Masks stay in the order of the walk, where neighbours share the longest prefixes. Their sequence
    over all tasks is cut. Row ranges stay whole.
    """
    work: list[tuple[Task, Mask, int]] = []
    for task in tasks:
        tokens = len(task.span) * max(len(rows[row]) for row in task.span)
        for masks, blocks in runs(steps, task.masks):
            # A run of a block counts one, and so does the head.
            work += [(task, mask, tokens * (1 + len(blocks))) for mask in masks]
    total = sum(cost for _, _, cost in work)
    assigned = 0
    masks_by_task: list[dict[Task, list[Mask]]] = [{} for _ in range(pieces)]
    for task, mask, cost in work:
        masks_by_task[assigned * pieces // total].setdefault(task, []).append(mask)
        assigned += cost
    return [_with_masks(piece) for piece in masks_by_task if piece]


def unfinished(tasks: Sequence[Task], scored: Iterable[ScoredRows]) -> list[Task]:
    """The tasks without what is already scored, which may be some of a task's rows."""
    done = {(piece.mask, row) for piece in scored for row in piece.span}
    masks_by_task: dict[Task, list[Mask]] = {}
    for task in tasks:
        for mask in task.masks:
            missing = tuple(row for row in task.span if (mask, row) not in done)
            if missing:
                span = task.span if len(missing) == len(task.span) else missing
                masks_by_task.setdefault(replace(task, span=span, masks=()), []).append(mask)
    return _with_masks(masks_by_task)


def _with_masks(masks_by_task: dict[Task, list[Mask]]) -> list[Task]:
    return [replace(task, masks=tuple(masks)) for task, masks in masks_by_task.items()]
