"""The devices next to the CPU, of any kind that torch finds (CUDA, ROCm, XPU), and their memory.

What runs there is decided elsewhere. Apple's GPUs are left out: they have no float64, in which
losses are summed.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from blockpruner.core.errors import DeviceMemoryError

OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
"""Messages of libraries that get no memory for their own workspace. The third one is of a handle
that could not be created."""


def kind() -> str | None:
    """The type of device that torch computes on, for instance "cuda"; None if there is only the
    CPU."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    if device is None or device.type == "mps":
        return None
    return device.type


def devices() -> list[torch.device]:
    """All devices of this machine but the CPU."""
    device_type = kind()
    if device_type is None:
        return []
    return [torch.device(device_type, index) for index in range(torch.accelerator.device_count())]


def name(device: torch.device) -> str:
    """The product's name; "cpu" for the CPU."""
    if device.type != kind():
        return device.type
    return str(_module(device).get_device_name(device))


def synchronize(device: torch.device) -> None:
    """Wait until a device is done; returns at once on a CPU."""
    _module(device).synchronize(device)


def total_memory(device: torch.device) -> int:
    """The bytes of a device."""
    return int(_module(device).mem_get_info(device)[1])


def free_memory(device: torch.device) -> int:
    """The free bytes of a device, with those that torch holds in reserve."""
    module = _module(device)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def begin_stream(device: torch.device) -> None:
    """Let this thread's work on a device run parallel to that of other threads; nothing on a
    CPU."""
    if device.type != "cpu":
        module = _module(device)
        module.set_stream(module.Stream(device))


def mark(device: torch.device) -> Any:
    """The event that this thread's work on a device is done. None on a CPU, where it is done at
    once."""
    if device.type == "cpu":
        return None
    return _module(device).current_stream(device).record_event()


def follow(device: torch.device, event: Any) -> None:
    """Let this thread's next work on a device begin after an event; the thread does not wait."""
    if event is not None:
        _module(device).current_stream(device).wait_event(event)


def reset_peak(device: torch.device) -> None:
    """Count `peak` anew from here."""
    _module(device).reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The maximum of bytes of this process's tensors on the device since `reset_peak`."""
    return int(_module(device).max_memory_allocated(device))


def empty_cache() -> None:
    """Give what torch holds in reserve back to the devices."""
    device_type = kind()
    if device_type is not None:
        _module(torch.device(device_type)).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory is used up: torch's own error, or that of a library without room
    for its workspace."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(message in str(error) for message in OUT_OF_MEMORY)


def fits(work: Callable[[], object], is_least: bool) -> bool:
    """Do work; False if a device's memory ended meanwhile, and the memory of the work is free
    again.

    If the work `is_least`, it cannot be split further, and the device's error is raised.
    """
    try:
        work()
        return True
    except RuntimeError as error:
        if is_least or not is_out_of_memory(error):
            raise
    # After the handler: its traceback keeps the tensors of the failed work alive.
    gc.collect()
    empty_cache()
    return False


@contextmanager
def named_if_too_large(work: str, fix: str) -> Iterator[None]:
    """Turn the end of a device's memory inside the `with` into a DeviceMemoryError that names the
    work and a fix."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0]
        raise DeviceMemoryError(
            f"{work} does not fit into the device's memory beside the model ({reason}); {fix}"
        ) from error


def _module(device: torch.device) -> Any:
    """torch.cuda for CUDA, torch.xpu for XPU."""
    return torch.get_device_module(device)
