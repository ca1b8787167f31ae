"""Phases of a stage in Prefect: task runs nested under the stage's.

Decides what Prefect is shown of a phase: a task run, its progress and what is left of the stage as an artifact, its
results as a table, and pictures of what a search found (flows.charts). Its state is Cached if nothing was computed, and
Crashed if the stage ended in the middle.

Uses Prefect's client, not its task engine: a phase is two events, not a function. The engine reports states through a
background service, and that keeps the process waiting at its end when the server has gone.
"""

from __future__ import annotations

import base64
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from prefect import Task
from prefect.artifacts import TableArtifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType, TaskRun, TaskRunResult
from prefect.states import Completed, Crashed, Running

from blockpruner.core.blocks import Mask
from blockpruner.core.progress import Pace, duration
from flows import charts
from flows.observer import Events

OPEN = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
"""The states of a run that only a living process can lead to an end."""

INTERVAL = 2.0
"""Seconds between two updates of a progress artifact."""


def artifact_key(text: str) -> str:
    """Prefect's keys hold lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def image(name: str, png: bytes) -> str:
    """Markdown of a picture with its bytes; the page of an image artifact would print the bytes below it."""
    return f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})"


def with_images(report: Path) -> str:
    """A report's Markdown with its pictures in it."""
    text = report.read_text(encoding="utf-8")
    return re.sub(r"!\[(.*?)\]\((.*?)\)", lambda found: image(found[1], (report.parent / found[2]).read_bytes()), text)


class Phase:
    """One phase. It begins when it is made, and ends once."""

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

    def advance(self, done: int, total: int | None, detail: str) -> None:
        now = time.monotonic()
        if self._first is None:  # the pace does not count what came before, such as loading the model
            self._first = now, done
        since, steps = now - self._first[0], done - self._first[1]
        if now - self._shown >= INTERVAL:
            words, percent = detail, 0.0
            if total is not None:
                rest = f", {duration(since / steps * (total - done))} left" if steps else ""
                words, percent = f"{done} of {total} ({detail}){rest}", 100.0 * done / total
            self._show(percent, f"{self._name}: {words}{self._outlook}")
            self._shown = now

    def end(self, summary: str, table: Sequence[dict[str, Any]], cached: bool, pictures: Mapping[str, bytes]) -> None:
        words = f"{self._name}: {summary}"
        if self._progress is not None:
            self._show(100.0, words)
        if table:
            self._create("table", "table", TableArtifact(table=list(table)).format(), words)
        if pictures:
            self._create("pictures", "markdown", "\n\n".join(image(*each) for each in pictures.items()), words)
        self._client.set_task_run_state(self._id, Completed(name="Cached" if cached else "Completed", message=summary))

    def _show(self, percent: float, description: str) -> None:
        if self._progress is None:
            self._progress = self._create("progress", "progress", percent, description)
        else:
            body = {"data": percent, "description": description}
            self._client.request("PATCH", "/artifacts/{id}", path_params={"id": self._progress}, json=body)

    def _create(self, name: str, kind: str, data: Any, description: str) -> str:
        key = artifact_key(f"{self._stage}-{name}")
        run = {"flow_run_id": self._flow_run, "task_run_id": self._id}
        artifact = ArtifactCreate.model_validate(
            {"key": key, "type": kind, "description": description, "data": data} | run
        )
        # client.create_artifact would do the same and start the service described above
        body = artifact.model_dump(mode="json", exclude_unset=True)
        return str(self._client.request("POST", "/artifacts/", json=body).json()["id"])


class SearchPhase:
    """The search whose iterations are the phases of a stage, as its pictures show it."""

    def __init__(self) -> None:
        self._layers = 0
        self._removed: list[Mask] = []

    def pictures(self, table: Sequence[Mapping[str, Any]], show: bool) -> dict[str, bytes]:
        """The pictures after one more iteration, whose results these are; none if they are not to be shown."""
        rows = charts.candidates(table)
        chosen = [unit for unit, row in rows.items() if row["chosen"]]
        self._removed += chosen
        self._layers = max([self._layers, *(block.layer + 1 for unit in rows for block in unit)])
        if not chosen or not show:
            return {}
        drawn = {"scores": charts.scores(rows)} if charts.scored(rows) else {}
        return drawn | {"blocks": charts.blocks(self._layers, self._removed)}


def send(events: Events, flow_run: str, parent: str, stage: str) -> None:
    """Send the events of a stage until None comes; phases do not overlap.

    No pictures are drawn of a cached iteration, nor when a later one has ended: the stage would wait for all of them.
    """
    pace, search = Pace(), SearchPhase()
    waiting: deque[tuple[Any, ...] | None] = deque()
    with get_client(sync_client=True) as client:
        while True:
            while not waiting or not events.empty():
                waiting.append(events.get())
            match waiting.popleft():
                case ("begin", name, overall):
                    outlook = pace.begin(overall, time.monotonic())
                    phase = Phase(client, UUID(flow_run), UUID(parent), stage, name, outlook)
                case ("advance", done, total, detail):
                    phase.advance(done, total, detail)
                case ("end", summary, table, cached):
                    pace.end(cached)
                    is_last = not any(later and later[0] == "end" for later in waiting)
                    phase.end(summary, table, cached, search.pictures(table, show=is_last and not cached))
                case _:
                    return


def open_task_runs(client: SyncPrefectClient, flow_run: UUID) -> list[TaskRun]:
    """The task runs of a flow run that have not ended."""
    return client.read_task_runs(
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [flow_run]}}),
        task_run_filter=TaskRunFilter.model_validate({"state": {"type": {"any_": OPEN}}}),
    )


def close(flow_run: UUID, parent: UUID) -> None:
    """Mark the phases that a stage left open; a killed process cannot do it."""
    with get_client(sync_client=True) as client:
        for run in open_task_runs(client, flow_run):
            if TaskRunResult(id=parent) in run.task_inputs.get("__parents__", []):
                client.set_task_run_state(run.id, Crashed(message="the stage ended in this phase"), force=True)
