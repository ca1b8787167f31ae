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
"""None: this torch is too old to have devices that are written in Python, and no test can use
them."""

TOTAL = 2**40
"""Bytes of a device, unless it is given a limit."""


class Card:
    """One device: what lives there, and since `reset` what lived there at most."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.limit = TOTAL
        self.seen: set[int] = set()

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        if self.live + size > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. A made-up device is full."
            )
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


CARDS = (Card(), Card())


class Stream:
    """What a thread asks of a device. That of the main thread is done at once."""

    def __init__(self, device: Any = None) -> None:
        self.late: deque[Callable[[], object]] = deque()
        self.asked = 0
        self.waited: list[Event] = []
        """Events that came before what was asked next."""
        self._lock = threading.Lock()

    def ask(self, copy: Callable[[], object]) -> None:
        self.late.append(copy)
        self.asked += 1

    def record_event(self) -> Event:
        return Event(self, self.asked)

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)
        event.synchronize()

    def do(self, number: int) -> None:
        """All that was asked up to a number."""
        with self._lock, torch.inference_mode():
            while self.asked - len(self.late) < number:
                self.late[0]()
                self.late.popleft()


@dataclass(frozen=True)
class Event:
    stream: Stream
    number: int

    def synchronize(self) -> None:
        self.stream.do(self.number)


class Module:
    """What `torch.cuda` is for CUDA. There are no devices unless `fake_devices` says so."""

    __name__ = "torch.made_up"
    here = 0
    synchronized = 0
    Stream = Stream

    def __init__(self) -> None:
        self.main, self.streams = Stream(), threading.local()

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self.streams, "own", self.main)

    def set_stream(self, stream: Stream) -> None:
        self.streams.own = stream

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.here > 0

    def device_count(self) -> int:
        return self.here

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...
    def empty_cache(self) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        self.synchronized += 1

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
    """A tensor on a made-up device; `held` is the one that computes."""

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
"""What may have tensors of several devices."""


def run(func: Any, args: Any, kwargs: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    wrapped = [leaf for leaf in leaves if isinstance(leaf, Wrapped)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if not wrapped and (asked is None or asked.type != "gpu"):
        return func(*args, **kwargs)
    # under inference_mode torch hands over whole what else comes in parts
    if func._can_decompose():
        with _Mode():
            return func.decompose(*args, **kwargs)
    devices = {leaf.device for leaf in wrapped}
    if func not in COPIES:
        plain = [
            leaf
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Wrapped)
        ]
        # a number may come from the CPU, and so may an index
        devices |= {
            leaf.device for leaf in plain if leaf.dim() and not func.__name__.startswith("index.")
        }
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {names} in {func}"
            )
    inner = [leaf.held if isinstance(leaf, Wrapped) else leaf for leaf in leaves]
    inner_args, inner_kwargs = tree_unflatten(inner, spec)
    if "device" in inner_kwargs and asked is not None:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    place = asked if asked is not None else wrapped[0].device
    if place.type == "gpu" and place.index is None:
        place = torch.device("gpu", 0)
    stream = MODULE.current_stream()
    if func is torch.ops.aten.copy_.default and stream is not MODULE.main and (*args, False)[2]:
        stream.ask(partial(func, *inner_args))
        return args[0]
    found = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten._to_copy.default and found is inner_args[0]:
        found = found.clone()
    if place.type == "cpu":
        return found

    def wrap(tensor: torch.Tensor) -> Wrapped:
        same = next((leaf for leaf in wrapped if leaf.held is tensor), None)
        if same is not None:
            return same
        _card(place).hold(tensor)
        with torch.inference_mode(False):
            return Wrapped(tensor, place)

    result = tree_map_only(torch.Tensor, wrap, found)
    return return_and_correct_aliasing(func, args, kwargs, result)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """`torch.tensor` asks no dispatcher when it copies to a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func in (torch.tensor, torch.as_tensor)
            and torch.device(kwargs.get("device") or "cpu").type == "gpu"
        ):
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


@cache
def _register() -> None:
    assert SETUP is not None
    SETUP("gpu", backend_module=MODULE)


def start_gradients() -> None:
    """Have torch start its gradients' threads while the devices are there: it does so once, at the
    first backward pass of a process, and for devices that come later there is none."""
    with fake_devices():
        torch.ones(1, requires_grad=True).backward()


@contextmanager
def fake_devices(count: int = 2) -> Iterator[tuple[Card, ...]]:
    """Within, torch has so many made-up devices."""
    _register()
    MODULE.here = count
    for card in CARDS:
        card.limit, card.peak = TOTAL, card.live
    try:
        with _Functions(), _Mode():
            yield CARDS[:count]
    finally:
        MODULE.here = 0
