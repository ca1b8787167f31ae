"""Phases of a stage in Prefect: task runs nested under the stage's.

Decides what Prefect is shown of a phase: a task run, its progress and what is left of the stage as an artifact, its
results as a table, pictures of what a search found (flows.charts), the state Cached where nothing was computed, and
Crashed where the stage ended in the middle.

Uses Prefect's client, not its task engine: a phase is two events, not a function, and the engine reports states
through a background service which, when the server has gone, keeps the process waiting at its end.
"""

from __future__ import annotations

import base64
import re
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
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

from blockpruner.core.blocks import Mask
from flows import charts
from flows.observer import Advance, Begin, End, Event

INTERVAL = 2.0
"""Seconds between two updates of a progress artifact."""


def artifact_key(text: str) -> str:
    """Prefect's keys hold lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def image(name: str, png: bytes) -> str:
    """Markdown of a picture with its bytes: an image artifact's page would print the bytes below it."""
    return f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})"


def with_images(report: Path) -> str:
    """A report's Markdown, its pictures in it."""
    text = report.read_text(encoding="utf-8")
    return re.sub(r"!\[(.*?)\]\((.*?)\)", lambda found: image(found[1], (report.parent / found[2]).read_bytes()), text)


class Pace:
    """How fast a stage goes: from the share of it that is done since its first computed phase."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def begin(self, overall: float | None, now: float) -> str:
        """A phase begins with this share of the stage done; gives the outlook in words."""
        if overall is None:
            return ""
        if self._first is None:
            self._first = (overall, now)
        share, since = overall - self._first[0], now - self._first[1]
        return f"; the stage: {overall:.0%} done, {left(since / share * (1 - overall))}" if share > 0 else ""

    def end(self, cached: bool) -> None:
        if cached:  # what was read from a cache says nothing about the time that is left
            self._first = None


def left(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} left"


class Phase:
    """One phase: begins when made, ends once."""

    def __init__(
        self, client: SyncPrefectClient, flow_run: UUID, parent: UUID, stage: str, name: str, outlook: str
    ) -> None:
        self._client, self._flow_run, self._stage, self._name = client, flow_run, stage, name
        self._outlook = outlook
        self._progress: str | None = None
        self._shown = 0.0
        self._first: tuple[float, int] | None = None
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
        now = time.monotonic()
        if self._first is None:  # what came before, such as loading the model, says nothing of the pace
            self._first = now, event.done
        since, steps = now - self._first[0], event.done - self._first[1]
        if now - self._shown >= INTERVAL:
            rest = f", {left(since / steps * (event.total - event.done))}" if steps else ""
            done = f"{self._name}: {event.done} of {event.total} ({event.detail}){rest}{self._outlook}"
            self._show(100.0 * event.done / event.total, done)
            self._shown = now

    def end(self, event: End, pictures: Mapping[str, bytes]) -> None:
        said = f"{self._name}: {event.summary}"
        if self._progress is not None:
            self._show(100.0, said)
        if event.table:
            self._create("table", "table", TableArtifact(table=event.table).format(), said)
        if pictures:
            self._create("pictures", "markdown", "\n\n".join(image(*each) for each in pictures.items()), said)
        name = "Cached" if event.cached else "Completed"
        self._client.set_task_run_state(self._id, Completed(name=name, message=event.summary))

    def _show(self, percent: float, description: str) -> None:
        if self._progress is None:
            self._progress = self._create("progress", "progress", percent, description)
        else:
            body = {"data": percent, "description": description}
            self._client.request("PATCH", "/artifacts/{id}", path_params={"id": self._progress}, json=body)

    def _create(self, name: str, kind: str, data: Any, description: str) -> str:
        artifact = ArtifactCreate(
            key=artifact_key(f"{self._stage}-{name}"),
            type=kind,
            description=description,
            data=data,
            flow_run_id=self._flow_run,
            task_run_id=self._id,
        )
        # client.create_artifact would do the same and start the service described above
        body = artifact.model_dump(mode="json", exclude_unset=True)
        return str(self._client.request("POST", "/artifacts/", json=body).json()["id"])


class Search:
    """What the pictures show of the search that a stage's phases are the iterations of."""

    def __init__(self) -> None:
        self._layers = 0
        self._removed: list[Mask] = []

    def pictures(self, event: End, behind: bool) -> dict[str, bytes]:
        """Of one more iteration; none where nothing was computed, or where a later one has already ended: the stage
        would wait for all of them in the end."""
        rows = charts.candidates(event.table)
        chosen = [unit for unit, row in rows.items() if row["chosen"]]
        if not chosen:
            return {}
        self._removed += chosen
        self._layers = max(self._layers, *(block.layer + 1 for unit in rows for block in unit))
        if event.cached or behind:
            return {}
        drawn = {"scores": charts.scores(rows)} if charts.scored(rows) else {}
        return drawn | {"blocks": charts.blocks(self._layers, self._removed)}


def send(events: SimpleQueue[Event], flow_run: str, parent: str, stage: str) -> None:
    """Send the events of a stage until None comes; its phases come one after the other."""
    pace, search = Pace(), Search()
    waiting: deque[Event] = deque()
    with get_client(sync_client=True) as client:
        while True:
            while not waiting or not events.empty():
                waiting.append(events.get())
            match event := waiting.popleft():
                case Begin(name, overall):
                    outlook = pace.begin(overall, time.monotonic())
                    phase = Phase(client, UUID(flow_run), UUID(parent), stage, name, outlook)
                case Advance():
                    phase.advance(event)
                case End():
                    pace.end(event.cached)
                    phase.end(event, search.pictures(event, any(isinstance(later, End) for later in waiting)))
                case None:
                    return


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
