"""`python -m flows.prune [--run NAME ...] [--budget B ...]`: the pipeline as a Prefect flow.

Without options everything in params.yaml is brought up to date. `--run` takes only that run (added to
params.yaml if missing); `--budget` takes only that target of each run (added as `<run>-<budget>`).

Decides what Prefect sees: one task per DVC stage, the state Cached for what had not changed, and the results as
artifacts. What has to run again is decided by DVC, how it is run by flows.dvc, what by flows.selection. Works
with the server of PREFECT_API_URL and without any (Prefect then starts one of its own, which takes 10 to 20 s, and
more on a busy machine).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run, task_run
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed

from blockpruner.core.errors import InputError
from blockpruner.core.progress import OBSERVER_VARIABLE
from blockpruner.store.files import read_json
from blockpruner.store.locks import this_process
from flows import dvc, observer, phases
from flows.selection import Plan, Selection, plan

METRICS, REPORT = Path("data/metrics"), Path("data/report")
PAGES_VARIABLE = "BLOCKPRUNER_REPORT_PAGES"
"""Where a browser finds the reports below data/; set by flows.serve, since a page of the UI may not link to a file."""


UNREACHABLE = ("budget ", "ratio ")
"""How a stage's reason begins where it is a budget that cannot be met: no later run would, either."""


def never(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether to try again; shows the traceback of what a task did not return but raised, as Prefect would."""
    if isinstance(state.data, Exception):
        get_run_logger().error(str(state.message), exc_info=state.data)
    return False


QUIET: dict[str, Any] = {"cache_policy": NO_CACHE, "retries": 1, "retry_condition_fn": never}
"""Of a task that returns its failure: DVC is the cache, and nothing is tried again. Without retries, Prefect logs the
returned state as an exception ("NoneType: None") before it says that the task has ended in it."""


@task(**QUIET)
def run_stage(stage: str, lock: int, again: bool = False) -> State[None]:
    """One DVC stage, its output in the task's log; `again` runs it even if nothing has changed."""
    url = get_current_settings().api.url
    parent = (
        {
            OBSERVER_VARIABLE: "flows.observer:PrefectObserver",
            "PREFECT_API_URL": url,
            observer.PARENT: f"{flow_run.id}/{task_run.id}",
        }
        if url
        else {}
    )  # without a lasting server the stage would start another one
    try:
        ran = dvc.repro(stage, lock, get_run_logger().info, parent, again)
    except BaseException as error:
        if url:
            with suppress(httpx.HTTPError):  # a server that is gone must not hide the error
                phases.close(UUID(flow_run.id), UUID(task_run.id))
        if isinstance(error, dvc.StageError):
            name = "Refused" if error.reason.startswith(UNREACHABLE) else None
            return Failed(name=name, message=str(error))
        raise
    return Completed() if ran else Completed(name="Cached", message="nothing has changed")


EVERYTHING = Selection()


@flow(name="prune")
def prune(selection: Selection = EVERYTHING) -> State[None]:
    """Bring the chosen runs and targets up to date, stage by stage, then the report."""
    try:
        with begin(selection) as (chosen, lock):
            outcome = run_stages(chosen.stages(), lock)
            if outcome.is_completed():
                publish(chosen)
            elif outcome.name == "Refused":
                return Failed(name="Refused", message=f"{outcome.message}{take_back(chosen)}")
            return outcome
    except InputError as error:
        return Failed(name="Refused", message=str(error))


@contextmanager
def begin(selection: Selection) -> Iterator[tuple[Plan, int]]:
    """The checked selection, written to params.yaml, in a locked workspace."""
    with dvc.workspace(f"flow run {flow_run.name}, {process()}") as lock:
        chosen = plan(selection)
        chosen.write()
        if chosen.additions:
            added = ", ".join(chosen.additions)
            get_run_logger().info(f"params.yaml: added {added}; commit it with dvc.lock to keep them")
        yield chosen, lock


def take_back(chosen: Plan, built: Collection[str] = ()) -> str:
    """After a budget that cannot be met: what of params.yaml is as before, in words for a state's message."""
    taken = chosen.take_back(built)
    return f". Taken back from params.yaml: {', '.join(taken)}" if taken else ""


def run_stages(stages: Sequence[str], lock: int) -> State[None]:
    """Stages one after the other, up to the first that fails."""
    states: list[State[Any]] = []
    for stage in stages:
        named = run_stage.with_options(name=stage, task_run_name=stage)
        states.append(named(stage, lock, return_state=True))
        if not states[-1].is_completed():
            name, kept = states[-1].name, ". Finished stages are kept"
            again = "" if name == "Refused" else ": run again to go on"
            return Failed(name=name, message=f"{states[-1].message}{kept}{again}")
    cached = sum(state.name == "Cached" for state in states)
    return Completed(message=f"{len(states)} stages: {len(states) - cached} run, {cached} cached")


def publish(chosen: Plan) -> None:
    """The results as artifacts of the flow run: dense against pruned per run, the report, a link to its page."""
    for run in chosen.runs:
        models = (f"{run}-dense", *chosen.targets_of(run))
        columns = {name: read_json(path) for name in models if (path := METRICS / f"{name}.json").exists()}
        keys = dict.fromkeys(key for values in columns.values() for key in values)
        if keys:
            table = [{"metric": key} | {name: values.get(key) for name, values in columns.items()} for key in keys]
            create_table_artifact(table, phases.artifact_key(f"results-{run}"), f"{run}: dense against pruned")
    report = REPORT / "report.md"
    if report.exists():
        create_markdown_artifact(phases.with_images(report), "report")
        create_link_artifact(page_of(REPORT), "Open the report", key="report-page")


def page_of(report: Path) -> str:
    """URL of the page of a report below data/."""
    pages, page = os.environ.get(PAGES_VARIABLE), report / "index.html"
    return f"{pages}/{page.relative_to('data').as_posix()}" if pages else page.resolve().as_uri()


def check_server() -> None:
    url = get_current_settings().api.url
    if url is not None and (error := get_client(sync_client=True).api_healthcheck()):
        raise InputError(
            f"the Prefect server at {url} (PREFECT_API_URL) does not answer: {error}; start it with "
            "`make serve`, or unset PREFECT_API_URL to run without one"
        )


def process() -> str:
    return f"process {this_process()}"


def run_here(check: Callable[[], object], start: Callable[[], State[Any]]) -> int:
    """Run a flow from the command line; the exit status of `main`.

    Args:
        check: refuses what the flow would refuse, before a server has to be started.
    """
    try:
        check()
        with dvc.workspace(process()):
            check_server()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the default skips the end of Prefect's own server
        state = start()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except httpx.HTTPError as error:
        print(f"the Prefect server went away ({error}); finished stages are kept: run again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished work is kept: run again to go on", file=sys.stderr)
        return 130
    print(state.message, file=sys.stderr)
    return 0 if state.is_completed() else 2 if state.name == "Refused" else 1


def main(argv: list[str] | None = None) -> int:
    """0: up to date; 1: a stage failed; 2: refused, params.yaml is as it was; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.prune", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--run", action="append", default=[], metavar="NAME", help="a run: runs/NAME.yaml")
    parser.add_argument(
        "--budget", action="append", default=[], metavar="B", help="0.22, 17blocks, 7layers, 0.3kv, 1.25x"
    )
    options = parser.parse_args(argv)
    selection = Selection(runs=tuple(options.run), budgets=tuple(options.budget))
    return run_here(lambda: plan(selection), lambda: prune(selection, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
