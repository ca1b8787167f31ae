"""The Ray that workers run on: how this process connects to it, and what each worker gets of it.

A Ray that is started here imports this package. The nodes of a shared cluster must have the same
version of blockpruner, and the checkpoint at the same path.
"""

import os
import secrets
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from blockpruner.core.errors import InputError, extra
from blockpruner.core.settings import Runtime

GRANT_SECONDS = 60
"""How long Ray may take to grant the workers' resources, which other users of a shared cluster may
hold."""

OBJECT_STORE_BYTES = 128 * 2**20
"""The object store of a private Ray. It holds token rows only."""

PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    # Despite its name, this is the one switch, on any system, that keeps to loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # It is 15 by default: on a shared machine, workers would wait for everything else.
    "RAY_worker_niceness": "0",
}
"""The environment of a private Ray: it reports nothing, and listens on this machine only."""

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def connect(address: str | None, streaming: bool = False) -> tuple[Any, bool]:
    """The module ray, and whether this call connected this process to a cluster.

    Raises InputError if ray is not installed, or if no cluster answers at the address.
    """
    if address is None:
        _set_private_environment(streaming)
    with extra("ray"):
        import ray
        import ray.util.scheduling_strategies
    if ray.is_initialized():
        return ray, False
    if address is None:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **QUIET)
        return ray, True
    try:
        ray.init(address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"runtime.ray_address {address!r} does not answer as a Ray cluster:"
            f" {textwrap.shorten(str(error), 300)}; give <host>:<port> of its head, or null for a"
            " Ray of this machine"
        ) from error
    return ray, True


def _set_private_environment(streaming: bool) -> None:
    os.environ.update(PRIVATE)
    if streaming:
        # Streaming workers share out all free memory; Ray's monitor would kill one that uses it.
        os.environ.update({"RAY_memory_monitor_refresh_ms": "0"})
    # Ray reads its environment at import. Set later, its processes would demand a token that this
    # one does not send.
    if "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"  # keeps other users of this machine out
        # Ray's default is a token in a file that everybody may read.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def reserve(ray: Any, runtime: Runtime, resources: Mapping[str, int]) -> Any:
    """A placement group with the resources of all workers.

    They are granted together, so that two runs cannot each hold half of what they need.
    """
    bundles = [dict(resources)] * runtime.workers
    group = ray.util.placement_group(bundles, strategy="PACK")
    if not group.wait(timeout_seconds=GRANT_SECONDS):
        ray.util.remove_placement_group(group)
        raise InputError(
            f"Ray has not granted {runtime.workers} workers with {describe(resources)} each within"
            f" {GRANT_SECONDS} s: others use its nodes; wait, or lower runtime.workers or"
            " runtime.threads"
        )
    return group


def worker_resources(runtime: Runtime, nodes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """What Ray keeps for each worker: CPU cores, and GPUs if the device is one.

    With threads: auto on CPUs, each worker gets the largest equal share of the cores that the nodes
    can hold; with device: split, of the GPUs. A worker is on one node. The nodes are as "Resources"
    in `ray.nodes`. Raises InputError if they do not hold the workers.
    """
    workers, device, threads = runtime.workers, runtime.device, runtime.threads
    if device.startswith("cuda:"):
        raise InputError(
            f"runtime.device {device!r}: with executor: ray it is Ray that assigns devices; use"
            " auto or cuda"
        )
    has_gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
    uses_gpu = device in ("cuda", "split") or (device == "auto" and has_gpu)
    resources = {"CPU": 1 if threads == "auto" else threads}
    if uses_gpu:
        resources["GPU"] = 1
    capacity = _capacity(resources, nodes)
    if capacity < workers:
        raise InputError(
            f"runtime.workers {workers} with {describe(resources)} each: Ray's nodes have room for"
            f" {capacity}, and none is on two nodes; lower runtime.workers or runtime.threads, add"
            " nodes, or use another runtime.device"
        )
    if device == "split":
        divided = "GPU"
    elif threads == "auto" and not uses_gpu:
        divided = "CPU"
    else:
        return resources
    while _capacity({**resources, divided: resources[divided] + 1}, nodes) >= workers:
        resources[divided] += 1
    return resources


def _capacity(resources: Mapping[str, int], nodes: Sequence[Mapping[str, float]]) -> int:
    """The number of workers that the nodes hold."""
    capacity = 0
    for node in nodes:
        capacity += min(int(node.get(kind, 0)) // count for kind, count in resources.items())
    return capacity


def describe(resources: Mapping[str, int], separator: str = " and ") -> str:
    """Resources as text: "4 CPU and 1 GPU"."""
    return separator.join(f"{count} {kind}" for kind, count in resources.items())
