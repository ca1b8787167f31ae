"""How work is shared out, what a local scorer's options change (nothing but speed), and what is
refused."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

from blockpruner.core.blocks import DENSE, BlockKind, all_blocks
from blockpruner.core.errors import InputError
from blockpruner.core.settings import Runtime
from blockpruner.model.models import masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large.cluster import worker_resources
from blockpruner.scoring.large.ray import Replica
from blockpruner.scoring.large.sharing import (
    share_out,
    unfinished,
)
from blockpruner.scoring.scorers import make_scorer
from blockpruner.scoring.walk import runs, steps_of, walk
from blockpruner.scoring.work import ScoredRows, Task
from tests.tiny import full_nll, save_tiny, tiny_model

RUNTIME = {"device": "cpu", "batch_tokens": 40}
ROWS = [[1] * 9, [1] * 4, [1] * 9, [1] * 6, [1] * 5]
WALK = sorted(all_blocks(4), key=lambda block: (block.layer, block.kind is BlockKind.MLP))
STEPS = steps_of(4, False)


def pool(count, seed):
    generator = random.Random(seed)
    return [frozenset(generator.sample(WALK, generator.randint(0, 5))) for _ in range(count)]


def tasks_of(seed):
    """Three tasks with overlapping pools, as when a search goes on where another one was
    interrupted."""
    return [
        Task(span, tuple(dict.fromkeys(pool(7 - n, seed + n))))
        for n, span in enumerate([range(0, 2), range(2, 3), range(3, 5)])
    ]


@pytest.mark.parametrize("pieces", [1, 3, 6, 50])
@pytest.mark.parametrize("seed", range(3))
def test_every_mask_is_in_one_piece_and_spans_stay_whole(pieces, seed):
    """Whatever the order of the masks."""
    tasks = tasks_of(seed)
    shared = share_out(tasks, ROWS, pieces, STEPS)
    result = [(task.span, mask) for piece in shared for task in piece for mask in task.masks]
    assert sorted(result, key=repr) == sorted(
        ((t.span, mask) for t in tasks for mask in t.masks), key=repr
    )
    assert 1 <= len(shared) <= pieces
    assert all(task.masks for piece in shared for task in piece)
    assert (
        share_out([Task(task.span, task.masks[::-1]) for task in tasks], ROWS, pieces, STEPS)
        == shared
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("parallel", [False, True])
def test_a_walk_runs_each_block_once_for_each_state(parallel, seed):
    """Brute force: a block's input depends on what is removed before it; MHA and MLP may read the
    same input."""
    masks = list(dict.fromkeys(pool(9, seed)))
    groups = list(runs(steps_of(4, parallel), masks))
    assert sorted((mask for group, _ in groups for mask in group), key=repr) == sorted(
        masks, key=repr
    )
    states = set()
    for mask in masks:
        for step in steps_of(4, parallel):
            before = frozenset(block for block in mask if WALK.index(block) < WALK.index(step[0]))
            states |= {(before, block) for block in step if block not in mask}
    assert sum(len(ran) for _, ran in groups) == len(states)


@pytest.mark.parametrize("width", [1, 2, 3, 50])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parallel", [False, True])
def test_a_wide_walk_ends_in_the_same_states_with_no_more_work(parallel, seed, width):
    """A state is what was kept so far, in the order of a forward pass; blocks of one step read the
    same state."""
    masks, calls = list(dict.fromkeys(pool(9, seed))), []
    steps = steps_of(4, parallel)

    def run(block, states):
        calls.append(states)
        return [(state, block) for state in states]

    def join(state, adds):
        assert all(read == state for read, _ in adds)
        return (*state, *(block for _, block in adds))

    result = list(walk(steps, masks, (), run, join, width))
    assert [group for group, _ in result] == [group for group, _ in runs(steps, masks)]
    for group, state in result:
        assert [state] * len(group) == [
            tuple(b for step in steps for b in step if b not in mask) for mask in group
        ]
    assert max(map(len, calls)) <= width
    assert sum(map(len, calls)) == sum(len(ran) for _, ran in runs(steps, masks))


@pytest.mark.parametrize("seed", range(4))
def test_unfinished_is_the_rest(seed):
    tasks, generator = tasks_of(seed), random.Random(seed)
    everything = {(mask, row) for task in tasks for mask in task.masks for row in task.span}
    units = [
        ScoredRows(mask, (row,), (0.0,))
        for mask, row in generator.sample(sorted(everything, key=repr), len(everything) // 2)
    ]
    remaining = [
        (mask, row) for task in unfinished(tasks, units) for mask in task.masks for row in task.span
    ]
    assert len(remaining) == len(set(remaining))
    assert set(remaining) == everything - {(unit.mask, unit.span[0]) for unit in units}
    assert unfinished(tasks, []) == tasks
    assert (
        unfinished(
            tasks, [ScoredRows(m, t.span, (0.0,) * len(t.span)) for t in tasks for m in t.masks]
        )
        == []
    )


def score(checkpoint, **runtime):
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.randint(1, 257, (length,), generator=generator).tolist()
        for length in (12, 12, 12, 7, 9)
    ]
    masks = (DENSE, *(frozenset({block}) for block in all_blocks(2)))
    scorer = make_scorer(checkpoint, "float64", Runtime(**RUNTIME | runtime))
    tasks = [Task(span, masks) for span in scorer.row_batches(rows, range(5))]
    result = {
        (u.mask, u.span[i]): nll for u in scorer.run(tasks, rows) for i, nll in enumerate(u.loss)
    }
    scorer.close()
    return rows, result


def agrees(rows, found, model):
    """To the rounding of float32, in which norms, and eager's softmax, compute whatever the
    dtype."""
    assert len(found) == 5 * len(rows)
    for (mask, row), nll in found.items():
        with masked(model, mask):
            assert nll == pytest.approx(full_nll(model, rows[row]), abs=1e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2", layers=2)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "auto"])
def test_attention_changes_no_score(checkpoint, attention):
    agrees(*score(checkpoint, attention=attention), tiny_model("qwen2", 2, torch.float32).double())


def test_the_module_loads_neither_torch_nor_ray():
    """`score` takes a second when nothing must be computed."""
    program = (
        "import sys, blockpruner.scoring.scorers; print(sorted({'torch', 'transformers', 'ray'} &"
        " set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def ray_runtime(**runtime):
    return Runtime(**{"device": "cpu", "executor": "ray"} | runtime)


def ray_nodes(nodes):
    """Of (CPUs, GPUs), as Ray says it: what a node has not is left out."""
    return [
        {kind: float(n) for kind, n in zip(("CPU", "GPU"), node, strict=True) if n}
        for node in nodes
    ]


def fits(workers, cpus, gpus, nodes):
    """Brute force: whether some way of placing the workers on nodes asks none for more than it
    has."""
    return any(
        all(
            place.count(i) * cpus <= node[0] and place.count(i) * gpus <= node[1]
            for i, node in enumerate(nodes)
        )
        for place in itertools.product(range(len(nodes)), repeat=workers)
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_share_is_the_largest_of_which_every_worker_finds_one_on_a_node(seed):
    generator = random.Random(seed)
    nodes = [
        (generator.randint(0, 7), generator.randint(0, 4)) for _ in range(generator.randint(1, 3))
    ]
    workers, threads = generator.randint(1, 4), generator.choice(["auto", 1, 2, 3])
    for device in ("cpu", "cuda", "split"):
        cpus = (
            range(1, 8)
            if (device, threads) == ("cpu", "auto")
            else [1 if threads == "auto" else threads]
        )
        gpus = {"cpu": [0], "cuda": [1], "split": range(1, 5)}[device]
        valid = [(c, g) for c in cpus for g in gpus if fits(workers, c, g, nodes)]
        expected = {"workers": workers, "threads": threads, "device": device}
        if valid:
            result = worker_resources(ray_runtime(**expected), ray_nodes(nodes))
            assert (result["CPU"], result.get("GPU", 0)) == max(valid)
        else:
            with pytest.raises(InputError, match=f"runtime.workers {workers} with "):
                worker_resources(ray_runtime(**expected), ray_nodes(nodes))


def test_a_replica_reports_smaller_batches_with_the_values_that_came_of_them():
    """And cuts tasks to the batches that the other workers have come down to."""

    class Small(Engine):
        def score(self, task, rows):
            if len(task.span) > 2:
                raise torch.OutOfMemoryError("out of memory")
            yield from super().score(task, rows)

    rows, masks = [[1, 2, 3, 4]] * 4, tuple(frozenset({block}) for block in all_blocks(1))
    replica = Replica(Path("model"), "float64", Runtime(), False)
    replica._engine = Small(tiny_model(layers=1), 16)
    reported = list(replica.run([Task(range(4), masks)], rows, 16))
    assert [(unit.span, tokens) for unit, tokens in reported] == [
        (span, 8) for span in (range(2), range(2), range(2, 4), range(2, 4))
    ]
    smaller = replica.run([Task(range(2), masks)], rows, 4)
    assert [len(unit.span) for unit, _ in smaller] == [1] * 4
