"""Properties of the engine, over whatever tasks a search may ask for: each (mask, row) once, and
equal to one plain forward pass of the masked model in float64; no more work than masks that share
nothing need; and the same after running out of memory anywhere.

Depths, masks, rows, batches and failures are drawn by hypothesis. Models and brute-force values are
kept, since they are the same in all examples of a variant and a depth.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.core.blocks import BlockId, BlockKind, Mask, all_blocks
from blockpruner.core.errors import DeviceMemoryError
from blockpruner.model.models import decoder_layers, masked, model_family
from blockpruner.scoring import engine as engine_module
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import ScoredRows, Task
from tests.oracles import CrampedEngine, model_of
from tests.tiny import GRID, VARIANTS, VOCABULARY, full_nll, tiny_model, tolerance

Row = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """What is asked of an engine; of the k-th batch, all masks but k, so that tasks differ in their
    masks too."""

    variant: str
    layers: int
    rows: list[Row]
    span: range
    masks: list[Mask]
    batch_tokens: int

    def tasks(self, engine: Engine) -> list[Task]:
        batches = engine.row_batches(self.rows, self.span)
        return [
            Task(batch, tuple(self.masks[k % len(self.masks) :])) for k, batch in enumerate(batches)
        ]


@st.composite
def row_lists(draw: st.DrawFn, fewest: int) -> list[Row]:
    """Rows of 2 to 16 tokens, equally long or not; the pad's and the end's ids are tokens like
    others."""
    count = draw(st.integers(fewest, 6))
    item, several = (
        st.integers(2, 16).map(lambda n: [n] * count),
        st.lists(st.integers(2, 16), min_size=count),
    )
    lengths = draw(st.one_of(item, several))[:count]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    return [
        tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())
        for length in lengths
    ]


@st.composite
def mask_lists(draw: st.DrawFn, layers: int, fewest: int) -> list[Mask]:
    """Distinct masks: sets that have nothing to do with each other, or a base and any of its
    candidates."""
    blocks = all_blocks(layers)
    masks = st.frozensets(st.sampled_from(blocks))
    pool = st.lists(masks, min_size=fewest, max_size=6, unique=True)
    sweep = st.tuples(
        masks, st.lists(st.sampled_from(blocks), min_size=fewest - 1, max_size=6)
    ).map(
        lambda drawn: list(dict.fromkeys([drawn[0], *(drawn[0] | {block} for block in drawn[1])]))
    )
    return draw(st.one_of(pool, sweep))


@st.composite
def cases(draw: st.DrawFn, fewest: int = 1, batch_tokens: int = 2) -> Case:
    layers, rows = draw(st.integers(1, 4)), draw(row_lists(fewest))
    span = range(draw(st.integers(0, min(1, len(rows) - 1))), len(rows))
    return Case(
        draw(st.sampled_from(VARIANTS)),
        layers,
        rows,
        span,
        draw(mask_lists(layers, fewest)),
        draw(st.integers(batch_tokens, 100)),
    )


@cache
def brute_force(variant: str, layers: int, mask: Mask, row: Row) -> float:
    with masked(model_of(variant, layers), mask) as model:
        return full_nll(model, row)


def assert_once_and_exact(case: Case, units: list[ScoredRows], tasks: list[Task]) -> None:
    result = [
        ((unit.mask, unit.span[offset]), value)
        for unit in units
        for offset, value in enumerate(unit.loss)
    ]
    keys = [key for key, _ in result]
    assert len(keys) == len(set(keys)), "a (mask, row) was scored twice"
    assert set(keys) == {(mask, row) for task in tasks for mask in task.masks for row in task.span}
    for (mask, row), value in result:
        expected = brute_force(case.variant, case.layers, mask, case.rows[row])
        assert value == pytest.approx(expected, rel=0, abs=tolerance(case.variant))


def least_work(case: Case, task: Task) -> int:
    """Block forwards that no scheme can share: a block's input depends on which of the blocks
    before it are left.

    Before an MLP is its layer's MHA, unless both read the layer's input.
    """
    parallel = case.variant == "gpt_neox"

    def before(block: BlockId, mask: Mask) -> Mask:
        mha = (
            {BlockId(BlockKind.MHA, block.layer)}
            if block.kind is BlockKind.MLP and not parallel
            else set()
        )
        return frozenset(b for b in mask if b.layer < block.layer or b in mha)

    kept = [
        (mask, block)
        for mask in task.masks
        for block in all_blocks(case.layers)
        if block not in mask
    ]
    return len({(before(block, mask), block) for mask, block in kept})


class Stream:
    """A stream of a device: the log has when losses were launched (>) and when they were waited for
    (<)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def record_event(self) -> SimpleNamespace:
        number = sum(kind == ">" for kind, _ in self.log)
        self.log.append((">", number))
        return SimpleNamespace(synchronize=lambda: self.log.append(("<", number)))


