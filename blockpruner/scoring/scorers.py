"""Where scoring runs: in this process, or on Ray workers that each hold a replica of the model.

Torch is loaded with the model, not with this module.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from blockpruner.core.settings import Runtime
from blockpruner.scoring.work import Rows, ScoredRows, Scorer, Span, Task
from blockpruner.store.trials import Origin


class LazyScorer:
    """A scorer that is made when it is first used."""

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self._make = make

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        return self._scorer.row_batches(rows, span)

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        return self._scorer.run(tasks, rows)

    def origin(self) -> Origin:
        return self._scorer.origin()

    def close(self) -> None:
        if "_scorer" in vars(self):
            self._scorer.close()
            del self._scorer

    @cached_property
    def _scorer(self) -> Scorer:
        return self._make()


def make_scorer(
    checkpoint: Path,
    dtype: str,
    runtime: Runtime,
    *,
    trust_remote_code: bool = False,
    note: Callable[[str], object] = lambda message: None,
    advance: Callable[[int, int, str], object] = lambda done, total, detail: None,
) -> Scorer:
    """Load a checkpoint for scoring.

    `note` receives lines of information from Ray workers. `advance` receives the progress of a
    model that is streamed in this process, as in `StreamingEngine`.
    """
    if runtime.executor == "ray":
        from blockpruner.scoring.large.ray import RayScorer

        return RayScorer(checkpoint, dtype, runtime, trust_remote_code, note)
    from blockpruner.scoring.local import local_scorer

    return local_scorer(checkpoint, dtype, runtime, trust_remote_code, advance)
