"""The devices next to the CPU, of whatever kind torch finds (CUDA, ROCm, XPU): which are here, and
their memory.

What runs there is decided elsewhere. Apple's GPUs are left out: they know no float64, in which
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
"""What libraries say that find no memory for their own workspace; the last one is a handle that
could not be made."""


def kind() -> str | None:
    """The type of device that torch computes on here, for instance "cuda"; None if there is only
    the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None or found.type == "mps" else found.type


def devices() -> list[torch.device]:
    found = kind()
    return (
        []
        if found is None
        else [torch.device(found, index) for index in range(torch.accelerator.device_count())]
    )


def name(device: torch.device) -> str:
    """The product's name; "cpu" for the CPU."""
    return str(_module(device).get_device_name(device)) if device.type == kind() else device.type


def synchronize(device: torch.device) -> None:
    """Wait until all that was asked of a device is done; at once on a CPU."""
    _module(device).synchronize(device)


def total_memory(device: torch.device) -> int:
    """Bytes."""
    return int(_module(device).mem_get_info(device)[1])


def free_memory(device: torch.device) -> int:
    """Free bytes, with those that torch holds in reserve."""
    module = _module(device)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def begin_stream(device: torch.device) -> None:
    """Have what this thread asks of a device run beside what other threads ask of it; nothing on a
    CPU."""
    if device.type != "cpu":
        module = _module(device)
        module.set_stream(module.Stream(device))


def mark(device: torch.device) -> Any:
    """An event: all that this thread has asked of a device is done. None on a CPU, where it is done
    at once."""
    return None if device.type == "cpu" else _module(device).current_stream(device).record_event()


def follow(device: torch.device, event: Any) -> None:
    """Have what this thread asks of a device from now on begin after an event; the thread does not
    wait."""
    if event is not None:
        _module(device).current_stream(device).wait_event(event)


def reset_peak(device: torch.device) -> None:
    _module(device).reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The most bytes that this process's tensors took on the device at once since `reset_peak`."""
    return int(_module(device).max_memory_allocated(device))


def empty_cache() -> None:
    """Give what torch holds in reserve back to the devices."""
    if found := kind():
        _module(torch.device(found)).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory is used up: torch's own error, or that of a library without room
    for its workspace."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def fits(work: Callable[[], object], is_least: bool) -> bool:
    """Do work. False if a device's memory ended meanwhile, and what the work took there is free
    again. If it `is_least`, less cannot be done at once: the device's error is raised."""
    try:
        work()
        return True
    except RuntimeError as error:
        if is_least or not is_out_of_memory(error):
            raise
    # after the handler: its traceback keeps the tensors of the failed work alive
    gc.collect()
    empty_cache()
    return False


@contextmanager
def named_if_too_large(what: str, fix: str) -> Iterator[None]:
    """Within, a DeviceMemoryError with these words is raised where a device's memory ends."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0]
        raise DeviceMemoryError(
            f"{what} does not fit into the device's memory beside the model ({reason}); {fix}"
        ) from error


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
