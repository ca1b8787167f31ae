"""Scoring on a real Ray of this machine: the same bits on any number of workers, and what the loss
of one costs."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from blockpruner.core.blocks import DENSE, all_blocks
from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import Runtime
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.scoring.large import cluster
from blockpruner.scoring.large import ray as executors
from blockpruner.scoring.large.ray import Replica, ReplicaModel, WorkerLostError
from blockpruner.scoring.objectives import Objective, in_one_origin
from blockpruner.scoring.scorers import LazyScorer, make_scorer
from blockpruner.scoring.walk import steps_of
from blockpruner.scoring.work import ScoredRows, Task
from blockpruner.store.files import read_json
from blockpruner.store.trials import TrialStore
from tests.builders import scored

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray is not installed: pip install 'blockpruner[ray]'",
)

RUNTIME = {"device": "cpu", "batch_tokens": 24, "threads": 1, "executor": "ray"}
ROWS = CalibrationSet(
    tuple(tuple(1 + (7 * row + 3 * i * i) % 256 for i in range(12)) for row in range(5))
)
LAYERS, REMOVALS = 3, 2


def processes(text):
    """Command lines of the running processes that hold `text`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # ended meanwhile
            continue
    return [line for line in lines if text in line]


@pytest.fixture(scope="module", autouse=True)
def private_ray():
    """The Ray that a scorer would start for itself, shared by the tests; afterwards nothing of it
    is left."""
    with pytest.MonkeyPatch.context() as patch:
        # a full machine is no reason to lose a worker
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 3}')  # whatever this machine has
        ray, connected = cluster.connect(None)
    assert connected
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the replicas below
    node = ray.nodes()[0]
    session = Path(node["ObjectStoreSocketName"]).parents[1].name
    assert node["NodeManagerAddress"] == "127.0.0.1"
    assert processes(session), "the check below could not fail"
    yield ray
    ray.shutdown()
    deadline = time.monotonic() + 60
    while processes(session) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes(session) == []


def test_a_private_ray_asks_for_a_token_that_is_in_no_file_and_no_command_line(tmp_path):
    """In a process of its own, since Ray reads its environment when it is imported."""
    program = """
import os
from pathlib import Path
from blockpruner.scoring.large.cluster import connect
ray, _ = connect(None)
session, token = ray.nodes()[0]["ObjectStoreSocketName"].split("/")[-3], os.environ["RAY_AUTH_TOKEN"]
for process in Path("/proc").glob("[0-9]*"):
    try:
        line, settings = ((process / name).read_text(errors="replace") for name in ("cmdline", "environ"))
    except OSError:
        continue
    if session in line:
        settings = settings.split("\\0")
        print("RAY_AUTH_MODE=token" in settings and "RAY_AUTH_TOKEN=" + token in settings and token not in line)
print(len(token), ray.get(ray.remote(lambda: "computed").remote()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    *protected, last = done.stdout.splitlines()
    assert last == "64 computed" and len(protected) >= 3 and set(protected) == {"True"}
    assert not (tmp_path / ".ray").exists()


class Logged(Replica):
    """Writes down each unit as it is computed, beside the checkpoint; slow enough to be killed in
    between."""

    def run(self, tasks, rows, batch_tokens):
        log = self._checkpoint.parent / "computed"
        for unit, tokens in super().run(tasks, rows, batch_tokens):
            with open(log, "a") as stream:
                stream.write(f"{os.getpid()} {sorted(map(str, unit.mask))} {unit.span[0]}\n")
            yield unit, tokens
            time.sleep(0.05)


class Fake(Logged):
    """Loads no torch; a row's value is what the mask's blocks and the row's number add up to."""

    seconds = 0.1

    def load(self):
        origin = {"device": "none", "batch_tokens": 12}
        return ReplicaModel(f"process {os.getpid()} on here", origin, 0.0, steps_of(LAYERS, False))

    def run(self, tasks, rows, batch_tokens):
        log = self._checkpoint.parent / "computed"
        for task in tasks:
            for mask in task.masks:
                time.sleep(self.seconds)
                with open(log, "a") as stream:
                    stream.write(f"{sorted(map(str, mask))} {task.span[0]}\n")
                losses = tuple(value(mask, row) for row in task.span)
                yield ScoredRows(mask, task.span, losses), batch_tokens


class Slow(Fake):
    seconds = 1.0


class DiesInRun(Fake):
    def run(self, tasks, rows, batch_tokens):
        os._exit(3)
        yield


class DiesInLoad(Fake):
    def load(self):
        os._exit(3)


