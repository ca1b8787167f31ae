"""Scoring on Ray workers that each hold a replica of the model.

A lost worker costs the one answer that it was computing; the others take over its work. When the
last one is lost, the run ends, and another run goes on from what is stored. A piece of work never
splits a batch, so losses have the same bits on however many of the workers.

Workers import this package. A Ray that is started here has it; the nodes of a shared cluster must
have the same version of blockpruner, and the checkpoint at the same path.
"""

import os
import secrets
import socket
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from blockpruner.core.errors import InputError, extra
from blockpruner.core.families import FAMILIES
from blockpruner.core.settings import Runtime
from blockpruner.scoring.large.memory import available_memory
from blockpruner.scoring.large.sharing import share_out, unfinished
from blockpruner.scoring.scorers import make_scorer
from blockpruner.scoring.walk import steps_of
from blockpruner.scoring.work import Rows, ScoredRows, Span, Task, row_batches
from blockpruner.store.files import read_json
from blockpruner.store.trials import SIXTEEN_BITS, Origin

GRANT_SECONDS = 60
"""How long Ray may take to grant the workers' resources, which others of a shared cluster may
use."""

PIECES = 2
"""Pieces of work for each worker."""

OBJECT_STORE_BYTES = 128 * 2**20
"""The object store of a private Ray holds the token rows only."""

PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    # Despite its name, this is the one switch, on any system, that keeps to loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # It is 15 by default: on a shared machine, workers would wait for everything else.
    "RAY_worker_niceness": "0",
}
"""Environment of a private Ray: it reports nothing, and listens on this machine only."""


class WorkerLostError(InputError):
    """The last worker died."""


class Replica:
    """A worker: one scorer in a process of its own."""

    def __init__(
        self, checkpoint: Path, dtype: str, runtime: Runtime, trust_remote_code: bool
    ) -> None:
        self._checkpoint, self._dtype, self._runtime, self._trusted = (
            checkpoint,
            dtype,
            runtime,
            trust_remote_code,
        )

    def load(self) -> tuple[str, Origin, float]:
        """Load the model; return name, origin and `growth`. Errors of a constructor would not
        arrive as themselves."""
        memory = available_memory() // self._runtime.workers if self._runtime.streaming else None
        alone = self._runtime.model_copy(update={"executor": "local"})
        made = make_scorer(
            self._checkpoint, self._dtype, alone, trust_remote_code=self._trusted, memory=memory
        )
        self._scorer = cast(Any, made)
        return (
            f"process {os.getpid()} on {socket.gethostname()}",
            self._scorer.origin(),
            self._scorer.growth,
        )

    def run(self, tasks: Sequence[Task], rows: Rows, limit: int) -> Iterator[ScoredRows | int]:
        """Yield values; where memory runs out, the tokens to each later batch before the next
        value."""
        self._scorer.limit = limit
        tasks = [
            replace(task, span=part)
            for task in tasks
            for part in self._scorer.row_batches(rows, task.span)
        ]
        for scored in self._scorer.run(tasks, rows):
            if (tokens := self._scorer.origin()["batch_tokens"]) < limit:
                limit = tokens
                yield tokens
            yield scored


@dataclass(eq=False)
class _Worker:
    actor: Any
    name: str = ""
    origin: Origin = field(default_factory=dict)
    job: Any = None
    """The generator of its piece; None when idle."""
    piece: list[Task] = field(default_factory=list)
    answers: list[ScoredRows] = field(default_factory=list)


