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
    minutes, remainder = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{remainder:02d}s"
    return f"{remainder}s"


class ConsoleObserver(Observer):
    """A live bar on a terminal; elsewhere at most one line in `interval` seconds, which keeps logs
    short."""

    def __init__(self, console: Console | None = None, interval: float = 10.0) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._interval = interval
        self._bar: Progress | None = None
        self._stage_start: tuple[float, float] | None = None
        """Share of the stage and time at its first computed phase."""
        self._first_step: tuple[int, float] | None = None
        """Number and time of the running phase's first step that was shown."""
        self._title = ""
        self._stage_outlook = ""
        self._started = self._printed = time.monotonic()

    def note(self, message: str) -> None:
        self._console.print(message, markup=False)

    def begin(self, phase: str, overall: float | None = None) -> None:
        self._title = phase
        self._first_step = None
        self._started = self._printed = time.monotonic()
        self._stage_outlook = "" if overall is None else self._describe_stage(overall)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(phase + self._stage_outlook, total=None, detail="")

    def _describe_stage(self, overall: float) -> str:
        """How much of the stage is done, and how long the rest takes at the pace since its first
        computed phase."""
        if self._stage_start is None:
            self._stage_start = (overall, self._started)
        start_share, start_time = self._stage_start
        share = overall - start_share
        if share <= 0:
            return ""
        seconds = (self._started - start_time) / share * (1 - overall)
        return f", stage {overall:.0%} done, {duration(seconds)} left"

    def advance(self, done: int, total: int | None, detail: str) -> None:
        time_now = time.monotonic()
        if self._first_step is None:
            self._first_step = (done, time_now)
        if total is None:
            text = detail
            outlook = f"{duration(time_now - self._started)} so far"
        else:
            text = f"{done}/{total} ({detail})" if detail else f"{done}/{total}"
            outlook = f"{duration(self._pace(done, time_now) * (total - done))} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, detail=text)
        elif time_now - self._printed >= self._interval:
            self._printed = time_now
            line = f"  {self._title}: {text}, {outlook}{self._stage_outlook}"
            self._console.print(line, markup=False)

    def _pace(self, done: int, time_now: float) -> float:
        """Seconds a step."""
        assert self._first_step is not None
        first_step, first_time = self._first_step
        if done > first_step:
            # The steps before the first one may be those of a run that this one resumes.
            return (time_now - first_time) / (done - first_step)
        return (time_now - self._started) / max(done, 1)

    def end(
        self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if cached:
            # A cached phase takes no time, and would make the pace too fast.
            self._stage_start = None
        took = "cached" if cached else duration(time.monotonic() - self._started)
        self._console.print(f"{self._title}: {summary} [{took}]", markup=False)


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Inside the `with`, these loggers show errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = {logger: logger.level for logger in loggers}
    try:
        for logger in loggers:
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
    observer_class: type[Observer] = pkgutil.resolve_name(name) if name else ConsoleObserver
    return observer_class()
