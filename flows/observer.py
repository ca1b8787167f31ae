"""A stage's progress in Prefect: every phase as a task run nested under the stage's.

Prefect hears of a phase when it begins and when it ends; what comes between is in the stage's log.
When the server does not take it, the console alone goes on. flows.phases takes 2 to 3 s to import,
which the first phase does.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blockpruner.core.progress import ConsoleObserver

TASK_VARIABLE = "BLOCKPRUNER_PREFECT_PARENT"
"""Environment variable, set by the flow: <flow run id>/<task run id> of the stage that runs."""


class PrefectObserver(ConsoleObserver):
    """The console, and the server at PREFECT_API_URL if there is one and a flow started this
    stage."""

    def __init__(self) -> None:
        super().__init__()
        self._sending = TASK_VARIABLE in os.environ and "PREFECT_API_URL" in os.environ
        self._phase: Any = None

    def begin(self, phase: str, overall: float | None = None) -> None:
        super().begin(phase, overall)

        def send() -> None:
            from flows.phases import Phase

            flow_run, parent = os.environ[TASK_VARIABLE].split("/")
            self._phase = Phase(flow_run, parent, os.environ["DVC_STAGE"], phase, self._phase)

        self._send(send)

    def end(
        self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False
    ) -> None:
        super().end(summary, table, cached)
        self._send(lambda: self._phase.end(summary, [dict(row) for row in table], cached))

    def _send(self, call: Callable[[], None]) -> None:
        if not self._sending:
            return
        try:
            call()
        except Exception as error:  # the computation goes on, whatever is wrong with the server
            self._sending = False
            self.note(
                f"the progress does not reach Prefect any more ({error!r}); the stage goes on"
            )
