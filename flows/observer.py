"""A stage's progress in Prefect: every phase as a task run nested under the stage's.

Decides what Prefect is shown of a phase: a task run, a progress artifact, a table of its results. The stage
process does not wait for Prefect: a thread sends the events, and when it cannot, the console alone goes on.
Prefect is imported in that thread, so that a stage without phases does not pay for it (3 s).
"""

from __future__ import annotations

import atexit
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

from blockpruner.progress import ConsoleObserver

PARENT = "BLOCKPRUNER_PREFECT_PARENT"
"""Set by the flow: <flow run id>/<task run id> of the stage that runs."""

INTERVAL = 2.0
"""Seconds between two updates of a progress artifact."""

FLUSH = 20.0
"""Seconds that an ending stage waits for its last events to be sent; the import alone can take several."""


@dataclass(frozen=True)
class Begin:
    phase: str


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
        self._thread = Thread(target=self._report, name="prefect-observer", daemon=True)
        self._sending = PARENT in os.environ and "PREFECT_API_URL" in os.environ

    def note(self, message: str) -> None:
        self._console.note(message)

    def begin(self, phase: str, overall: float | None = None) -> None:
        self._console.begin(phase, overall)
        if self._sending and self._thread.ident is None:
            self._thread.start()
            atexit.register(self._flush)
        self._send(Begin(phase))

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
        self._events.put(None)
        self._thread.join(FLUSH)
        if self._thread.is_alive():
            self._console.note(f"Prefect did not take the last events within {FLUSH:.0f} s; nothing else is lost")

    def _report(self) -> None:
        try:
            flow_run, parent = os.environ[PARENT].split("/")
            _send_all(self._events, flow_run, parent, os.environ["DVC_STAGE"])
        except Exception as error:  # whatever ails the server, the computation goes on
            self._sending = False
            self._console.note(f"Prefect cannot be told of the progress any more ({error!r}); the stage goes on")


def artifact_key(text: str) -> str:
    """Prefect's keys hold lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _send_all(events: SimpleQueue[Event], flow_run: str, parent: str, stage: str) -> None:
    """Send events until None comes. Phases are strictly one after the other.

    Uses the client and not the task engine: a phase is two calls apart, not a function, and the engine reports
    states by a background service which at exit waits for a server that has gone.
    """
    from prefect import Task
    from prefect.artifacts import TableArtifact
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate
    from prefect.client.schemas.objects import TaskRunResult
    from prefect.states import Completed, Running

    flow_run_id, parents = uuid.UUID(flow_run), {"__parents__": [TaskRunResult(id=uuid.UUID(parent))]}
    run_id = progress = None
    shown = 0.0
    with get_client(sync_client=True) as client:

        def create(kind: str, data: Any, description: str) -> str:
            artifact = ArtifactCreate(
                key=artifact_key(f"{stage}-{kind}"),
                type=kind,
                description=description,
                data=data,
                flow_run_id=flow_run_id,
                task_run_id=run_id,
            )
            body = artifact.model_dump(mode="json", exclude_unset=True)
            return str(client.request("POST", "/artifacts/", json=body).json()["id"])

        def update(percent: float, description: str) -> None:
            nonlocal progress
            if progress is None:
                progress = create("progress", percent, description)
            else:
                body = {"data": percent, "description": description}
                client.request("PATCH", "/artifacts/{id}", path_params={"id": progress}, json=body)

        while (event := events.get()) is not None:
            match event:
                case Begin(phase):
                    run = client.create_task_run(
                        Task(_send_all, name=phase),
                        flow_run_id,
                        dynamic_key=str(uuid.uuid4()),
                        name=phase,
                        task_inputs=parents,  # type: ignore[arg-type]  # a dict of lists of a wider union
                    )
                    client.set_task_run_state(run.id, Running())
                    run_id, progress, shown = run.id, None, 0.0
                case Advance(done, total, detail) if time.monotonic() - shown >= INTERVAL:
                    update(100.0 * done / total, f"{phase}: {done} of {total} ({detail})")
                    shown = time.monotonic()
                case End(summary, table, cached):
                    assert run_id is not None
                    if progress is not None:
                        update(100.0, f"{phase}: {summary}")
                    if table:
                        create("table", TableArtifact(table=table).format(), f"{phase}: {summary}")
                    name = "Cached" if cached else "Completed"
                    client.set_task_run_state(run_id, Completed(name=name, message=summary))
