"""Two devices that do not exist, "gpu:0" and "gpu:1", whose tensors have real values.

A tensor there wraps one of the CPU, which computes. Unlike that one it has a device of its own: an
operation over two devices raises, as CUDA's do. And it takes memory there: a device counts the
bytes of storages that live and the most that ever lived, and raises torch's own error when an
operation would go beyond its limit.

A stream of its own (`Stream`) is as late as a device may be: a copy that need not block is made
when an event behind it is waited for, from what its source holds then.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

SETUP = vars(backend_registration).get("_setup_privateuseone_for_python_backend")
"""None where torch is too old for devices that are written in Python."""

TOTAL = 2**40
"""Bytes of a device, unless it is given a limit."""


class Card:
    """One device: the bytes of storages that live there, their peak, and their limit."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.limit = TOTAL
        self.storages: set[int] = set()

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self.storages:
            return
        if self.live + size > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. A made-up device is full."
            )
        self.storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.live -= size


CARDS = (Card(), Card())


class Stream:
    """A queue of copies. The main thread's stream is never late."""

    def __init__(self, device: Any = None) -> None:
        self.late: deque[Callable[[], object]] = deque()
        self.queued = 0
        self.waited: list[Event] = []
        """The events that this stream waited for."""
        self._lock = threading.Lock()

    def queue(self, copy: Callable[[], object]) -> None:
        self.late.append(copy)
        self.queued += 1

    def record_event(self) -> Event:
        return Event(self, self.queued)

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)
        event.synchronize()

    def complete(self, number: int) -> None:
        """Do the first `number` copies."""
        with self._lock, torch.inference_mode():
            while self.queued - len(self.late) < number:
                self.late[0]()
                self.late.popleft()


@dataclass(frozen=True)
class Event:
    stream: Stream
    number: int

    def synchronize(self) -> None:
        self.stream.complete(self.number)


class Module:
    """The counterpart of `torch.cuda`. There are no devices outside of `fake_devices`."""

    __name__ = "torch.made_up"
    count = 0
    Stream = Stream

    def __init__(self) -> None:
        self.main = Stream()
        self.streams = threading.local()

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self.streams, "own", self.main)

    def set_stream(self, stream: Stream) -> None:
        self.streams.own = stream

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...
    def empty_cache(self) -> None: ...
    def synchronize(self, device: Any = None) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_device_name(self, device: Any) -> str:
        return "Made-up Card"

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        card = _card(device)
        return card.limit - card.live, card.limit

    def memory_reserved(self, device: Any) -> int:
        return _card(device).live

    memory_allocated = memory_reserved

    def max_memory_allocated(self, device: Any) -> int:
        return _card(device).peak

    def reset_peak_memory_stats(self, device: Any) -> None:
        _card(device).peak = _card(device).live


MODULE = Module()


def _card(device: Any) -> Card:
    return CARDS[torch.device(device).index or 0]


class Wrapped(torch.Tensor):
    """A tensor on a made-up device, with the CPU's tensor that computes."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Wrapped:
        result = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=device
        )
        result.held = held
        return result  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError(
            "can't convert a made-up device's tensor to numpy; copy it to the CPU first"
        )

    def __repr__(self, **kwargs: Any) -> str:
        return f"Wrapped({self.held!r}, {self.device})"


COPIES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.set_.source_Storage,
}
"""Operations on tensors of several devices."""


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation of torch on the CPU, with the errors and the memory of a device."""
    leaves, spec = tree_flatten((args, kwargs))
    wrapped = [leaf for leaf in leaves if isinstance(leaf, Wrapped)]
    device = None
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
    if not wrapped and (device is None or device.type != "gpu"):
        return func(*args, **kwargs)
    # Under inference_mode torch does not decompose operations before it dispatches them.
    if func._can_decompose():
        with _Mode():
            return func.decompose(*args, **kwargs)
    if func not in COPIES:
        _require_one_device(func, leaves)
    inner = [leaf.held if isinstance(leaf, Wrapped) else leaf for leaf in leaves]
    inner_args, inner_kwargs = tree_unflatten(inner, spec)
    if device is None:
        device = wrapped[0].device
    else:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    stream = MODULE.current_stream()
    is_late = func is torch.ops.aten.copy_.default and stream is not MODULE.main
    if is_late and len(args) > 2 and args[2]:  # non_blocking
        stream.queue(partial(func, *inner_args))
        return args[0]
    result = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten._to_copy.default and result is inner_args[0]:
        result = result.clone()
    if device.type == "cpu":
        return result
    result = tree_map_only(torch.Tensor, partial(_wrap, wrapped, device), result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def _require_one_device(func: Any, leaves: list[Any]) -> None:
    """Raise torch's error for tensors of several devices."""
    devices = set()
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            continue
        # A number may be on the CPU, and so may an index.
        may_be_elsewhere = leaf.dim() == 0 or func.__name__.startswith("index.")
        if isinstance(leaf, Wrapped) or not may_be_elsewhere:
            devices.add(leaf.device)
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {names} in {func}"
        )


def _wrap(wrapped: list[Wrapped], device: torch.device, tensor: torch.Tensor) -> Wrapped:
    """A result on the device: an argument itself where the operation returned it."""
    for argument in wrapped:
        if argument.held is tensor:
            return argument
    device = torch.device("gpu", device.index or 0)
    _card(device).hold(tensor)
    with torch.inference_mode(False):
        return Wrapped(tensor, device)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """`torch.tensor` copies to a device without the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        if func in (torch.tensor, torch.as_tensor) and device.type == "gpu":
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        return func(*args, **kwargs)


@cache
def _register() -> None:
    assert SETUP is not None
    SETUP("gpu", backend_module=MODULE)


def start_gradients() -> None:
    """Let torch start its threads for gradients while the devices exist: it does so once, at the
    first backward pass of a process, and devices that come later get no thread."""
    with fake_devices():
        torch.ones(1, requires_grad=True).backward()


@contextmanager
def fake_devices(count: int = 2) -> Iterator[tuple[Card, ...]]:
    """Let torch have made-up devices inside the `with`."""
    _register()
    MODULE.count = count
    for card in CARDS:
        card.limit, card.peak = TOTAL, card.live
    try:
        with _Functions(), _Mode():
            yield CARDS[:count]
    finally:
        MODULE.count = 0
