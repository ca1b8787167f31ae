"""Where scoring runs: in memory or streamed from disk in this process, or on Ray workers that each
hold a replica.

Decides when a model is loaded, and how a scorer is made from the `runtime` settings. Torch is
loaded with the model.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from blockpruner.core.settings import Runtime
from blockpruner.scoring.work import Rows, ScoredRows, Scorer, Span, Task
from blockpruner.store.trials import Origin


class LazyScorer:
    """A scorer that is made at the first question."""

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
    memory: int | None = None,
) -> Scorer:
    """Load a checkpoint for scoring. `note` receives lines of information from Ray workers; for a
    model that is streamed here, `advance` and `memory` are as in `StreamingEngine`."""
    if runtime.executor == "ray":
        from blockpruner.scoring.large.ray import RayScorer

        return RayScorer(checkpoint, dtype, runtime, trust_remote_code, note)
    from blockpruner.model.models import load_model, set_threads

    set_threads(runtime.threads)
    if runtime.streaming:
        from blockpruner.scoring.large.streaming import StreamingEngine

        return StreamingEngine(
            checkpoint,
            dtype,
            device=runtime.device,
            batch_tokens=runtime.batch_tokens,
            attention=runtime.attention,
            trust_remote_code=trust_remote_code,
            advance=advance,
            memory=memory,
        )
    from blockpruner.scoring.engine import Engine

    model = load_model(checkpoint, dtype, runtime.device, trust_remote_code, runtime.attention)
    return Engine(model, runtime.batch_tokens)