class RayScorer:
    """Replicas of the model, each an actor with one device (with device: split, with an equal share
    of them). Without `ray_address` a Ray of this machine is started for this process alone, on
    loopback, and ended with it. A Ray to which this process is connected already is used and left
    as it is."""

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        runtime: Runtime,
        trust_remote_code: bool,
        note: Callable[[str], object],
    ) -> None:
        self._runtime, self._note = runtime, note
        config = read_json(checkpoint / "config.json")
        self._steps = steps_of(
            config["num_hidden_layers"], FAMILIES[config["model_type"]].is_parallel(config)
        )
        self._workers: list[_Worker] = []
        self._rows: Rows | None = None
        self._reference: Any = None
        self._group: Any = None
        self._ray, self._connected = connect(runtime.ray_address, runtime.streaming)
        try:
            needs = resources(
                runtime, [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            )
            self._group = self._reserve(needs)
            replica = self._ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))(Replica)
            strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
            for number in range(runtime.workers):
                place = replica.options(scheduling_strategy=strategy(self._group, number))
                actor = place.remote(checkpoint.resolve(), dtype, runtime, trust_remote_code)
                self._workers.append(_Worker(actor))
            self._load(dtype)
        except BaseException:
            self.close()
            raise
        each = ", ".join(f"{count} {kind}" for kind, count in needs.items())
        note(f"ray: {runtime.workers} workers with {each} each")

    def _load(self, dtype: str) -> None:
        """Load all replicas. In 16 bits they compute in one way, apart from batches."""
        try:
            loaded = self._ray.get([worker.actor.load.remote() for worker in self._workers])
        except self._ray.exceptions.RayTaskError as error:
            raise _own(error) from None
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError(
                f"a Ray worker died while it was loading the model: {_reason(error)} Where memory"
                " is short, lower runtime.workers, or set runtime.streaming: true"
            ) from error
        for worker, (name, origin, growth) in zip(self._workers, loaded, strict=True):
            worker.name, worker.origin, self._growth = name, origin, growth
            if dtype in SIXTEEN_BITS and origin != {
                **loaded[0][1],
                "batch_tokens": origin["batch_tokens"],
            }:
                raise InputError(
                    f"Ray's workers compute with {dict(origin)} and {dict(loaded[0][1])}: in"
                    f" {dtype} their losses may differ by more than candidates do; use nodes that"
                    " are alike, or model.dtype: float32"
                )
        self._limit = min(int(worker.origin["batch_tokens"]) for worker in self._workers)

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        return row_batches(rows, span, self._limit, self._growth)

    def origin(self) -> Origin:
        """That of all workers; the smallest batches that any of them takes are those of all."""
        return {**self._workers[0].origin, "batch_tokens": self._limit}

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield values as workers report them. Raises what a worker's engine raised, as itself, and
        WorkerLostError if the last worker died."""
        # more pieces balance better, but each streamed one reads all weights
        pieces = len(self._workers) * (1 if self._runtime.streaming else PIECES)
        waiting = deque(share_out(tasks, rows, pieces, self._steps))
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                for worker in self._workers:
                    if worker.job is None and waiting:
                        worker.piece, worker.answers = waiting.popleft(), []
                        worker.job = worker.actor.run.remote(
                            worker.piece, self._shared(rows), self._limit
                        )
                busy = [worker for worker in self._workers if worker.job is not None]
                (ready,), _ = self._ray.wait([worker.job for worker in busy])
                worker = next(worker for worker in busy if worker.job is ready)
                try:
                    found = self._ray.get(next(worker.job))
                except StopIteration:
                    worker.job = None
                except self._ray.exceptions.RayTaskError as error:
                    raise _own(error) from None
                except self._ray.exceptions.RayError as error:
                    waiting.appendleft(unfinished(worker.piece, worker.answers))
                    self._lose(worker, error)
                else:
                    if isinstance(found, int):
                        self._limit = min(self._limit, found)
                        self._note(
                            f"{worker.name} ran out of memory; batches have {found} tokens at most"
                            " from now on"
                        )
                    else:
                        worker.answers.append(found)
                        yield found
        finally:
            for worker in self._workers:
                if worker.job is not None:  # it stops after the answer that it is computing
                    self._ray.cancel(worker.job)
                    worker.job = None

    def close(self) -> None:
        """End the workers, and Ray itself where it was started here."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def _reserve(self, needs: Mapping[str, int]) -> Any:
        """Take all workers' resources at once: no worker shall wait for another run's."""
        workers = self._runtime.workers
        group = self._ray.util.placement_group([dict(needs)] * workers, strategy="PACK")
        if group.wait(timeout_seconds=GRANT_SECONDS):
            return group
        self._ray.util.remove_placement_group(group)
        raise InputError(
            f"Ray has not granted {workers} workers with {_figures(needs)} each within"
            f" {GRANT_SECONDS} s: others use its nodes; wait, or lower runtime.workers or"
            " runtime.threads"
        )

    def _shared(self, rows: Rows) -> Any:
        """Reference of the rows in Ray's store, where they are put once."""
        if rows is not self._rows:
            self._rows, self._reference = rows, self._ray.put(rows)
        return self._reference

    def _lose(self, lost: _Worker, error: Exception) -> None:
        """Go on with the other workers; raises WorkerLostError where there is none."""
        if self._workers == [lost]:
            raise WorkerLostError(
                f"the last Ray worker died, {lost.name}: {_reason(error)} Run again: all that is"
                " finished is kept. Where memory is short, lower runtime.workers or"
                " runtime.batch_tokens, or set runtime.streaming: true"
            ) from error
        self._workers.remove(lost)
        self._ray.kill(lost.actor)
        self._note(
            f"{lost.name} was lost; {len(self._workers)} workers go on with its work."
            f" {_reason(error)}"
        )


