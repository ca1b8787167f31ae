"""A scorer in this process: the model in memory, or streamed from disk."""

from collections.abc import Callable
from pathlib import Path

from blockpruner.core.settings import Runtime
from blockpruner.model.models import load_model, set_threads
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large.streaming import StreamingEngine


def local_scorer(
    checkpoint: Path,
    dtype: str,
    runtime: Runtime,
    trust_remote_code: bool = False,
    advance: Callable[[int, int, str], object] = lambda done, total, detail: None,
    memory: int | None = None,
) -> Engine:
    """Load a checkpoint into an engine. `advance` and `memory` are as in `StreamingEngine`."""
    set_threads(runtime.threads)
    if runtime.streaming:
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
    model = load_model(checkpoint, dtype, runtime.device, trust_remote_code, runtime.attention)
    return Engine(model, runtime.batch_tokens)
