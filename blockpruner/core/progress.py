"""Progress of long work: events, and the observer that shows them.

Decides the events. How they look is the observer's affair: `ConsoleObserver` here, or the class that the
environment variable BLOCKPRUNER_OBSERVER names as "module:Class" (the flows set it), so that neither the
library nor a stage imports an orchestrator.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

OBSERVER_VARIABLE = "BLOCKPRUNER_OBSERVER"


class Observer(Protocol):
    """Receives events; phases do not overlap within a process."""

    def note(self, message: str) -> None:
        """One line of information."""

    def begin(self, phase: str, overall: float | None = None) -> None:
        """A phase starts; `overall` is the share of the whole stage that is already done."""

    def advance(self, done: int, total: int, detail: str) -> None:
        """`done` of `total` steps of the running phase are finished; `detail` names the last one."""

    def end(self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False) -> None:
        """The running phase is over; `table` holds its results, `cached` says that nothing was computed."""


class SilentObserver:
    """Shows nothing."""

    def note(self, message: str) -> None: ...
    def begin(self, phase: str, overall: float | None = None) -> None: ...
    def advance(self, done: int, total: int, detail: str) -> None: ...
    def end(self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False) -> None: ...


class ConsoleObserver:
    """A live bar on a terminal; elsewhere a line at most every `interval` seconds, so that logs stay short."""

    def __init__(self, console: Console | None = None, interval: float = 10.0) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._interval = interval
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._overall: float | None = None
        self._started = self._printed = self._stage_started = time.monotonic()
        self._first_overall: float | None = None

    def note(self, message: str) -> None:
        self._console.print(message, markup=False)

    def begin(self, phase: str, overall: float | None = None) -> None:
        self._phase, self._overall = phase, overall
        self._started = self._printed = time.monotonic()
        if self._first_overall is None:
            self._first_overall, self._stage_started = overall, self._started
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(phase + self._stage_eta(), total=None, detail="")

    def advance(self, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
        elif now - self._printed >= self._interval:
            self._printed = now
            eta = (now - self._started) / max(done, 1) * (total - done)
            self._console.print(
                f"  {self._phase}: {done}/{total} ({detail}), {_duration(eta)} left{self._stage_eta()}",
                markup=False,
            )

    def end(self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        if cached:
            self._first_overall = None  # what was read from a cache says nothing about the time that is left
        took = "cached" if cached else _duration(time.monotonic() - self._started)
        self._console.print(f"{self._phase}: {summary} [{took}]", markup=False)

    def _stage_eta(self) -> str:
        """Time left for the whole stage, from the share done since its first computed phase."""
        if self._overall is None or self._first_overall is None or self._overall <= self._first_overall:
            return ""
        rate = (self._started - self._stage_started) / (self._overall - self._first_overall)
        return f", stage {self._overall:.0%} done, {_duration(rate * (1 - self._overall))} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def observer() -> Observer:
    """The observer that BLOCKPRUNER_OBSERVER names, or the console."""
    name = os.environ.get(OBSERVER_VARIABLE)
    if not name:
        return ConsoleObserver()
    module, _, attribute = name.partition(":")
    result: Observer = getattr(importlib.import_module(module), attribute)()
    return result
