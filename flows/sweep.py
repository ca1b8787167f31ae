"""`python -m flows.sweep --run NAME ... [--budget B ...] [--stop-on-failure]`: every run to every budget.

As a Prefect flow, with one table of all models.

Decides the order (run after run: the first is complete early), what a failure leaves out, and the table. What a run or
a target needs is decided by flows.selection, how a stage is run by flows.prune.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from blockpruner.core.errors import InputError
from blockpruner.store.files import read_json
from flows.prune import AS_RETURNED, begin, outcome, publish, restored, run_here, run_stages, track_targets
from flows.selection import BUDGETS, SWEEP_BUDGETS, Chosen, RunGrid, Selection, choose
from flows.tracking import figures, project

PLANS = Path("data/plans")
COMPARED = {"perplexity": "perplexity", "average": "accuracy", "speedup_generation": "speed-up"}
"""Metrics in the table, and their names there."""


@task(**AS_RETURNED)
def bring_up(stages: Sequence[str], lock: int) -> State[None]:
    """The stages of one run or one target, nested under it."""
    return outcome(run_stages(stages, lock))


@flow(name="sweep")
def sweep(grid: RunGrid) -> State[None]:
    """Prune every run to every budget, run after run, and compare all of them in one table."""
    states: dict[str, State[Any]] = {}
    note = ""
    try:
        with begin(lambda: choose(Selection(runs=grid.runs, budgets=grid.budgets))) as (chosen, lock):
            rows: list[dict[str, Any]] = []
            for number, run in enumerate(chosen.runs, 1):
                for item in (run, *chosen.targets_of(run)):
                    started = time.monotonic()
                    states[item] = _item(chosen, item, lock, left_out(grid, run, states))
                    if item != run:
                        rows.append(_row(run, item, states[item], time.monotonic() - started))
                create_table_artifact(rows, "sweep", f"The sweep after {number} of {len(chosen.runs)} runs")
            built = [target for target in chosen.targets if states[target].is_completed()]
            if any(state.name == "Refused" for state in states.values()):
                note = restored(chosen, built)
            if built:
                states["report"] = outcome(run_stages(chosen.stages_of(""), lock))
                publish(chosen)
                if project():
                    states["tracker"] = track_targets(built, return_state=True)
    except InputError as error:
        return Failed(name="Refused", message=str(error))
    failed = [item for item, state in states.items() if not state.is_completed()]
    if failed:
        message = f"not complete: {', '.join(failed)}. Finished stages are kept: run again to go on{note}"
        return Failed(message=message)
    return Completed(message=f"{len(chosen.targets)} models of {len(chosen.runs)} runs")


def _item(chosen: Chosen, item: str, lock: int, reason: str) -> State[Any]:
    if reason:
        return Failed(name="Left out", message=reason)
    return bring_up.with_options(name=item, task_run_name=item)(chosen.stages_of(item), lock, return_state=True)


def left_out(grid: RunGrid, run: str, states: dict[str, State[Any]]) -> str:
    """Why the next item of a run is left out; "" if it is not."""
    failed = [item for item, state in states.items() if not state.is_completed()]
    if run in failed:
        return f"{run} has no scores"
    return f"{failed[0]} failed" if failed and grid.stop_on_failure else ""


def _row(run: str, target: str, state: State[Any], seconds: float) -> dict[str, Any]:
    """One line of the table: what was removed, and each metric of the pruned and of the dense model."""
    values: dict[str, Any] = {"run": run, "target": target, "state": state.name}
    if state.is_completed():
        pruned, dense = map(figures, (target, f"{run}-dense"))
        values["removed, %"] = round(100 * read_json(PLANS / target / "plan.json")["ratio"], 2)
        for key, name in COMPARED.items():
            values |= {name: pruned.get(key, "not timed")} | ({f"{name}, dense": dense[key]} if key in dense else {})
    return values | {"minutes": round(seconds / 60, 1), "why": "" if state.is_completed() else state.message}


def main(argv: list[str] | None = None) -> int:
    """0: all made; 1: something is missing; 2: refused, params.yaml is as it was; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--run", action="append", required=True, metavar="NAME", help="a run: runs/NAME.yaml")
    parser.add_argument(
        "--budget", action="append", metavar="B", help=f"{BUDGETS}; default: {', '.join(SWEEP_BUDGETS)}"
    )
    parser.add_argument("--stop-on-failure", action="store_true", help="leave out what comes after the first failure")
    options = parser.parse_args(argv)
    budgets = tuple(options.budget or SWEEP_BUDGETS)
    grid = RunGrid(runs=tuple(options.run), budgets=budgets, stop_on_failure=options.stop_on_failure)
    wanted = Selection(runs=grid.runs, budgets=grid.budgets)
    return run_here(lambda: choose(wanted), lambda: sweep(grid, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
