"""`python -m flows.prune [OPTIONS]`: the pipeline as a flow.

Without options everything in params.yaml is brought up to date. `--run` takes only that run (added
to params.yaml if missing); `--budget` takes only that target of each run (added as
`<run>-<budget>`), which `--compensate` and `--train` heal. With `--keep-going` a failure does not
stop other models. `--push` sends what was made to a DVC remote, `--share` also the settings, as an
experiment, to a Git remote.

Decides what Prefect sees: one task for each DVC stage, the state Cached for what had not changed,
and the results as artifacts. What has to run again is decided by DVC, how it is run by flows.dvc,
what by flows.selection. Without a server at PREFECT_API_URL, Prefect starts one of its own, which
takes 10 to 20 s.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run, task_run
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed

from blockpruner.core.errors import InputError
from blockpruner.core.progress import OBSERVER_VARIABLE
from blockpruner.healing.settings import CompensationMethod
from blockpruner.store.files import read_json
from blockpruner.store.locks import this_process, workspace
from flows import dvc, phases
from flows.observer import TASK_VARIABLE
from flows.selection import BUDGETS, Chosen, Selection, choose
from flows.server import require_access

METRICS, REPORT = Path("data/metrics"), Path("data/report")
PAGES_VARIABLE = "BLOCKPRUNER_REPORT_PAGES"
"""Environment variable, set by flows.serve: the URL at which a browser finds the reports below
data/. A page of the UI may not link to a file."""

LEFT_OUT = "Left out"
"""The name of a stage's state if one that it needs has failed."""


DELAYS = [10.0, 120.0]
"""Seconds before a second and a third try of what fails at the network."""
SENDING: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": len(DELAYS),
    "retry_delay_seconds": DELAYS,
}


def is_of_network(_task: object, _run: object, state: State[Any]) -> bool:
    """Whether a fetch has failed with the advice to check the network."""
    stage, _, reason = str(state.message).partition(" failed")
    return stage.startswith("stage fetch@") and "network" in reason


@task(
    cache_policy=NO_CACHE,
    retries=len(DELAYS),
    retry_delay_seconds=DELAYS,
    retry_condition_fn=is_of_network,
)
def run_stage(stage: str, lock: int, start: bool) -> State[None]:
    """One DVC stage, its output in the task's log. DVC is the cache; it is not started where the
    stage is known to be up to date (`start` is False)."""
    cached: State[None] = Completed(name="Cached", message="nothing has changed")
    if not start:
        return cached
    url = get_current_settings().api.url
    environment = dict[str, str]()
    # Without a server that lasts, the stage would start one of its own to report to.
    if url:
        environment = {
            OBSERVER_VARIABLE: "flows.observer:PrefectObserver",
            "PREFECT_API_URL": str(url),
            TASK_VARIABLE: f"{flow_run.id}/{task_run.id}",
        }
    try:
        ran = dvc.repro(stage, lock, get_run_logger().info, environment)
    except BaseException as error:
        if url:
            # A server that is gone must not hide the error.
            with suppress(httpx.HTTPError):
                phases.close(str(flow_run.id), str(task_run.id))
        if isinstance(error, dvc.StageError):
            return Failed(message=str(error))
        raise
    return Completed() if ran else cached


@task(name="push", task_run_name="push to {remote}", **SENDING)
def push_outputs(remote: str, stages: Sequence[str], lock: int) -> State[None]:
    """What the stages have made, sent to a remote of DVC."""
    try:
        dvc.push(remote, stages, lock, get_run_logger().info)
    except dvc.StageError as error:
        return Failed(message=str(error))
    return Completed()


@task(name="share", task_run_name="share by {remote}", **SENDING)
def share_outputs(remote: str, to: str | None, stages: Sequence[str], lock: int) -> State[None]:
    """What the stages have made, sent as an experiment, whose name is unique to the flow run."""
    name = f"{phases.artifact_key(str(flow_run.name))}-{str(flow_run.id)[:8]}"
    try:
        dvc.share(remote, name, to, stages, lock, get_run_logger().info)
    except dvc.StageError as error:
        return Failed(message=str(error))
    return Completed(message=f"`dvc exp pull {remote} {name}` gets it")


EVERYTHING = Selection()


