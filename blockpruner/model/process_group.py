"""Several processes of this machine, each on a device of its own, that work on one thing.

In training each process computes its share of a step's batches with a full copy of the model. The
float32 master weights, their gradients and the optimizer's moments are sharded (ZeRO, arXiv
1910.02054, stage 2): the sum of a gradient goes to the process that holds that shard as soon as the
backward pass has it.
"""

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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

    def shard(self, tensor: Tensor) -> Tensor:
        """This process's shard, along the first dimension, of a tensor that all processes have."""
        sharded = distribute_tensor(tensor, self.mesh, [Shard(0)])
        return sharded.to_local().clone()

    def all_gather(self, shard: Tensor, shape: torch.Size) -> Tensor:
        """The contiguous tensor of this shape whose shards the processes have."""
        stride = torch.empty(shape, device="meta").stride()
        sharded = DTensor.from_local(shard, self.mesh, [Shard(0)], shape=shape, stride=stride)
        return sharded.full_tensor()

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """This process's shard of the sum of all processes' tensors."""
        addends = DTensor.from_local(tensor, self.mesh, [Partial()])
        return addends.redistribute(placements=[Shard(0)]).to_local()

    def all_reduce(self, value: float, operation: Any = distributed.ReduceOp.SUM) -> float:
        """The sum, or the minimum, of all processes' values: the same number in each."""
        result = torch.tensor(value, dtype=torch.float64)
        if self.count > 1:
            distributed.all_reduce(result, operation)
        return float(result)

    def intersection(self, numbers: set[int]) -> set[int]:
        """The numbers that are in every process's set."""
        sets: list[Any] = [numbers] * self.count
        if self.count > 1:
            distributed.all_gather_object(sets, numbers)
        return set.intersection(*sets)


SINGLE_PROCESS = ProcessGroup()


class _QueueObserver(SilentObserver):
    """Sends events to the parent process."""

    def __init__(self, queue: Any) -> None:
        for name in ("note", "begin", "advance", "end"):
            setattr(self, name, partial(self._send, queue, name))

    @staticmethod
    def _send(queue: Any, name: str, *values: Any, **options: Any) -> None:
        queue.put((name, values, options))


def run_processes(
    count: int, device: str, work: Callable[..., object], observer: Observer, *arguments: Any
) -> None:
    """Run `work`(group, device, observer, *arguments) in `count` processes of this machine.

    `device` is as `runtime.device`: each process has a GPU of its own, or on the CPU its share of
    the threads. Raises what a process raised, and ends all others.
    """
    with tempfile.TemporaryDirectory() as folder:
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        device_type = resolve_device(device).type
        processes: Any = multiprocessing.start_processes(
            _run_rank, (count, device_type, folder, queue, work, arguments), count, join=False
        )
        try:
            all_done = False
            while not all_done:
                all_done = processes.join(timeout=0.2)
                while not queue.empty():
                    name, values, options = queue.get()
                    getattr(observer, name)(*values, **options)
        except multiprocessing.ProcessRaisedException:
            # The earliest error is the cause: later ones are of processes that lost their peer.
            errors = Path(folder).glob("error-*")
            for path in sorted(errors, key=lambda path: path.stat().st_mtime_ns):
                with suppress(pickle.PickleError, AttributeError):
                    raise pickle.loads(path.read_bytes()) from None
            raise
        finally:
            for process in processes.processes:
                process.kill()
                process.join()


def _run_rank(
    rank: int,
    count: int,
    device_type: str,
    folder: str,
    queue: Any,
    work: Callable[..., object],
    arguments: Any,
) -> None:
    """The life of one process."""
    if device_type == "cpu":
        device = device_type
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    else:
        device = f"{device_type}:{rank}"
        torch.accelerator.set_device_index(rank)
    if sys.platform == "linux":
        # The host's name may resolve to an address that no interface has.
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    distributed.init_process_group(
        init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )
    try:
        group = ProcessGroup(count, rank, init_device_mesh(device_type, (count,)))
        # One process reports the progress of all.
        observer = SilentObserver() if rank else _QueueObserver(queue)
        work(group, device, observer, *arguments)
        distributed.barrier()
    except Exception as error:
        with suppress(pickle.PickleError, TypeError):
            Path(folder, f"error-{rank}").write_bytes(pickle.dumps(error))
        raise
    finally:
        distributed.destroy_process_group()