@contextmanager
def as_on_a_gpu(engine: Engine) -> Iterator[Stream]:
    """The engine takes the ways that it takes on a GPU; its tensors are on the CPU."""
    engine._on_gpu, stream = True, Stream()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module.accelerator, "mark", lambda device: stream.record_event())
        yield stream


@settings(max_examples=150)
@given(case=cases(), logit_tokens=st.integers(0, 40), wide=st.integers(0, 100))
def test_every_mask_and_row_once_exactly_and_with_the_least_work(
    case: Case, logit_tokens: int, wide: int
):
    engine = Engine(model_of(case.variant, case.layers), case.batch_tokens)
    tasks, calls, forward = case.tasks(engine), [], engine.run_block
    assert [row for task in tasks for row in task.span] == list(case.span)
    for task in tasks:
        padded = len(task.span) * max(len(case.rows[row]) for row in task.span)
        assert len(task.span) == 1 or padded <= case.batch_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blockpruner.scoring.work.LOGITS_BYTES", logit_tokens * VOCABULARY * 4)
        patch.setattr(
            engine, "_width", lambda tokens: max(1, min(wide, case.batch_tokens) // tokens)
        )
        patch.setattr(
            engine, "run_block", lambda *args: calls.append(len(args[1])) or forward(*args)
        )
        units = list(engine.run(tasks, case.rows))
    assert_once_and_exact(case, units, tasks)
    assert sum(calls) == sum(least_work(case, task) * len(task.span) for task in tasks)


@settings(max_examples=75)
@given(case=cases(), wide=st.integers(0, 100))
def test_the_ways_of_a_gpu_give_the_same_values(case: Case, wide: int):
    """All calls of a block have one shape. Losses are waited for once the next ones are
    launched."""
    engine, shapes = Engine(model_of(case.variant, case.layers), case.batch_tokens), {}
    tasks, forward = case.tasks(engine), engine.run_block
    with as_on_a_gpu(engine) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "WIDE_NUMBERS", wide * 32)
        for task in tasks:
            shapes[task] = set()
            patch.setattr(
                engine,
                "run_block",
                lambda *args, to=shapes[task]: to.add(args[1].shape) or forward(*args),
            )
            stream.log.clear()
            units = list(engine.run([task], case.rows))
            assert_once_and_exact(case, units, [task])
            count = len(units)
            late = [entry for n in range(count) for entry in ((">", n), ("<", n - 1))] + [
                ("<", count - 1)
            ]
            assert stream.log == [entry for entry in late if entry[1] >= 0]
    for task, result in shapes.items():
        longest = max(len(case.rows[row]) for row in task.span)
        width = max(1, min(wide, case.batch_tokens) // (len(task.span) * longest))
        assert result <= {(width * len(task.span), longest, 32)}


@settings(max_examples=75)
@given(
    case=cases(fewest=3, batch_tokens=40),
    fitting=st.integers(1, 2),
    lucky_calls=st.lists(st.integers(0, 20)),
    late=st.booleans(),
)
def test_out_of_memory_anywhere_halves_the_batch_and_loses_nothing(
    case: Case, fitting: int, lucky_calls: list[int], late: bool
):
    """Of the calls with too large a batch, `lucky_calls` pass before each failure; after those,
    none does. What was launched before a failure is read after it."""
    luck = [passes for calls in lucky_calls for passes in [True] * calls + [False]]
    engine = CrampedEngine(
        model_of(case.variant, case.layers), case.batch_tokens, rows=fitting, luck=luck
    )
    tasks = case.tasks(engine)
    with as_on_a_gpu(engine) if late else nullcontext():
        units = list(engine.run(tasks, case.rows))
    assert_once_and_exact(case, units, tasks)
    assert engine.losses == len(units), "a finished loss was thrown away"

    failures = [
        number for number, (task, done) in enumerate(engine.walks) if set(done) != set(task.masks)
    ]
    for number in failures:
        task, done = engine.walks[number]
        remaining = {mask for mask in task.masks if mask not in done}
        later = [
            (again, budget) for (again, _), budget in zip(engine.walks, engine.budgets, strict=True)
        ][number + 1 :]
        assert {
            row for again, _ in later if remaining == set(again.masks) for row in again.span
        } >= set(task.span)
        for again, budget in later:
            assert (
                len(again.span) == 1
                or len(again.span) * max(len(case.rows[i]) for i in again.span) <= budget
            )
        longest = max(len(case.rows[row]) for row in task.span)
        for batch in engine.row_batches([case.rows[0][:1] * longest] * 8, range(8)):
            assert len(batch) <= max(1, len(task.span) // 2), (
                "batches asked for later are no smaller"
            )


@settings(max_examples=75)
@given(case=cases(), giant=st.integers(0, 5))
def test_one_row_that_does_not_fit_is_named_and_all_before_it_are_finished(case: Case, giant: int):
    at = case.span.start + giant % len(case.span)
    case = replace(case, rows=[*case.rows[:at], tuple(range(17 + giant)), *case.rows[at + 1 :]])
    engine = CrampedEngine(model_of(case.variant, case.layers), case.batch_tokens, tokens=16)
    units, tasks = (
        [],
        [Task(batch, tuple(case.masks)) for batch in engine.row_batches(case.rows, case.span)],
    )
    with pytest.raises(
        DeviceMemoryError, match=rf"^one row of {17 + giant} tokens .*\(CUDA out of memory\)"
    ):
        units.extend(engine.run(tasks, case.rows))
    assert_once_and_exact(case, units, [Task(range(case.span.start, at), tuple(case.masks))])


def test_masks_go_one_by_one_before_a_batch_is_halved():
    class Narrow(CrampedEngine):
        _width = Engine._width

    rows = [(1, 2, 3, 4) * 8]
    engine = Narrow(model_of("llama", 2), 100, rows=1)
    case = Case("llama", 2, rows, range(1), [frozenset({block}) for block in all_blocks(2)], 100)
    tasks = case.tasks(engine)
    with as_on_a_gpu(engine):
        assert engine._width(32) == 3
        assert_once_and_exact(case, list(engine.run(tasks, rows)), tasks)
        assert [task.span for task, _ in engine.walks] == [range(1)] * 2
        assert engine._width(32) == 1


@pytest.mark.parametrize("variant", GRID)
def test_a_model_that_accelerate_dispatched(variant: str):
    """As over several devices: hooks around every module move what enters it, and the layers'
    `forward` is theirs.

    The device is the CPU everywhere, so that this shows the hooks to be kept and harmless, not the
    moves themselves.
    """
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    model = tiny_model(variant, 2)
    logits = model(ids).logits
    device_map = {
        name: "cpu" for name, module in model.named_modules() if not list(module.children())
    }
    device_map |= {f"{model_family(model).layers}.{index}": "cpu" for index in range(2)}
    accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    hooks = [layer.__dict__["forward"] for layer in decoder_layers(model)]
    case = Case(variant, 2, [tuple(row) for row in ids.tolist()], range(2), all_masks(2), 9)
    engine = Engine(model, case.batch_tokens)
    tasks = case.tasks(engine)
    assert_once_and_exact(case, list(engine.run(tasks, case.rows)), tasks)
    assert [layer.__dict__["forward"] for layer in decoder_layers(model)] == hooks
    assert torch.equal(model(ids).logits, logits)


def all_masks(layers: int) -> list[Mask]:
    blocks = all_blocks(layers)
    return [
        frozenset(b for i, b in enumerate(blocks) if bits >> i & 1)
        for bits in range(2 ** len(blocks))
    ]