@flow(name="prune", flow_run_name="{selection.words}")
def prune(selection: Selection = EVERYTHING) -> State[None]:
    """Bring the chosen runs and targets up to date, stage by stage, then the report."""
    return build(lambda: choose(selection), selection.keep_going, selection.push, selection.share)


def build(
    check: Callable[[], Chosen],
    keep_going: bool = False,
    push: str | None = None,
    share: str | None = None,
) -> State[None]:
    """Make what `check` chooses, show it, push it to a remote of DVC and share it by one of Git;
    None: by none."""
    show = get_run_logger().info
    try:
        with workspace(f"flow run {flow_run.name}, {this_process()}") as lock:
            chosen = check()
            dvc.require_remotes(push, share)
            chosen.write()
            if chosen.additions:
                show(
                    f"params.yaml: added {', '.join(chosen.additions)}; commit it with dvc.lock to"
                    " keep them"
                )
            pipeline = dvc.read_pipeline()
            summaries = chosen.summaries(pipeline)
            parents_by_stage = {
                stage: pipeline[stage] for stage in (*chosen.stages(pipeline), *summaries)
            }
            stale = dvc.stale(list(parents_by_stage))
            states = run_stages(parents_by_stage, summaries, stale, lock, keep_going)
            result = outcome(states, chosen.additions)
            # With keep_going there may be finished targets to show beside failed ones.
            if keep_going or result.is_completed():
                publish(chosen, states)
            if not result.is_completed():
                return result
            sent = _send(push, share, list(parents_by_stage), lock)
            return result if sent.is_completed() else outcome({"sent": sent})
    except InputError as error:
        return Failed(name="Refused", message=str(error))
    except dvc.StageError as error:
        return Failed(message=str(error))


def _send(push: str | None, share: str | None, stages: Sequence[str], lock: int) -> State[Any]:
    """Send what was made, as `build` says. An experiment takes its files along."""
    sent: State[Any] = Completed()
    if share:
        sent = share_outputs(share, push, stages, lock, return_state=True)
    elif push:
        sent = push_outputs(push, stages, lock, return_state=True)
    return sent


def run_stages(
    parents_by_stage: Mapping[str, Sequence[str]],
    summaries: Sequence[str],
    stale: Collection[str],
    lock: int,
    keep_going: bool,
) -> dict[str, State[Any]]:
    """Run stages in the order of `parents_by_stage`; their states.

    Args:
        parents_by_stage: the stages, each with those that it depends on.
        summaries: the stages over all models, which run if one of these is there.
        stale: the stages that DVC finds changed. What depends on a stage that ran may have changed,
            too; DVC is asked.
    """
    states: dict[str, State[Any]] = {}
    ancestors: dict[str, set[str]] = {}
    for stage, parents in parents_by_stage.items():
        ancestors[stage] = {*parents}
        for parent in parents:
            ancestors[stage] |= ancestors.get(parent, set())
        completed = dict[str, State[Any]]()
        failed = []
        for parent in parents:
            if parent in states and states[parent].is_completed():
                completed[parent] = states[parent]
            elif parent in states:
                failed.append(parent)
        # A summary shows the models that are there.
        if failed and not (stage in summaries and completed):
            states[stage] = Failed(name=LEFT_OUT, message=f"{failed[0]} failed")
            continue
        start = stage in stale or any(state.name != "Cached" for state in completed.values())
        # In the UI an arrow from a parent of a parent would say nothing new.
        arrows = []
        for parent, state in completed.items():
            if not any(parent in ancestors[other] for other in completed):
                arrows.append(state)
        named_task = run_stage.with_options(name=stage, task_run_name=stage)
        states[stage] = named_task(stage, lock, start, wait_for=arrows, return_state=True)
        if not states[stage].is_completed() and not keep_going:
            break
    return states


def outcome(states: Mapping[str, State[Any]], additions: Sequence[str] = ()) -> State[None]:
    """The state of a flow whose stages have these, and which has added this to params.yaml."""
    reasons = []
    cached = 0
    for state in states.values():
        if not state.is_completed() and state.name != LEFT_OUT:
            reasons.append(str(state.message))
        if state.name == "Cached":
            cached += 1
    if not reasons:
        ran = len(states) - cached
        return Completed(message=f"{len(states)} stages: {ran} run, {cached} cached")
    message = f"{'; '.join(reasons)}. Finished stages are kept: run again to go on"
    if additions:
        names = ", ".join(additions)
        message += f". New in params.yaml: {names}; delete there what cannot be made"
    return Failed(message=message)


