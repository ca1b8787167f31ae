"""What is needed one after another, fetched by a thread while the one before is in use.

Decides in which order a thread, a device and its streams wait for each other. What is fetched, and
how many buffers there are, is decided by the caller.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from blockpruner.model import accelerator

Job = TypeVar("Job")
Found = TypeVar("Found")


def in_turn(
    device: torch.device,
    jobs: Sequence[Job],
    buffers: Sequence[Tensor],
    fetch: Callable[[Job, Tensor], Found],
) -> Generator[Found]:
    """Yield what is fetched for each job, in order; it is valid until the next one is asked for.

    With one buffer nothing is fetched ahead. What the thread asks of a device comes after what was
    asked before, as far as it concerns a buffer, and before what is asked later; nobody waits for a
    device. When the thread's `fetch` returns, it may still be copying to a device; its errors are
    raised here.
    """
    waiting, fetching = deque(jobs), deque[Future[tuple[Found, Tensor, Any]]]()
    free = deque((buffer, accelerator.mark(device)) for buffer in buffers)

    @torch.inference_mode()
    def work(job: Job, buffer: Tensor, is_free: Any) -> tuple[Found, Tensor, Any]:
        accelerator.follow(device, is_free)
        return fetch(job, buffer), buffer, accelerator.mark(device)

    pool = ThreadPoolExecutor(1, "ahead", accelerator.begin_stream, (device,))
    try:
        for _ in jobs:
            while free and waiting:
                fetching.append(pool.submit(work, waiting.popleft(), *free.popleft()))
            found, buffer, arrived = fetching[0].result()
            fetching.popleft()
            accelerator.follow(device, arrived)
            yield found
            free.append((buffer, accelerator.mark(device)))
    finally:
        pool.shutdown(cancel_futures=True)
        if fetching and device.type != "cpu":  # buffers are not given back while they are written
            accelerator.synchronize(device)
