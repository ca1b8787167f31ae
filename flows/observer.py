"""A stage's progress in Prefect: every phase as a task run nested under the stage's.

Decides when Prefect hears of a phase: a thread sends the events, and the stage does not wait for it. When the thread
cannot send, the console alone goes on. What is sent is decided by flows.phases. That module takes 2 to 3 s to import,
which the first phase does; a stage without phases does not. The thread cannot do it: Prefect cannot be imported while
the interpreter ends, and a stage with nothing to compute is there soon.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

from blockpruner.core.progress import ConsoleObserver

TASK_VARIABLE = "BLOCKPRUNER_PREFECT_PARENT"
"""Environment variable, set by the flow: <flow run id>/<task run id> of the stage that runs."""

FLUSH = 10.0
"""Seconds that an ending stage waits for its last events to be sent."""

Events = SimpleQueue[tuple[Any, ...] | None]
"""Calls of an observer: the method's name and its arguments; None when the stage ends."""


class PrefectObserver(ConsoleObserver):
    """The console, and the server at PREFECT_API_URL if there is one and a flow started this stage."""

    def __init__(self) -> None:
        super().__init__()
        self._events: Events = SimpleQueue()
        self._thread: Thread | None = None
        self._sending = TASK_VARIABLE in os.environ and "PREFECT_API_URL" in os.environ

    def begin(self, phase: str, overall: float | None = None) -> None:
        super().begin(phase, overall)
        if self._sending and self._thread is None:
            from flows import phases

            self._thread = Thread(target=self._report, args=[phases.send], name="prefect-observer", daemon=True)
            self._thread.start()
            atexit.register(self._flush, self._thread)
        self._send("begin", phase, overall)

    def advance(self, done: int, total: int | None, detail: str) -> None:
        super().advance(done, total, detail)
        self._send("advance", done, total, detail)

    def end(self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False) -> None:
        super().end(summary, table, cached)
        self._send("end", summary, [dict(row) for row in table], cached)

    def _send(self, *event: Any) -> None:
        if self._sending:
            self._events.put(event)

    def _flush(self, thread: Thread) -> None:
        self._events.put(None)
        thread.join(FLUSH)
        if thread.is_alive():
            self.note(f"Prefect did not take the last events within {FLUSH:.0f} s; nothing else is lost")

    def _report(self, send: Callable[[Events, str, str, str], None]) -> None:
        try:
            flow_run, parent = os.environ[TASK_VARIABLE].split("/")
            send(self._events, flow_run, parent, os.environ["DVC_STAGE"])
        except Exception as error:  # the computation goes on, whatever is wrong with the server
            self._sending = False
            self.note(f"Prefect cannot be told of the progress any more ({error!r}); the stage goes on")
