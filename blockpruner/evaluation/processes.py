"""Several processes of this machine that share out work, each with a device of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from blockpruner.core.progress import Observer, SilentObserver
from blockpruner.model.models import resolve_device

multiprocessing: Any = torch.multiprocessing  # untyped

ERROR = "error"
"""The name of the event that a process has raised an error."""


class _QueueObserver(Observer):
    """Sends its events to the parent process."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def note(self, message: str) -> None:
        self._queue.put(("note", (message,)))

    def begin(self, phase: str, overall: float | None = None) -> None:
        self._queue.put(("begin", (phase, overall)))

    def advance(self, done: int, total: int | None, detail: str) -> None:
        self._queue.put(("advance", (done, total, detail)))

    def end(
        self, summary: str, table: Sequence[Mapping[str, Any]] = (), cached: bool = False
    ) -> None:
        self._queue.put(("end", (summary, table, cached)))


def run_processes(
    count: int, device: str, work: Callable[..., object], observer: Observer, *arguments: Any
) -> None:
    """Run `work`(device, observer, *arguments) in `count` processes of this machine.

    `device` is as `runtime.device`: each process has a GPU of its own, or on the CPU its share of
    the threads. The observer sees the events of the first process. Raises what a process raised,
    and ends all others.
    """
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    device_type = resolve_device(device).type
    processes = multiprocessing.start_processes(
        _run_rank, (count, device_type, queue, work, arguments), count, join=False
    )
    try:
        all_done = False
        while not all_done:
            all_done = processes.join(timeout=0.2)
            _forward_events(queue, observer)
    except multiprocessing.ProcessRaisedException:
        # The error itself is in the queue; torch knows only its text.
        _forward_events(queue, observer)
        raise
    finally:
        for process in processes.processes:
            process.kill()
            process.join()


def _forward_events(queue: Any, observer: Observer) -> None:
    """Pass the events in the queue to the observer; raise the first error among them."""
    while not queue.empty():
        event, values = queue.get()
        if event == ERROR:
            (error,) = values
            raise error from None
        getattr(observer, event)(*values)


def _run_rank(
    rank: int,
    count: int,
    device_type: str,
    queue: Any,
    work: Callable[..., object],
    arguments: Sequence[Any],
) -> None:
    """The life of one process."""
    if device_type == "cpu":
        device = device_type
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    else:
        device = f"{device_type}:{rank}"
        torch.accelerator.set_device_index(rank)
    # One process reports the progress of all.
    observer = SilentObserver() if rank else _QueueObserver(queue)
    try:
        work(device, observer, *arguments)
    except Exception as error:
        queue.put((ERROR, (error,)))
        raise
