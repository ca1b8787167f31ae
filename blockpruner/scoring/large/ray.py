"""Scoring on Ray workers that each hold a replica of the model.

A lost worker costs the one answer that it was computing. A piece of work never splits a batch, so losses have the same
bits on however many of the workers. With `batch_tokens: auto`, batches are cut until `workers` can share them out; with
a number they are those of any other number of workers, too.

Workers import this package. A Ray that is started here has it; the nodes of a shared cluster must have the same
version of blockpruner, and the checkpoint at the same path.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import textwrap
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockpruner import __version__
from blockpruner.core.errors import InputError
from blockpruner.core.settings import Runtime
from blockpruner.scoring.large.sharing import WalkCosts, share_among, share_out, tokens_of_a_share, unfinished
from blockpruner.scoring.scorers import local_scorer
from blockpruner.scoring.work import Rows, ScoredRows, Span, Task, over_all_rows
from blockpruner.store.files import read_json
from blockpruner.store.provenance import environment
from blockpruner.store.trials import SIXTEEN_BITS, batch_tokens, batch_words, origin

LOSSES = 3
"""How often, on average, each worker may die before scoring stops, without one answer in between."""

FAULTS = 2
"""After so many errors of one device its worker is not replaced any more, as long as there are others."""

DEVICE_ERROR = re.compile(r"\b(CUDA|HIP|XPU) error\b|\b(CUBLAS|CUDNN|CUSOLVER|HIPBLAS)_STATUS_")
"""How torch words an error after which a process can use its device no more. Memory that runs out is none."""

SILENCE_SECONDS = 600
"""After this time without an answer a note is shown: the work may be long, or a lost worker not replaceable."""

GRANT_SECONDS = 60
"""How long Ray may take to grant the workers' resources, which others of a shared cluster may use."""

OBJECT_STORE_BYTES = 128 * 2**20
"""The object store of a private Ray holds the token rows only."""

PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name the one switch, on any system, that keeps to loopback
    "RAY_worker_niceness": "0",  # 15 by default: on a shared machine workers would wait for everything else
}
"""Environment of a private Ray: it reports nothing, and listens on this machine only."""


VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Numbers or names of the GPUs that a process sees."""


class WorkerLostError(InputError):
    """Workers die as fast as they are replaced."""


class Replica:
    """A worker: one scorer in a process of its own."""

    def __init__(
        self, checkpoint: Path, dtype: str, runtime: Runtime, trust_remote_code: bool, memory: int | None
    ) -> None:
        self._arguments = (checkpoint, dtype, runtime, trust_remote_code)
        self._runtime, self._memory = runtime, memory

    def load(self) -> tuple[str, int, Mapping[str, str]]:
        """Load the model; return host, process, environment. Errors of a constructor would not arrive as themselves."""
        self._scorer: Any = local_scorer(*self._arguments, lambda line: None, memory=self._memory)
        here = environment(**self._scorer.placement(), blockpruner=__version__)
        return socket.gethostname(), os.getpid(), here

    def row_batches(self, rows: Rows, span: Span, limit: int | None) -> list[Span]:
        self._scorer.limit = limit
        found: list[Span] = self._scorer.row_batches(rows, span)
        return found

    def run(self, tasks: Sequence[Task], rows: Rows, limit: int | None) -> Iterator[ScoredRows | str | int]:
        """Yield values; before those of a streamed pass, the lines of its plan; where memory runs out, the tokens to
        each later batch."""
        self._scorer.limit = limit
        tasks = [replace(task, span=part) for task in tasks for part in self._scorer.row_batches(rows, task.span)]
        if self._runtime.streaming:
            yield from self._scorer.plan_of(tasks, rows).lines()
        tokens = batch_tokens(self._scorer.placement())
        for scored in self._scorer.run(tasks, rows):
            before, tokens = tokens, batch_tokens(self._scorer.placement())
            if tokens is not None and tokens != before:
                yield tokens
            yield scored


@dataclass(eq=False)
class _Worker:
    number: int
    actor: Any
    job: Any
    """The reference of its loading, or the generator of its piece; None when idle."""
    host: str = ""
    pid: int = 0
    placement: Mapping[str, str] = field(default_factory=dict)
    """Its environment; empty until it is loaded."""
    tokens: int | None = None
    """To a batch at most, as its memory has it."""
    limit: int | None = None
    """The same, as its piece was given to it."""
    piece: list[Task] = field(default_factory=list)
    answers: list[ScoredRows] = field(default_factory=list)

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" (process {self.pid} on {self.host})" if self.pid else "")


class RayScorer:
    """Replicas of the model, each an actor with one device (with device: split, with an equal share of them).

    Without `ray_address` a Ray of this machine is started for this process alone, on loopback, and ended with it. A
    Ray to which this process is connected already is used and left as it is.
    """

    def __init__(
        self, checkpoint: Path, dtype: str, runtime: Runtime, trust_remote_code: bool, note: Callable[[str], object]
    ) -> None:
        self._runtime, self._note = runtime, note
        self._costs = WalkCosts.of(read_json(checkpoint / "config.json"))
        self._workers: list[_Worker] = []
        self._waiting: deque[list[Task]] = deque()
        self._losses = 0
        self._faults = Counter[int]()
        self._rows: Rows | None = None
        self._reference: Any = None
        self._most: int | None = None
        self._halved: int | None = None
        self._answered: _Worker | None = None
        self._group: Any = None
        self._ray, self._connected = connect(runtime.ray_address, runtime.streaming, runtime.workers)
        try:
            needs = resources(runtime, [node["Resources"] for node in self._ray.nodes() if node["Alive"]])
            self._device = "GPU" if "GPU" in needs else "CPU"
            self._group = self._reserve(needs)
            self._actor = self._ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))(Replica)
            memory = self._memory_of_a_worker(needs) if runtime.streaming else None
            self._arguments = (checkpoint.resolve(), dtype, runtime, trust_remote_code, memory)
            self._workers = [self._start(number) for number in range(runtime.workers)]
        except BaseException:
            self.close()
            raise
        each = ", ".join(f"{count} {kind}" for kind, count in needs.items())
        note(f"ray: {runtime.workers} workers with {each} each")

    def limit_batches(self, rows: Rows, most: int | None) -> None:
        """Take no more tokens to a batch, and no more than lets all workers share out these rows."""
        if self._runtime.batch_tokens == "auto":
            share = None
            if self._runtime.workers > 1:
                share = tokens_of_a_share(rows, self._runtime.workers, self._device)
            self._most = _least(share, most)

    @property
    def _limit(self) -> int | None:
        """Of all batches: a worker that ran out of memory speaks for all."""
        return _least(self._most, self._halved, *(worker.tokens for worker in self._workers if worker.placement))

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        """The finest grouping among the workers' engines, which hold the same model."""
        answers: list[list[Span]] = []
        while not answers:
            for worker in [worker for worker in self._workers if worker.job is None]:
                with self._watch(worker):
                    answers.append(
                        self._ray.get(worker.actor.row_batches.remote(self._shared(rows), span, self._limit))
                    )
            if not answers:
                list(self._receive(self._next()))  # between runs a worker can only report that it is loaded
        return max(answers, key=len)

    def placement(self) -> dict[str, str]:
        """That of the workers that are loaded; where they differ, all of their devices and kernels.

        The batches are those of the last answer; between runs, those to come.
        """
        while not any(worker.placement for worker in self._workers):
            list(self._receive(self._next()))
        found = [worker.placement for worker in self._workers if worker.placement]
        facts = {key: " and ".join(sorted({each[key] for each in found})) for key in found[0]}
        last = self._answered
        tokens = self._limit if last is None else _least(last.tokens, last.limit)
        return facts if tokens is None else facts | {"batch": batch_words(tokens)}

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield values as workers report them.

        Raises:
            InputError: what a worker's engine raised, as itself; values yielded before are good.
            WorkerLostError: workers died `LOSSES` times each, without one answer.
        """
        # each streamed piece reads all weights
        share = share_out if self._runtime.streaming or self._runtime.workers == 1 else share_among
        self._waiting = deque(share(over_all_rows(tasks, rows), rows, self._runtime.workers, self._costs))
        try:
            while self._waiting or any(worker.piece for worker in self._workers):
                for worker in self._workers:
                    if worker.job is None and self._waiting:
                        worker.piece, worker.answers = self._waiting.popleft(), []
                        worker.limit = self._limit
                        worker.job = worker.actor.run.remote(worker.piece, self._shared(rows), worker.limit)
                yield from self._receive(self._next())
        finally:
            self._answered = None
            for worker in self._workers:
                if worker.piece:  # it stops after the answer that it is computing
                    self._ray.cancel(worker.job)
                    worker.job, worker.piece = None, []

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

    def _memory_of_a_worker(self, needs: Mapping[str, int]) -> int:
        """Bytes that each streamed worker may take, also one that replaces another on any node."""
        from blockpruner.scoring.large.memory import available_memory

        if self._runtime.ray_address is None:
            return available_memory() // self._runtime.workers
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return memory_of_a_worker(self._runtime.workers, needs, nodes)

    def _reserve(self, needs: Mapping[str, int]) -> Any:
        """Take all workers' resources at once: no worker shall wait for another run's."""
        workers = self._runtime.workers
        group = self._ray.util.placement_group([dict(needs)] * workers, strategy="PACK")
        if group.wait(timeout_seconds=GRANT_SECONDS):
            return group
        free = {kind: int(self._ray.available_resources().get(kind, 0)) for kind in needs}
        self._ray.util.remove_placement_group(group)
        fixes = ["wait"]
        if self._runtime.device == "split":  # fewer workers would have more each
            fixes.append("use runtime.device: cuda")
        elif needs["CPU"] > 1:
            fixes.append(f"set runtime.threads to less than {needs['CPU']}")
        elif workers > 1:
            fixes.append("lower runtime.workers")
        raise InputError(
            f"Ray has not granted {workers} workers with {_figures(needs)} each within {GRANT_SECONDS} s; free now: "
            f"{_figures(free)} on all nodes together, the rest is in use by others; {', or '.join(fixes)}"
        )

    def _start(self, number: int) -> _Worker:
        place = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, number)
        actor = self._actor.options(scheduling_strategy=place).remote(*self._arguments)
        return _Worker(number, actor, actor.load.remote())

    def _shared(self, rows: Rows) -> Any:
        """Reference of the rows in Ray's store, where they are put once."""
        if rows is not self._rows:
            self._rows, self._reference = rows, self._ray.put(rows)
        return self._reference

    def _next(self) -> _Worker:
        """The next worker with a result."""
        busy = [worker for worker in self._workers if worker.job is not None]
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait([worker.job for worker in busy], timeout=SILENCE_SECONDS)
            if not ready:
                loading = ", ".join(str(worker) for worker in busy if not worker.pid) or "none"
                self._note(f"no worker has reported for {SILENCE_SECONDS} s; still to be started or loaded: {loading}")
        return next(worker for worker in busy if worker.job is ready[0])

    def _receive(self, worker: _Worker) -> Iterator[ScoredRows]:
        """Take the next result of a worker's job: that it is loaded, an answer, a note, or the end of its piece."""
        result: Any = None
        with self._watch(worker):
            if not worker.pid:
                worker.host, worker.pid, worker.placement = self._ray.get(worker.job)
                worker.job, worker.tokens = None, batch_tokens(worker.placement)
                self._require_alike(worker)
                return
            try:
                result = self._ray.get(next(worker.job))
            except StopIteration:
                worker.job, worker.piece = None, []
        if isinstance(result, str):
            self._note(f"{worker}: {result}")
        elif isinstance(result, int):
            worker.tokens, self._halved = result, _least(self._halved, result)
            self._note(f"{worker} ran out of memory; its batches have {result} tokens at most from now on")
        elif result is not None:
            worker.answers.append(result)
            self._answered = worker
            self._losses = 0
            yield result

    def _require_alike(self, worker: _Worker) -> None:
        """All workers have our version. In 16 bits, what is compared comes from one kind of device, attention kernel,
        torch and transformers."""
        found = worker.placement["blockpruner"]
        if found != __version__:
            raise InputError(
                f"Ray's {worker} has blockpruner {found}, and this process {__version__}; install one of them"
            )
        if self._arguments[1] not in SIXTEEN_BITS:
            return
        for other in filter(lambda each: each.placement, self._workers):
            one, two = (
                origin({key: fact for key, fact in each.placement.items() if key != "batch"})  # it may be halved later
                for each in (worker, other)
            )
            if one != two:
                raise InputError(
                    f"Ray's {worker} computes with {one}, {other} with {two}: in {self._arguments[1]} their losses "
                    "may differ by more than candidates do; use nodes that are alike, or model.dtype: float32"
                )

    @contextmanager
    def _watch(self, worker: _Worker) -> Iterator[None]:
        """Raise our own errors as themselves; replace a worker that is lost."""
        try:
            yield
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            if not DEVICE_ERROR.search(str(error.cause)):
                raise
            self._faults[worker.number] += 1  # a new process may use the device, if it is no broken one
            self._replace(worker, error)
        except self._ray.exceptions.RayError as error:
            self._replace(worker, error)

    def _replace(self, lost: _Worker, error: Exception) -> None:
        lines = [line for line in str(error).splitlines() if not line.startswith("\t")]  # tabs: identifiers
        reason = textwrap.shorten(" ".join(lines), 300)
        self._losses += 1
        if self._losses >= LOSSES * len(self._workers):
            raise WorkerLostError(
                f"{self._losses} Ray workers in a row died before they finished a unit; the last was {lost}: {reason} "
                "Where memory is short, lower runtime.workers or runtime.batch_tokens, or set runtime.streaming: true; "
                "with runtime.executor: local the cause shows itself. Trials finished before are kept"
            ) from error
        left = unfinished(lost.piece, lost.answers)
        if left:
            self._waiting.appendleft(left)
        work = (
            f"Its {len(lost.answers)} finished units are kept, the one that it was computing is repeated"
            if lost.piece
            else "It was loading the model"
        )
        self._ray.kill(lost.actor)
        place = self._workers.index(lost)
        if self._faults[lost.number] >= FAULTS and len(self._workers) > 1:
            del self._workers[place]
            what = f"is not replaced: its device failed {self._faults[lost.number]} times"
        else:
            self._workers[place] = self._start(lost.number)
            what = "is replaced"
        self._note(f"{lost} was lost and {what}. {work}. Ray says: {reason}")


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def connect(address: str | None, streaming: bool = False, workers: int = 1) -> tuple[Any, bool]:
    """Ray, and whether this call connected this process to it.

    Args:
        streaming: workers plan their own memory, and a private Ray shall not kill one that uses it.
        workers: how many will ask for a GPU each, if there are any.

    Raises:
        InputError: ray is not installed, or nothing answers at the address.
    """
    if address is None:
        os.environ.update(PRIVATE | ({"RAY_memory_monitor_refresh_ms": "0"} if streaming else {}))  # read at import
        if "ray" not in sys.modules:  # else Ray's processes would want a token that this one does not send
            os.environ["RAY_AUTH_MODE"] = "token"  # keeps other users of this machine out
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray's own is a file that all may read
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise InputError(
            f"runtime.executor 'ray' needs the package ray ({error}); pip install 'blockpruner[ray]', or set "
            "runtime.executor: local"
        ) from error
    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        with _free_devices(workers):
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        return ray, True
    if address.startswith("ray://"):
        raise InputError(
            f"runtime.ray_address {address!r} is of a Ray client, which cannot stream units; give <host>:<port> of the "
            "cluster's head (6379 by default), or auto on one of its nodes"
        )
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"runtime.ray_address {address!r} does not answer as a Ray cluster: {textwrap.shorten(str(error), 300)}; "
            "give <host>:<port> of its head, or null for a Ray of this machine; a head that asks for a token needs "
            "RAY_AUTH_MODE=token and that token here, too"
        ) from error
    return ray, True


