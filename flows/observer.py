"""A stage's progress in Prefect: every phase as a task run nested under the stage's.

Decides when Prefect hears of a phase: the stage does not wait for it, a thread sends the events, and when it
cannot, the console alone goes on. What is sent is decided by flows.phases, which is imported with the first
phase, so that a stage without any does not pay for Prefect (2 to 3 s); and not in the thread, because Prefect
cannot be imported while the interpreter ends, and a stage with nothing to compute is quick to get there.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

from blockpruner.core.progress import ConsoleObserver

PARENT = "BLOCKPRUNER_PREFECT_PARENT"
"""Set by the flow: <flow run id>/<task run id> of the stage that runs."""

FLUSH = 10.0
"""Seconds that an ending stage waits for its last events to be sent."""


@dataclass(frozen=True)
class Begin:
    phase: str
    overall: float | None


@dataclass(frozen=True)
class Advance:
    done: int
    total: int
    detail: str


@dataclass(frozen=True)
class End:
    summary: str
    table: list[dict[str, Any]]
    cached: bool


Event = Begin | Advance | End | None


class PrefectObserver:
    """The console, and the server at PREFECT_API_URL if there is one and a flow started this stage."""

    def __init__(self) -> None:
        self._console = ConsoleObserver()
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._thread: Thread | None = None
        self._sending = PARENT in os.environ and "PREFECT_API_URL" in os.environ

    def note(self, message: str) -> None:
        self._console.note(message)

    def begin(self, phase: str, overall: float | None = None) -> None:
        self._console.begin(phase, overall)
        if self._sending and self._thread is None:
            from flows import phases

            self._thread = Thread(target=self._report, args=[phases.send], name="prefect-observer", daemon=True)
            self._thread.start()
            atexit.register(self._flush)
        self._send(Begin(phase, overall))

    def advance(self, done: int, total: int, detail: str) -> None:
        self._console.advance(done, total, detail)
        self._send(Advance(done, total, detail))

    def end(self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False) -> None:
        self._console.end(summary, table, cached)
        self._send(End(summary, [dict(row) for row in table], cached))

    def _send(self, event: Event) -> None:
        if self._sending:
            self._events.put(event)

    def _flush(self) -> None:
        assert self._thread is not None
        self._events.put(None)
        self._thread.join(FLUSH)
        if self._thread.is_alive():
            self._console.note(f"Prefect did not take the last events within {FLUSH:.0f} s; nothing else is lost")

    def _report(self, send: Callable[[SimpleQueue[Event], str, str, str], None]) -> None:
        try:
            flow_run, parent = os.environ[PARENT].split("/")
            send(self._events, flow_run, parent, os.environ["DVC_STAGE"])
        except Exception as error:  # whatever ails the server, the computation goes on
            self._sending = False
            self._console.note(f"Prefect cannot be told of the progress any more ({error!r}); the stage goes on")
