"""`python -m flows.prune [--run NAME ...] [--budget B ... [--compensate METHOD] [--recover]] [--push REMOTE]`.

The pipeline as a flow. Without options everything in params.yaml is brought up to date. `--run` takes only that run
(added to params.yaml if missing); `--budget` takes only that target of each run (added as `<run>-<budget>`), which
`--compensate` and `--recover` heal (added as `<run>-<budget>-<method>-trained`). `--push` sends what was made to a DVC
remote.

Decides what Prefect sees: one task for each DVC stage, the state Cached for what had not changed, and the results as
artifacts. What has to run again is decided by DVC, how it is run by flows.dvc, what by flows.selection. Works with the
server of PREFECT_API_URL and without any. Prefect then starts one of its own, which takes 10 to 20 s, and more on a
busy machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import httpx
from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run, task_run
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed

from blockpruner.core.errors import InputError
from blockpruner.core.progress import OBSERVER_VARIABLE
from blockpruner.core.settings import CompensationMethod
from blockpruner.store.locks import this_process
from flows import dvc, phases, tracking
from flows.observer import TASK_VARIABLE
from flows.selection import Chosen, Selection, choose
from flows.server import require_access

REPORT = Path("data/report")
PAGES_VARIABLE = "BLOCKPRUNER_REPORT_PAGES"
"""Environment variable, set by flows.serve: the URL at which a browser finds the reports below data/. A page of the UI
may not link to a file."""

UNREACHABLE = ("budget ", "ratio ")
"""How a stage's reason begins if a budget cannot be met; no later run would meet it, either."""


