"""Scoring on a pool of Ray workers that each hold a replica of the model.

A lost worker costs the one value that it was computing, and the others take over its work. When
the last worker is lost, the run ends; another run goes on from what is stored. A piece of work
never splits a batch, so losses have the same bits on any number of workers.
"""

import os
import socket
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.settings import Runtime
from blockpruner.scoring.large.cluster import connect, describe, reserve, worker_resources
from blockpruner.scoring.large.memory import available_memory
from blockpruner.scoring.large.sharing import share_out, unfinished
from blockpruner.scoring.walk import Step
from blockpruner.scoring.work import Rows, ScoredRows, Span, Task, row_batches
from blockpruner.store.trials import SIXTEEN_BITS, Origin

PIECES_PER_WORKER = 2
"""More pieces balance better, and lose more of the states that masks share."""


class WorkerLostError(InputError):
    """The last worker died."""


@dataclass
class ReplicaModel:
    """What a worker reports of its model."""

    name: str
    origin: Origin
    growth: float
    """As in `work.row_batches`."""
    steps: Sequence[Step]


class Replica:
    """One engine in a process of its own."""

    def __init__(
        self, checkpoint: Path, dtype: str, runtime: Runtime, trust_remote_code: bool
    ) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._runtime, self._trust_remote_code = runtime, trust_remote_code

    def load(self) -> ReplicaModel:
        """Load the model. Ray would replace an error of the constructor by its own."""
        from blockpruner.scoring.local import local_scorer

        memory = None
        if self._runtime.streaming:
            memory = available_memory() // self._runtime.workers
        self._engine = local_scorer(
            self._checkpoint, self._dtype, self._runtime, self._trust_remote_code, memory=memory
        )
        name = f"process {os.getpid()} on {socket.gethostname()}"
        return ReplicaModel(name, self._engine.origin(), self._engine.growth, self._engine.steps)

    def run(
        self, tasks: Sequence[Task], rows: Rows, batch_tokens: int
    ) -> Iterator[tuple[ScoredRows, int]]:
        """Yield each value with the tokens of a batch, which are fewer once memory has run out."""
        self._engine.limit = batch_tokens
        batches = []
        for task in tasks:
            for span in self._engine.row_batches(rows, task.span):
                batches.append(replace(task, span=span))
        for scored in self._engine.run(batches, rows):
            yield scored, int(self._engine.origin()["batch_tokens"])


@dataclass(eq=False)
class _Worker:
    actor: Any
    name: str = ""
    job: Any = None
    """The generator of Ray that yields the values of `tasks`; None while the worker is idle."""
    tasks: list[Task] = field(default_factory=list)
    scored: list[ScoredRows] = field(default_factory=list)


class RayScorer:
    """Replicas of the model, each with one device (with device: split, an equal share of them).

    Without `ray_address` a Ray of this machine is started for this process alone, on loopback, and
    ended with it. A Ray to which this process is already connected is used, and left running.
    """

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        runtime: Runtime,
        trust_remote_code: bool,
        note: Callable[[str], object],
    ) -> None:
        self._runtime, self._note = runtime, note
        self._workers: list[_Worker] = []
        self._group: Any = None
        self._ray, self._is_connected_here = connect(runtime.ray_address, runtime.streaming)
        try:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            resources = worker_resources(runtime, nodes)
            self._group = reserve(self._ray, runtime, resources)
            strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
            remote = self._ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
            replica = remote(Replica)
            for number in range(runtime.workers):
                placed = replica.options(scheduling_strategy=strategy(self._group, number))
                actor = placed.remote(checkpoint.resolve(), dtype, runtime, trust_remote_code)
                self._workers.append(_Worker(actor))
            self._load(dtype)
        except BaseException:
            self.close()
            raise
        note(f"ray: {runtime.workers} workers with {describe(resources, ', ')} each")

    def _load(self, dtype: str) -> None:
        try:
            replies = self._ray.get([worker.actor.load.remote() for worker in self._workers])
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError(
                f"a Ray worker died while it was loading the model: {_reason(error)} Where memory"
                " is short, lower runtime.workers, or set runtime.streaming: true"
            ) from error
        self._loaded: ReplicaModel = replies[0]
        for worker, reply in zip(self._workers, replies, strict=True):
            worker.name = reply.name
            expected = {**self._loaded.origin, "batch_tokens": reply.origin["batch_tokens"]}
            # In bf16 and fp16 another device or kernel moves losses by more than candidates differ.
            if dtype in SIXTEEN_BITS and reply.origin != expected:
                raise InputError(
                    f"Ray's workers compute with {dict(reply.origin)} and"
                    f" {dict(self._loaded.origin)}: in {dtype} their losses may differ by more than"
                    " candidates do; use nodes that are alike, or model.dtype: float32"
                )
        self._batch_tokens = min(int(reply.origin["batch_tokens"]) for reply in replies)

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        return row_batches(rows, span, self._batch_tokens, self._loaded.growth)

    def origin(self) -> Origin:
        """The origin of all workers. The smallest batches of one of them are those of all."""
        return {**self._loaded.origin, "batch_tokens": self._batch_tokens}

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield values as workers report them. Raises what a worker's engine raised, as itself, and
        WorkerLostError if the last worker died."""
        # Each piece that is streamed reads all weights.
        pieces = len(self._workers) * (1 if self._runtime.streaming else PIECES_PER_WORKER)
        waiting = deque(share_out(tasks, rows, pieces, self._loaded.steps))
        shared_rows = self._ray.put(rows)
        try:
            while waiting or any(worker.job for worker in self._workers):
                for worker in self._workers:
                    if worker.job is None and waiting:
                        worker.tasks, worker.scored = waiting.popleft(), []
                        worker.job = worker.actor.run.remote(
                            worker.tasks, shared_rows, self._batch_tokens
                        )
                busy = [worker for worker in self._workers if worker.job]
                (ready,), _ = self._ray.wait([worker.job for worker in busy])
                worker = next(worker for worker in busy if worker.job is ready)
                try:
                    scored, batch_tokens = self._ray.get(next(ready))
                except StopIteration:
                    worker.job = None
                except self._ray.exceptions.RayTaskError as error:
                    raise _cause(error) from None
                except self._ray.exceptions.RayError as error:
                    waiting.appendleft(unfinished(worker.tasks, worker.scored))
                    self._drop(worker, error)
                else:
                    self._shrink_batches(batch_tokens, worker)
                    worker.scored.append(scored)
                    yield scored
        finally:
            for worker in self._workers:
                if worker.job:  # it stops after the value that it is computing
                    self._ray.cancel(worker.job)
                    worker.job = None

    def _shrink_batches(self, batch_tokens: int, worker: _Worker) -> None:
        if batch_tokens < self._batch_tokens:
            self._batch_tokens = batch_tokens
            self._note(
                f"{worker.name} ran out of memory; batches have {batch_tokens} tokens at most from"
                " now on"
            )

    def _drop(self, lost: _Worker, error: Exception) -> None:
        """Go on without a worker; raises WorkerLostError if it was the last one."""
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

    def close(self) -> None:
        """End the workers, and Ray itself if it was started here."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None
        if self._is_connected_here:
            self._ray.shutdown()
            self._is_connected_here = False


def _reason(error: Exception) -> str:
    """The message of Ray without its identifiers, which are on lines that begin with a tab."""
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
    return textwrap.shorten(" ".join(lines), 300)


def _cause(error: Exception) -> Exception:
    """The error that a worker raised, if it is one of ours."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, InputError) else error
