"""What is needed one after another, fetched by a thread while the one before is in use.

Decides in which order a thread, a device and its streams wait for each other. The caller decides
what is fetched, and how many buffers there are.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from blockpruner.model import accelerator

Job = TypeVar("Job")
Fetched = TypeVar("Fetched")


def in_turn(
    device: torch.device,
    jobs: Sequence[Job],
    buffers: Sequence[Tensor],
    fetch: Callable[[Job, Tensor], Fetched],
) -> Generator[Fetched]:
    """Yield what is fetched for each job, in order; it is valid until the next one is requested.

    With one buffer nothing is fetched ahead. The thread's work on a device is ordered by marks, one
    for each buffer: it follows the use before and precedes the use after. Nobody waits for a
    device. When the thread's `fetch` returns, it may still be copying to a device; its errors are
    raised here.
    """
    waiting = deque(jobs)
    fetching = deque[Future[tuple[Fetched, Tensor, Any]]]()
    free = deque((buffer, accelerator.mark(device)) for buffer in buffers)

    @torch.inference_mode()
    def work(job: Job, buffer: Tensor, is_free: Any) -> tuple[Fetched, Tensor, Any]:
        accelerator.follow(device, is_free)
        return fetch(job, buffer), buffer, accelerator.mark(device)

    pool = ThreadPoolExecutor(1, "ahead", accelerator.begin_stream, (device,))
    try:
        for _ in jobs:
            while free and waiting:
                fetching.append(pool.submit(work, waiting.popleft(), *free.popleft()))
            fetched, buffer, arrived = fetching[0].result()
            fetching.popleft()
            accelerator.follow(device, arrived)
            yield fetched
            free.append((buffer, accelerator.mark(device)))
    finally:
        pool.shutdown(cancel_futures=True)
        if fetching and device.type != "cpu":  # buffers are not given back while they are written
            accelerator.synchronize(device)
