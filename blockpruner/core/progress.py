"""Progress of long work: events, and the observer that shows them.

Decides the events, and how the time that is left is estimated. How events look is decided by the
observer: `ConsoleObserver`, or the class that BLOCKPRUNER_OBSERVER names. The flows set that
variable; the library and the stages import no orchestrator.
"""

import logging
import os
import pkgutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

OBSERVER_VARIABLE = "BLOCKPRUNER_OBSERVER"
"""Environment variable: the observer's class, as "module:Class"."""


class Observer:
    """Receives events, and shows nothing of them by itself; phases do not overlap within a
    process."""

    def note(self, message: str) -> None:
        """One line of information."""

    def begin(self, phase: str, overall: float | None = None) -> None:
        """A phase starts; `overall` is the share of the whole stage that is done by now."""

    def advance(self, done: int, total: int | None, detail: str) -> None:
        """`done` of `total` steps of the running phase are finished; `detail` names the last one.
        No `total`: how many follow is not known."""

    def end(
        self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False
    ) -> None:
        """The running phase is over; `table` holds its results, `cached` is True if nothing was
        computed."""


class SilentObserver(Observer):
    """Shows nothing."""


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    )


class ConsoleObserver(Observer):
    """A live bar on a terminal; elsewhere one line in `interval` seconds at most, which keeps logs
    short."""

    def __init__(self, console: Console | None = None, interval: float = 10.0) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._interval = interval
        self._bar: Progress | None = None
        self._first: tuple[float, float] | None = None
        self._first_step: tuple[int, float] | None = None
        self._title = self._outlook = ""
        self._started = self._printed = time.monotonic()

    def note(self, message: str) -> None:
        self._console.print(message, markup=False)

    def begin(self, phase: str, overall: float | None = None) -> None:
        self._title, self._first_step = phase, None
        self._started = self._printed = time.monotonic()
        self._outlook = self._stage_outlook(overall)
        if self._console.is_terminal:
            parts = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            columns = (*parts, TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._bar.add_task(phase + self._outlook, total=None, detail="")

    def _stage_outlook(self, overall: float | None) -> str:
        """How much of the stage is done, and how long the rest takes at the pace since its first
        computed phase."""
        if overall is None:
            return ""
        if self._first is None:
            self._first = (overall, self._started)
        share, since = overall - self._first[0], self._started - self._first[1]
        return (
            f", stage {overall:.0%} done, {duration(since / share * (1 - overall))} left"
            if share > 0
            else ""
        )

    def advance(self, done: int, total: int | None, detail: str) -> None:
        now = time.monotonic()
        text, outlook = detail, f"{duration(now - self._started)} so far"
        begun, since = self._first_step = self._first_step or (done, now)
        if total is not None:
            text = f"{done}/{total} ({detail})" if detail else f"{done}/{total}"
            # of a resumed phase, what was done before tells nothing about the pace
            own = done > begun
            pace = (now - since) / (done - begun) if own else (now - self._started) / max(done, 1)
            outlook = f"{duration(pace * (total - done))} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, detail=text)
        elif now - self._printed >= self._interval:
            self._printed = now
            self._console.print(f"  {self._title}: {text}, {outlook}{self._outlook}", markup=False)

    def end(
        self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if cached:
            self._first = None  # the phase tells nothing about the pace
        took = "cached" if cached else duration(time.monotonic() - self._started)
        self._console.print(f"{self._title}: {summary} [{took}]", markup=False)


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Within, these loggers show errors alone."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def stderr_observer() -> ConsoleObserver:
    """The console on standard error, where results go to standard output."""
    return ConsoleObserver(Console(stderr=True, highlight=False, soft_wrap=True))


def observer() -> Observer:
    """The observer that BLOCKPRUNER_OBSERVER names, or the console."""
    name = os.environ.get(OBSERVER_VARIABLE)
    found: Observer = pkgutil.resolve_name(name)() if name else ConsoleObserver()
    return found