@contextmanager
def _free_devices(workers: int) -> Iterator[None]:
    """Within, processes that are started see those GPUs alone that no other process has claimed. Where these are fewer
    than the workers, they see all and share them."""
    from blockpruner.model import accelerator

    here = accelerator.devices()
    free = [device.index for device in here if not accelerator.is_held(device)]
    if accelerator.kind() != "cuda" or len(free) < workers or len(free) == len(here):
        yield
        return
    before = os.environ.get(VISIBLE)
    names = before.split(",") if before else list(map(str, range(len(here))))
    os.environ[VISIBLE] = ",".join(names[index] for index in free)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


def resources(runtime: Runtime, nodes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """What Ray keeps for each worker: CPU cores, and GPUs if the device is one.

    With threads: auto on CPUs, or device: split, each worker gets the largest equal share of the cores, or of the GPUs,
    that the nodes can hold; a worker is on one node.

    Args:
        nodes: all resources of each node, as "Resources" in `ray.nodes`.

    Raises:
        InputError: the nodes do not hold the workers; gives the figures.
    """
    workers, device, threads = runtime.workers, runtime.device, runtime.threads
    if device.startswith("cuda:"):
        raise InputError(
            f"runtime.device {device!r}: with executor: ray it is Ray that assigns devices; use auto or cuda"
        )
    on_gpu = device in ("cuda", "split") or (device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes))
    needs = {"CPU": 1 if threads == "auto" else threads} | ({"GPU": 1} if on_gpu else {})
    if (fit := _places(needs, nodes)) < workers:
        fixes = [f"lower runtime.workers to at most {fit}"] if fit else []
        if fewer := _largest("CPU", needs, workers, nodes):
            fixes.append(f"lower runtime.threads to at most {fewer}")
        raise InputError(
            f"runtime.workers {workers} with {_figures(needs)} each: Ray has {_nodes_figures(needs, nodes)}, room for "
            f"{fit}, since a worker is on one node; {', or '.join(fixes) or 'add nodes, or use another runtime.device'}"
        )
    if device == "split":
        needs["GPU"] = _largest("GPU", needs, workers, nodes)
    elif threads == "auto" and not on_gpu:
        needs["CPU"] = _largest("CPU", needs, workers, nodes)
    return needs