def is_first(path):
    """Whether no process was here before."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class OtherError(Fake):
    def run(self, tasks, rows, batch_tokens):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        yield


class Shrinks(Fake):
    """Its batches have 36 tokens, three rows; in one process memory runs out, and then it is one
    row."""

    def load(self):
        loaded = super().load()
        loaded.origin["batch_tokens"] = 36
        return loaded

    def run(self, tasks, rows, batch_tokens):
        folder = self._checkpoint.parent
        with open(folder / "limits", "a") as log:
            log.write(f"{batch_tokens} {[len(task.span) for task in tasks]}\n")
        if is_first(folder / "shrunk"):
            # until the other worker has its piece
            while len((folder / "limits").read_text().splitlines()) < 2:
                time.sleep(0.05)
            batch_tokens = 12
        yield from super().run(tasks, rows, batch_tokens)


class Refuses(Fake):
    def load(self):
        raise InputError("runtime.attention 'x' cannot be used here")


class OfAnotherCard(Fake):
    def load(self):
        loaded = super().load()
        loaded.origin["device"] = f"card {os.getpid()}"
        return loaded


def value(mask, row):
    return sum(block.layer + 1 for block in mask) + row / 8


def computed(folder):
    return (folder / "computed").read_text().splitlines()


@pytest.fixture
def checkpoint(tmp_path):
    from tests.tiny import save_tiny

    return save_tiny(tmp_path / "model", layers=LAYERS)


@pytest.fixture
def replica(monkeypatch):
    return lambda kind: monkeypatch.setattr(executors, "Replica", kind)


def search(
    checkpoint, folder, during=lambda scorer, units: None, note=lambda line: None, **runtime
):
    """A greedy search; `during` is called after each unit. Returns the iteration tables, byte for
    byte."""

    class Observed:
        def __init__(self):
            self.inner = make_scorer(checkpoint, "float32", Runtime(**RUNTIME | runtime), note=note)
            self.row_batches, self.origin = self.inner.row_batches, self.inner.origin
            self.close, self.units = self.inner.close, 0

        def run(self, tasks, rows):
            for unit in self.inner.run(tasks, rows):
                yield unit
                self.units += 1
                during(self.inner, self.units)

    with closing(LazyScorer(Observed)) as scorer:
        counts = scored(
            folder, scorer, read_json(checkpoint / "config.json"), [f"{REMOVALS}blocks"], ROWS
        )
    masks = (1 + 2 * LAYERS) + (2 * LAYERS - 1)
    assert (counts.iterations, counts.trials_computed) == (REMOVALS, masks)
    assert counts.units_computed == 3 * masks  # rows in batches of two, two and one
    return {
        path.name: path.read_bytes() for path in (folder / "scores").glob("*/iteration_*.parquet")
    }


def test_the_same_bits_locally_and_on_one_or_two_workers_and_after_a_loss(
    checkpoint, tmp_path, replica
):
    replica(Logged)
    import torch

    assert torch.get_num_threads() == 1  # as the workers'
    tables = search(checkpoint, tmp_path / "local", executor="local")
    assert len(tables) == REMOVALS
    assert search(checkpoint, tmp_path / "one", workers=1) == tables
    lines = computed(tmp_path)
    assert len(lines) == len(set(lines)) == 36

    (tmp_path / "computed").unlink()
    notes, killed = [], []

    def kill(scorer, units):
        """In the second iteration, a worker that has finished a part of its piece and has another
        before it."""
        for worker in scorer._workers:
            left = sum(len(task.masks) for task in worker.tasks) - len(worker.scored)
            if units > 21 and not killed and worker.scored and left >= 2:
                killed.append(int(worker.name.split()[1]))
                os.kill(killed[0], signal.SIGKILL)

    assert search(checkpoint, tmp_path / "two", kill, notes.append, workers=2) == tables
    lines = [line.split(" ", 1) for line in computed(tmp_path)]
    assert {pid for pid, _ in lines} > {str(pid) for pid in killed}
    units = [unit for _, unit in lines]
    assert len(set(units)) == 36 and len(units) <= 37, (
        "only the unit that was being computed may be repeated"
    )
    assert notes[0] == "ray: 2 workers with 1 CPU each"
    (lost,) = [line for line in notes if "was lost" in line]
    assert lost.startswith(f"process {killed[0]} on ") and "1 workers go on" in lost


def test_a_streamed_worker(checkpoint, tmp_path):
    tables = search(checkpoint, tmp_path / "streamed", streaming=True)
    assert tables == search(checkpoint, tmp_path / "local", executor="local")


def test_a_loss_that_is_not_finite_arrives_as_itself(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["model.embed_tokens.weight"][ROWS.rows[3][0]] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        NonFiniteLossError, match=r"^the loss of row 3 is nan in the dense model.*float32"
    ) as caught:
        search(checkpoint, tmp_path)
    assert type(caught.value) is NonFiniteLossError


def run(scorer, tasks):
    found = [
        (unit.mask, unit.span[i], nll)
        for unit in scorer.run(tasks, ROWS.rows)
        for i, nll in enumerate(unit.loss)
    ]
    assert sorted((mask_row[:2] for mask_row in found), key=repr) == sorted(
        ((mask, row) for task in tasks for mask in task.masks for row in task.span), key=repr
    )
    assert all(nll == value(mask, row) for mask, row, nll in found)


def sweep(scorer):
    masks = (DENSE, *(frozenset({block}) for block in all_blocks(LAYERS)))
    return [Task(span, masks) for span in scorer.row_batches(ROWS.rows, range(5))]


def test_a_run_that_is_left_early_stops_its_workers(checkpoint, tmp_path, replica):
    replica(Slow)
    scorer = make_scorer(checkpoint, "float32", Runtime(**RUNTIME, workers=2))
    tasks = sweep(scorer)
    units = scorer.run(tasks, ROWS.rows)
    next(units)
    units.close()
    run(scorer, tasks[:1])
    scorer.close()
    assert len(computed(tmp_path)) <= 1 + len(tasks[0].masks) + 2 * 2


def test_an_error_of_a_worker_ends_the_run(checkpoint, replica):
    replica(OtherError)
    scorer = make_scorer(checkpoint, "float32", Runtime(**RUNTIME))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(scorer, sweep(scorer))
    scorer.close()


def test_memory_that_runs_out_in_one_worker_makes_all_batches_smaller(
    checkpoint, tmp_path, replica
):
    """16-bit losses of two shapes are not compared: the work begins again in the smaller one."""
    replica(Shrinks)
    notes, observer = [], SilentObserver()
    observer.note = notes.append
    runtime = Runtime(**RUNTIME | {"batch_tokens": "auto"}, workers=2)
    scorer = make_scorer(checkpoint, "bfloat16", runtime)
    store = TrialStore({"dtype": "bfloat16"}, ROWS.row_keys)
    masks = [frozenset({block}) for block in all_blocks(LAYERS)]

    def work():
        objective = Objective(ROWS, store, scorer)
        return objective(masks), objective.origin

    found, origin = in_one_origin(work, observer)
    assert [score.row_loss for score in found] == [
        tuple(value(mask, row) for row in range(5)) for mask in masks
    ]
    assert (
        origin["batch_tokens"] == scorer.origin()["batch_tokens"] == 12
        and "batch_tokens 12, before 36" in notes[0]
    )
    assert scorer.row_batches(ROWS.rows, range(5)) == [range(n, n + 1) for n in range(5)]
    scorer.close()
    limits = (tmp_path / "limits").read_text().splitlines()
    assert limits[0].startswith("36 [") and limits[-1].startswith("12 [1")


def test_a_worker_that_always_dies_ends_the_run(checkpoint, replica):
    replica(DiesInRun)
    notes = []
    scorer = make_scorer(checkpoint, "float32", Runtime(**RUNTIME, workers=2), note=notes.append)
    with pytest.raises(
        WorkerLostError, match=r"the last Ray worker died, process \d+ on here.* Run again: "
    ):
        run(scorer, sweep(scorer))
    scorer.close()
    assert sum("was lost; 1 workers go on" in line for line in notes) == 1
    replica(DiesInLoad)
    with pytest.raises(WorkerLostError, match="died while it was loading"):
        make_scorer(checkpoint, "float32", Runtime(**RUNTIME))


def test_what_a_worker_refuses_arrives_as_itself(checkpoint, replica):
    replica(Refuses)
    with pytest.raises(InputError, match=r"^runtime\.attention 'x' cannot be used here$"):
        make_scorer(checkpoint, "float32", Runtime(**RUNTIME))


def test_unlike_devices_are_not_mixed_in_16_bits(checkpoint, replica):
    replica(OfAnotherCard)
    with pytest.raises(
        InputError, match=r"with .*card \d+.* and .*card \d+.*: in bfloat16 .*float32$"
    ):
        make_scorer(checkpoint, "bfloat16", Runtime(**RUNTIME, workers=2))
    scorer = make_scorer(checkpoint, "float32", Runtime(**RUNTIME, workers=2))
    run(scorer, sweep(scorer))
    scorer.close()


def test_more_workers_than_there_is_room_for(checkpoint, private_ray, replica, monkeypatch):
    cores = int(private_ray.cluster_resources()["CPU"])
    with pytest.raises(
        InputError,
        match=rf"workers {cores + 1} .* room for {cores}, .*lower runtime.workers",
    ):
        make_scorer(checkpoint, "float32", Runtime(**RUNTIME, workers=cores + 1))
    replica(Fake)
    first = make_scorer(checkpoint, "float32", Runtime(**RUNTIME, workers=cores))
    granted = cluster.GRANT_SECONDS
    monkeypatch.setattr(cluster, "GRANT_SECONDS", 2)
    with pytest.raises(InputError, match="has not granted 1 workers with 1 CPU each within 2 s"):
        make_scorer(checkpoint, "float32", Runtime(**RUNTIME))
    first.close()
    monkeypatch.setattr(cluster, "GRANT_SECONDS", granted)
    make_scorer(
        checkpoint, "float32", Runtime(**RUNTIME)
    ).close()  # what the first had is free again
