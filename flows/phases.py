"""Phases of a stage in Prefect: task runs nested under the stage's.

Decides what Prefect is shown of a phase: a task run, its progress as an artifact, its results as a table, the
state Cached where nothing was computed, and Crashed where the stage ended in the middle.

Uses Prefect's client, not its task engine: a phase is two events, not a function, and the engine reports states
through a background service which, when the server has gone, keeps the process waiting at its end.
"""

from __future__ import annotations

import re
import time
from queue import SimpleQueue
from typing import Any
from uuid import UUID, uuid4

from prefect import Task
from prefect.artifacts import TableArtifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType, TaskRunResult
from prefect.states import Completed, Crashed, Running

from flows.observer import Advance, Begin, End, Event

INTERVAL = 2.0
"""Seconds between two updates of a progress artifact."""


def artifact_key(text: str) -> str:
    """Prefect's keys hold lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class Phase:
    """One phase: begins when made, ends once."""

    def __init__(self, client: SyncPrefectClient, flow_run: UUID, parent: UUID, stage: str, name: str) -> None:
        self._client, self._flow_run, self._stage, self._name = client, flow_run, stage, name
        self._progress: str | None = None
        self._shown = 0.0
        run = client.create_task_run(
            Task(send, name=name),
            flow_run,
            dynamic_key=str(uuid4()),
            name=name,
            task_inputs={"__parents__": [TaskRunResult(id=parent)]},
        )
        self._id = run.id
        client.set_task_run_state(run.id, Running())

    def advance(self, event: Advance) -> None:
        if time.monotonic() - self._shown >= INTERVAL:
            done = f"{self._name}: {event.done} of {event.total} ({event.detail})"
            self._show(100.0 * event.done / event.total, done)
            self._shown = time.monotonic()

    def end(self, event: End) -> None:
        if self._progress is not None:
            self._show(100.0, f"{self._name}: {event.summary}")
        if event.table:
            self._create("table", TableArtifact(table=event.table).format(), f"{self._name}: {event.summary}")
        name = "Cached" if event.cached else "Completed"
        self._client.set_task_run_state(self._id, Completed(name=name, message=event.summary))

    def _show(self, percent: float, description: str) -> None:
        if self._progress is None:
            self._progress = self._create("progress", percent, description)
        else:
            body = {"data": percent, "description": description}
            self._client.request("PATCH", "/artifacts/{id}", path_params={"id": self._progress}, json=body)

    def _create(self, kind: str, data: Any, description: str) -> str:
        artifact = ArtifactCreate(
            key=artifact_key(f"{self._stage}-{kind}"),
            type=kind,
            description=description,
            data=data,
            flow_run_id=self._flow_run,
            task_run_id=self._id,
        )
        # client.create_artifact would do the same and start the service described above
        body = artifact.model_dump(mode="json", exclude_unset=True)
        return str(self._client.request("POST", "/artifacts/", json=body).json()["id"])


def send(events: SimpleQueue[Event], flow_run: str, parent: str, stage: str) -> None:
    """Send the events of a stage until None comes; its phases come one after the other."""
    with get_client(sync_client=True) as client:
        while (event := events.get()) is not None:
            match event:
                case Begin(name):
                    phase = Phase(client, UUID(flow_run), UUID(parent), stage, name)
                case Advance():
                    phase.advance(event)
                case End():
                    phase.end(event)


def close(flow_run: UUID, parent: UUID) -> None:
    """Mark the phases that a stage left open; a killed process cannot do it itself."""
    running = TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING]))
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])),
            task_run_filter=TaskRunFilter(state=running),
        )
        for run in runs:
            if TaskRunResult(id=parent) in run.task_inputs.get("__parents__", []):
                client.set_task_run_state(run.id, Crashed(message="the stage ended in this phase"), force=True)
