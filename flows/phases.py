"""Phases of a stage in Prefect: task runs nested under the stage's.

Decides what Prefect is shown of a phase: a task run, and its results as a table. Its state is
Cached if nothing was computed, and Crashed if the stage ended in the middle.

Uses Prefect's client, not its task engine: a phase is two events, not a function. The engine
reports states through a background service, and that keeps the process waiting at its end when the
server has gone.
"""

import math
import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from prefect import Task
from prefect.artifacts import TableArtifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType, TaskRunResult
from prefect.states import Completed, Crashed, Running

PATIENCE = 10.0
"""Seconds that a stage waits for an answer of the server."""

OPEN = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
"""The states of a run that only a living process can lead to an end."""


def artifact_key(text: str) -> str:
    """Prefect's keys hold lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class Phase:
    """One phase. It begins when it is made, and ends once.

    The V1 UI unfolds phases under their stage. V2 does not, so an arrow leads from each phase to
    the next.
    """

    def __init__(
        self, flow_run: str, parent: str, stage: str, name: str, previous: "Phase | None"
    ) -> None:
        self._flow_run, self._stage, self._name = UUID(flow_run), stage, name
        inputs: Any = {"__parents__": [TaskRunResult(id=UUID(parent))]}
        if previous is not None:
            inputs["before"] = [TaskRunResult(id=previous._id)]
        with _client() as client:
            task = Task(artifact_key, name=name)
            key = str(uuid4())
            run = client.create_task_run(
                task, self._flow_run, dynamic_key=key, name=name, task_inputs=inputs
            )
            client.set_task_run_state(run.id, Running())
        self._id: UUID = run.id

    def end(self, summary: str, table: Sequence[dict[str, Any]], cached: bool) -> None:
        with _client() as client:
            if table:  # JSON has no infinity
                rows = [
                    {key: str(cell) if cell == math.inf else cell for key, cell in row.items()}
                    for row in table
                ]
                artifact = ArtifactCreate(
                    key=artifact_key(f"{self._stage}-table"),
                    type="table",
                    description=f"{self._name}: {summary}",
                    data=TableArtifact(table=rows).format(),
                    flow_run_id=self._flow_run,
                    task_run_id=self._id,
                )
                # client.create_artifact would do the same and start the service described above
                client.request(
                    "POST", "/artifacts/", json=artifact.model_dump(mode="json", exclude_unset=True)
                )
            name = "Cached" if cached else "Completed"
            client.set_task_run_state(self._id, Completed(name=name, message=summary))


def _client() -> SyncPrefectClient:
    return get_client(httpx_settings={"timeout": PATIENCE}, sync_client=True)


def close(flow_run: str, parent: str) -> None:
    """Mark the phases that a stage left open; a killed process cannot do it."""
    of_flow = FlowRunFilter.model_validate({"id": {"any_": [flow_run]}})
    is_open = TaskRunFilter.model_validate({"state": {"type": {"any_": OPEN}}})
    with get_client(sync_client=True) as client:
        for run in client.read_task_runs(flow_run_filter=of_flow, task_run_filter=is_open):
            if TaskRunResult(id=UUID(parent)) in run.task_inputs.get("__parents__", []):
                client.set_task_run_state(
                    run.id, Crashed(message="the stage ended in this phase"), force=True
                )
