"""How tasks are shared out among workers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from blockpruner.core.blocks import Mask
from blockpruner.scoring.walk import Step, runs
from blockpruner.scoring.work import Rows, ScoredRows, Task


def share_out(
    tasks: Sequence[Task], rows: Rows, pieces: int, steps: Sequence[Step]
) -> list[list[Task]]:
    """Split tasks into at most `pieces` pieces of about the same work. Masks stay in the order of
    the walk, where neighbours share the longest prefixes, and the sequence of all tasks' masks is
    cut. Row ranges stay whole."""
    leaves: list[tuple[int, Mask, int]] = []
    for number, task in enumerate(tasks):
        tokens = len(task.span) * max(len(rows[i]) for i in task.span)
        for group, ran in runs(steps, task.masks):
            # a block or the head counts one
            leaves += [(number, mask, tokens * (1 + len(ran))) for mask in group]
    done, whole = 0, sum(work for _, _, work in leaves)
    shared: dict[int, dict[int, list[Mask]]] = {}
    for number, mask, work in leaves:
        shared.setdefault(done * pieces // whole, {}).setdefault(number, []).append(mask)
        done += work
    return [
        [replace(tasks[n], masks=tuple(masks)) for n, masks in piece.items()]
        for piece in shared.values()
    ]


def unfinished(tasks: Sequence[Task], known: Iterable[ScoredRows]) -> list[Task]:
    """What is left of tasks once some values are known; those may cover parts of a task's rows."""
    done = {(scored.mask, row) for scored in known for row in scored.span}
    left: dict[Task, list[Mask]] = {}
    for task in tasks:
        for mask in task.masks:
            missing = tuple(row for row in task.span if (mask, row) not in done)
            if missing:
                rest = task.span if len(missing) == len(task.span) else missing
                left.setdefault(replace(task, span=rest, masks=()), []).append(mask)
    return [replace(task, masks=tuple(masks)) for task, masks in left.items()]