def _reason(error: Exception) -> str:
    # tabs: identifiers
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
    return textwrap.shorten(" ".join(lines), 300)


def _own(error: Exception) -> Exception:
    """What a worker raised, if it is one of our errors; else the error as it is."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, InputError) else error


def connect(address: str | None, streaming: bool = False) -> tuple[Any, bool]:
    """Ray, and whether this call connected this process to it. While `streaming`, workers share the
    memory out, and a private Ray shall not kill one that uses it. Raises InputError if ray is not
    installed, or nothing answers at the address."""
    if address is None:
        # read at import
        os.environ.update(PRIVATE | ({"RAY_memory_monitor_refresh_ms": "0"} if streaming else {}))
        # else Ray's processes would want a token that this one does not send
        if "ray" not in sys.modules:
            os.environ["RAY_AUTH_MODE"] = "token"  # keeps other users of this machine out
            # Ray's own is a file that all may read
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with extra("ray"):
        import ray
        import ray.util.scheduling_strategies
    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        return ray, True
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"runtime.ray_address {address!r} does not answer as a Ray cluster:"
            f" {textwrap.shorten(str(error), 300)}; give <host>:<port> of its head, or null for a"
            " Ray of this machine"
        ) from error
    return ray, True


def resources(runtime: Runtime, nodes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """What Ray keeps for each worker: CPU cores, and GPUs if the device is one. With threads: auto
    on CPUs, or device: split, each worker gets the largest equal share of the cores, or of the
    GPUs, that the nodes can hold; a worker is on one node. The nodes are as "Resources" in
    `ray.nodes`. Raises InputError if they do not hold the workers."""
    workers, device, threads = runtime.workers, runtime.device, runtime.threads
    if device.startswith("cuda:"):
        raise InputError(
            f"runtime.device {device!r}: with executor: ray it is Ray that assigns devices; use"
            " auto or cuda"
        )
    on_gpu = device in ("cuda", "split") or (
        device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes)
    )
    needs = {"CPU": 1 if threads == "auto" else threads} | ({"GPU": 1} if on_gpu else {})
    if (fit := _places(needs, nodes)) < workers:
        raise InputError(
            f"runtime.workers {workers} with {_figures(needs)} each: Ray's nodes have room for"
            f" {fit}, and none is on two nodes; lower runtime.workers or runtime.threads, add"
            " nodes, or use another runtime.device"
        )
    if device == "split":
        needs["GPU"] = _largest("GPU", needs, workers, nodes)
    elif threads == "auto" and not on_gpu:
        needs["CPU"] = _largest("CPU", needs, workers, nodes)
    return needs


def _places(needs: Mapping[str, int], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers the nodes hold."""
    return sum(
        min(int(node.get(kind, 0)) // count for kind, count in needs.items()) for node in nodes
    )


def _largest(
    kind: str, needs: Mapping[str, int], workers: int, nodes: Sequence[Mapping[str, float]]
) -> int:
    """The most that each worker can have of `kind` with its other needs."""
    most = max(int(node.get(kind, 0)) for node in nodes)
    return next(n for n in range(most, 0, -1) if _places({**needs, kind: n}, nodes) >= workers)


def _figures(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {kind}" for kind, count in counts.items())