def publish(chosen: Chosen, states: Mapping[str, State[Any]]) -> None:
    """Show the results as artifacts of the flow run: one table of all models, and the report or the
    study's tables."""
    rows = results(chosen, states)
    if rows:
        create_table_artifact(rows, "results", "Dense against pruned")
    folder = Path("data/tables") / chosen.study if chosen.study else REPORT
    report = folder / "report.md"
    if report.exists():
        create_markdown_artifact(with_links(report), phases.artifact_key(folder.name))


def results(chosen: Chosen, states: Mapping[str, State[Any]]) -> list[dict[str, Any]]:
    """A row for each model: its metrics, and why it is not there."""
    rows: list[dict[str, Any]] = []
    for run, targets in chosen.targets.items():
        for item in (run, *targets):
            reason = _failure(item, states)
            name = f"{run}-dense" if item == run else item
            file = METRICS / f"{name}.json"
            metrics = read_json(file) if file.exists() and not reason else {}
            if metrics or reason:
                rows.append({"model": name, **metrics, "why": reason})
    # The rows of a table artifact have the same columns, and the reason is the last one.
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "why"))
    return [{column: row.get(column) for column in (*columns, "why")} for row in rows]


def _failure(item: str, states: Mapping[str, State[Any]]) -> str:
    """Why a stage of a run or target failed; "" if none did."""
    for stage, state in states.items():
        if stage.endswith(f"@{item}") and not state.is_completed():
            return str(state.message)
    return ""


def with_links(report: Path) -> str:
    """A report's Markdown behind a link to its page; its pictures are links, too, where pages are
    served."""
    text = report.read_text(encoding="utf-8")
    pages = os.environ.get(PAGES_VARIABLE)
    if not pages:
        without_pictures = re.sub(r"!\[.*?\]\(.*?\)", "", text)
        return f"The page: `{report.with_name('index.html')}`\n\n{without_pictures}"
    url = f"{pages}/{report.parent.relative_to('data').as_posix()}/"
    with_pictures = re.sub(r"(!\[.*?\]\()", rf"\1{url}", text)
    return f"[The page]({url}index.html)\n\n{with_pictures}"


def run_here(check: Callable[[], object], start: Callable[[], State[Any]]) -> int:
    """Run a flow from the command line; `check` refuses what the flow would refuse, before a server
    is started."""
    try:
        check()
        with workspace(this_process()):
            url = get_current_settings().api.url
            if url:
                require_access(url)
        # the default skips the end of Prefect's own server
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        state = start()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except httpx.HTTPError as error:
        print(
            f"the Prefect server went away ({error}); finished stages are kept: run again to go on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished work is kept: run again to go on", file=sys.stderr)
        return 130
    print(state.message, file=sys.stderr)
    if state.is_completed():
        return 0
    return 2 if state.name == "Refused" else 1


def main(argv: list[str] | None = None) -> int:
    """0: up to date; 1: a stage failed; 2: refused, params.yaml is as it was; 130: interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.prune", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument(
        "--run",
        dest="runs",
        action="append",
        default=[],
        metavar="NAME",
        help="a run: runs/NAME.yaml",
    )
    parser.add_argument(
        "--budget", dest="budgets", action="append", default=[], metavar="B", help=BUDGETS
    )
    methods = get_args(CompensationMethod)
    parser.add_argument(
        "--compensate", choices=methods, help="for the targets of --budget; else as their run says"
    )
    parser.add_argument("--train", action="store_true", help="train the targets of --budget")
    parser.add_argument(
        "--keep-going", action="store_true", help="go on with other models after a failure"
    )
    parser.add_argument(
        "--push", metavar="REMOTE", help="a remote of DVC, which gets what was made"
    )
    parser.add_argument(
        "--share", metavar="REMOTE", help="a remote of Git, which gets it as an experiment of DVC"
    )
    selection = Selection.model_validate(vars(parser.parse_args(argv)))
    return run_here(lambda: choose(selection), lambda: prune(selection, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
