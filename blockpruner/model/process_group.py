"""Several processes of this machine, each on a device of its own, that do one thing together.

In training each computes its share of a step's batches with a whole copy of the model. The float32
masters, their gradients and the optimizer's moments are divided among them (ZeRO, arXiv 1910.02054,
stage 2): the sum of a gradient goes to the process that holds that part as soon as the backward
pass has it.
"""

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from blockpruner.core.progress import Observer, SilentObserver
from blockpruner.model.models import resolve_device

multiprocessing: Any = torch.multiprocessing  # untyped


@dataclass(frozen=True)
class ProcessGroup:
    """The processes, as one of them sees them."""

    count: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None

    def shard(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor that all have: some of its first dimension."""
        return distribute_tensor(whole, self.mesh, [Shard(0)]).to_local().clone()

    def all_gather(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The contiguous tensor of which every process has a part."""
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, [Shard(0)], shape=shape, stride=stride
        ).full_tensor()

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """This process's part of the sum of all processes' tensors."""
        return (
            DTensor.from_local(tensor, self.mesh, [Partial()])
            .redistribute(placements=[Shard(0)])
            .to_local()
        )

    def all_reduce(self, value: float, how: Any = distributed.ReduceOp.SUM) -> float:
        """The sum, or the least, of all processes' values: the same number in each."""
        found = torch.tensor(value, dtype=torch.float64)
        if self.count > 1:
            distributed.all_reduce(found, how)
        return float(found)

    def intersection(self, found: set[int]) -> set[int]:
        """The numbers that every process has found."""
        everyones: list[Any] = [found] * self.count
        if self.count > 1:
            distributed.all_gather_object(everyones, found)
        return set.intersection(*everyones)


SINGLE_PROCESS = ProcessGroup()


class _Events(SilentObserver):
    """Sends events to the process that waits."""

    def __init__(self, queue: Any) -> None:
        for name in ("note", "begin", "advance", "end"):
            setattr(
                self, name, lambda *given, _name=name, **named: queue.put((_name, given, named))
            )


def run_processes(
    count: int, device: str, work: Callable[..., object], observer: Observer, *given: Any
) -> None:
    """Run `work`(team, device, observer, *given) in processes of this machine, each with a GPU of
    its own; `device` is as `runtime.device`, and on the CPU the processes share the threads. Raises
    what a process raised; all others are ended."""
    with tempfile.TemporaryDirectory() as folder:
        queue, kind = (
            multiprocessing.get_context("spawn").SimpleQueue(),
            resolve_device(device).type,
        )
        begun: Any = multiprocessing.start_processes(
            _begin, (count, kind, folder, queue, work, given), count, join=False
        )
        try:
            over = False
            while not over:
                over = begun.join(timeout=0.2)
                while not queue.empty():
                    name, values, named = queue.get()
                    getattr(observer, name)(*values, **named)
        except multiprocessing.ProcessRaisedException:
            for path in sorted(
                Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns
            ):
                with suppress(pickle.PickleError, AttributeError):
                    raise pickle.loads(path.read_bytes()) from None
            raise
        finally:
            for process in begun.processes:
                process.kill()
                process.join()


def _begin(
    rank: int,
    count: int,
    kind: str,
    folder: str,
    queue: Any,
    work: Callable[..., object],
    given: Any,
) -> None:
    if kind == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    else:
        torch.accelerator.set_device_index(rank)
    if sys.platform == "linux":
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    distributed.init_process_group(
        init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )
    try:
        mesh = init_device_mesh(kind, (count,))
        device, observer = (
            kind if kind == "cpu" else f"{kind}:{rank}",
            SilentObserver() if rank else _Events(queue),
        )
        work(ProcessGroup(count, rank, mesh), device, observer, *given)
        distributed.barrier()
    except Exception as error:
        with suppress(pickle.PickleError, TypeError):
            Path(folder, f"error-{rank}").write_bytes(pickle.dumps(error))
        raise
    finally:
        distributed.destroy_process_group()