def fail_once(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """False: nothing is tried again. Logs the traceback of an exception, which Prefect leaves to its last try."""
    if isinstance(state.data, Exception):
        get_run_logger().error(str(state.message), exc_info=state.data)
    return False


AS_RETURNED: dict[str, Any] = {"cache_policy": NO_CACHE, "retries": 1, "retry_condition_fn": fail_once}
"""Options of a task that returns its failure; DVC is the cache. Without retries Prefect would log the returned state as
an exception ("NoneType: None")."""


@task(**AS_RETURNED)
def run_stage(stage: str, lock: int, start: bool, again: bool) -> State[None]:
    """One DVC stage, its output in the task's log.

    Args:
        start: False if the stage is known to be up to date; DVC is not asked then.
        again: whether the stage runs even if nothing has changed.
    """
    cached: State[None] = Completed(name="Cached", message="nothing has changed")
    if not start:
        return cached
    url = get_current_settings().api.url
    environment = {
        OBSERVER_VARIABLE: "flows.observer:PrefectObserver",
        "PREFECT_API_URL": str(url),
        TASK_VARIABLE: f"{flow_run.id}/{task_run.id}",
    }
    try:  # without a lasting server the stage would start another one
        ran = dvc.repro(stage, lock, get_run_logger().info, environment if url else {}, again)
    except BaseException as error:
        if url:
            with suppress(httpx.HTTPError):  # a server that is gone must not hide the error
                phases.close(UUID(flow_run.id), UUID(task_run.id))
        if isinstance(error, dvc.StageError):
            name = "Refused" if error.reason.startswith(UNREACHABLE) else None
            return Failed(name=name, message=str(error))
        raise
    return Completed() if ran else cached


@task(name="push", task_run_name="push to {remote}", **AS_RETURNED)
def push_outputs(remote: str, stages: Sequence[str], lock: int) -> State[None]:
    """What the stages have made, sent to a remote of DVC."""
    try:
        dvc.push(remote, stages, lock, get_run_logger().info)
    except dvc.StageError as error:
        return Failed(message=str(error))
    return Completed()


@task(name="track", **AS_RETURNED)
def track_targets(targets: Sequence[str]) -> State[None]:
    """What was built, recorded by a tracker, which may be elsewhere."""
    try:
        tracking.track(tracking.project(), targets)
    except Exception as error:  # whatever a network does
        return Failed(message=f"the tracker failed: {error}")
    return Completed()


EVERYTHING = Selection()


@flow(name="prune")
def prune(selection: Selection = EVERYTHING) -> State[None]:
    """Bring the chosen runs and targets up to date, stage by stage, then the report."""
    return build(lambda: choose(selection), selection.push)


def build(check: Callable[[], Chosen], push: str | None) -> State[None]:
    """Make what `check` chooses, show it, and push it to a remote of DVC; None: to none."""
    try:
        with begin(check) as (chosen, lock):
            states = run_stages(chosen.stages(), lock)
            state = outcome(states)
            if state.is_completed():
                publish(chosen)
                after: list[State[Any]] = []
                if tracking.project():
                    after.append(track_targets(list(chosen.targets), return_state=True))
                if push is not None:
                    after.append(push_outputs(push, chosen.stages(), lock, return_state=True))
                return next((outcome([*states, each]) for each in after if not each.is_completed()), state)
            elif state.name == "Refused":
                return Failed(name="Refused", message=f"{state.message}{restored(chosen, [])}")
            return state
    except InputError as error:
        return Failed(name="Refused", message=str(error))


@contextmanager
def begin(check: Callable[[], Chosen]) -> Iterator[tuple[Chosen, int]]:
    """What `check` has chosen, written to params.yaml, in a locked workspace."""
    with dvc.workspace(f"flow run {flow_run.name}, {this_process()}") as lock:
        tracking.project()  # refused before hours of work
        chosen = check()
        chosen.write()
        if chosen.additions:
            added = ", ".join(chosen.additions)
            get_run_logger().info(f"params.yaml: added {added}; commit it with dvc.lock to keep them")
        yield chosen, lock


def restored(chosen: Chosen, built: Sequence[str]) -> str:
    """After a budget that only a stage could refuse: params.yaml as before, except for what is built; in words."""
    if not chosen.additions:
        return ""
    if not chosen.keep(built):
        return ". params.yaml was changed meanwhile and is left as it is: take out what cannot be met"
    new = [target for target in built if target in chosen.new_targets]
    return ". params.yaml is as before" + (f", with {', '.join(new)}" if new else "")


def run_stages(
    stages: Sequence[str], lock: int, stale: Collection[str] | None = None, again: Collection[str] = ()
) -> list[State[None]]:
    """Run stages one after the other, up to the first that fails; their states.

    Args:
        stale: the stages that have changed; those before the first of them are not started. None: not known.
        again: stages that run even if nothing has changed.
    """
    states: list[State[Any]] = []
    start = stale is None
    for stage in stages:
        start, label = start or stage in (stale or ()), stage.rpartition(":")[2]
        named = run_stage.with_options(name=label, task_run_name=label)
        states.append(named(stage, lock, start, stage in again, return_state=True))
        if not states[-1].is_completed():
            break
    return states


def outcome(states: Sequence[State[None]]) -> State[None]:
    """The state of all stages that ran one after the other."""
    last, cached = states[-1], sum(state.name == "Cached" for state in states)
    if last.is_completed():
        return Completed(message=f"{len(states)} stages: {len(states) - cached} run, {cached} cached")
    more = "" if last.name == "Refused" else ": run again to go on"
    return Failed(name=last.name, message=f"{last.message}. Finished stages are kept{more}")


def publish(chosen: Chosen) -> None:
    """Show the results as artifacts of the flow run: dense against pruned for each run, the report, its page."""
    for run in chosen.runs:
        models = (f"{run}-dense", *chosen.targets_of(run))
        columns = {name: tracking.figures(name) for name in models if (tracking.METRICS / f"{name}.json").exists()}
        keys = dict.fromkeys(key for values in columns.values() for key in values)
        if keys:
            table = [{"metric": key} | {name: values.get(key) for name, values in columns.items()} for key in keys]
            create_table_artifact(table, phases.artifact_key(f"results-{run}"), f"{run}: dense against pruned")
    publish_report(REPORT, "report", "report-page", "Open the report")


def publish_report(folder: Path, key: str, page_key: str, words: str) -> None:
    """Show a report as an artifact, if there is one, and a link to its page as another."""
    if (report := folder / "report.md").exists():
        create_markdown_artifact(phases.with_images(report), phases.artifact_key(key))
        create_link_artifact(page_of(folder), words, key=phases.artifact_key(page_key))


def page_of(report: Path) -> str:
    """The URL of the page of a report below data/."""
    pages, page = os.environ.get(PAGES_VARIABLE), report / "index.html"
    return f"{pages}/{page.relative_to('data').as_posix()}" if pages else page.resolve().as_uri()


def run_here(check: Callable[[], object], start: Callable[[], State[Any]]) -> int:
    """Run a flow from the command line; the exit status of `main`.

    Args:
        check: refuses what the flow would refuse, before a server has to be started.
    """
    try:
        check()
        with dvc.workspace(this_process()):
            if url := get_current_settings().api.url:
                require_access(url)
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
    methods = get_args(CompensationMethod)
    parser.add_argument("--compensate", choices=methods, help="of the targets of --budget; else as their run says")
    parser.add_argument("--recover", action="store_true", help="train the targets of --budget")
    parser.add_argument("--push", metavar="REMOTE", help="a remote of DVC, which gets what was made")
    options = parser.parse_args(argv)
    selection = Selection(
        runs=tuple(options.run),
        budgets=tuple(options.budget),
        compensate=options.compensate,
        recover=options.recover,
        push=options.push,
    )
    return run_here(lambda: choose(selection), lambda: prune(selection, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