def memory_of_a_worker(workers: int, needs: Mapping[str, int], nodes: Sequence[Mapping[str, float]]) -> int:
    """The share of a node's memory that each worker finds, however many of them the node gets.

    Args:
        nodes: as in `resources`.
    """
    held = [(int(node.get("memory", 0)), min(workers, _places(needs, [node]))) for node in nodes]
    return min(memory // count for memory, count in held if count)


def _places(needs: Mapping[str, int], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers the nodes hold."""
    return sum(min(int(node.get(kind, 0)) // count for kind, count in needs.items()) for node in nodes)


def _largest(kind: str, needs: Mapping[str, int], workers: int, nodes: Sequence[Mapping[str, float]]) -> int:
    """The most that each worker can have of `kind` with its other needs; 0 if there is no room for so many workers."""
    most = max((int(node.get(kind, 0)) for node in nodes), default=0)
    return next((n for n in range(most, 0, -1) if _places({**needs, kind: n}, nodes) >= workers), 0)


def _figures(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {kind}" for kind, count in counts.items())


def _nodes_figures(kinds: Iterable[str], nodes: Sequence[Mapping[str, float]]) -> str:
    """For instance "2 nodes of 16 CPU, 1 node of 8 CPU"."""
    like = Counter(_figures({kind: int(node.get(kind, 0)) for kind in kinds}) for node in nodes)
    return ", ".join(f"{count} node{'s' * (count > 1)} of {figures}" for figures, count in like.items()) or "no node"
