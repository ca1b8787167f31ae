"""The FLOP formulas of the benchmarks against torch's own counter, around full forward passes and around the engine."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Flops
from benchmarks.shapes import random_model, random_rows
from blockpruner.blocks import DENSE, all_blocks, parse_mask
from blockpruner.models import masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task

ROWS, LENGTH = 3, 16


@pytest.fixture(scope="module")
def model():
    built = random_model("tiny", torch.float32)
    built.set_attn_implementation("eager")  # whose products the counter sees one by one
    return built


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("base", ["", "mha.1", "mlp.0,mha.2"])
def test_formulas_equal_torchs_count(model, base):
    removed = parse_mask(base)
    masks = [removed, *(removed | {block} for block in all_blocks(3) if block not in removed)]
    rows = random_rows(500, ROWS, LENGTH)
    flops = Flops(model.config, ROWS, LENGTH)

    def naive():
        for mask in masks:
            with masked(model, mask):
                model(input_ids=torch.tensor(rows), use_cache=False)

    rotary = counted(lambda: model.model.rotary_emb(torch.zeros(1, 1, 64), torch.arange(LENGTH)[None]))
    assert counted(naive) - rotary * len(masks) == flops.naive(masks)
    engine = Engine(model)
    walk = counted(lambda: list(engine.run([Task(range(ROWS), tuple(masks))], rows)))
    assert walk - rotary == flops.exact(masks)


def test_a_sweep_is_n_plus_half_n_squared():
    config = random_model("tiny", torch.float32).config
    flops = Flops(config, ROWS, LENGTH)
    flops.block = dict.fromkeys(flops.block, 1)
    flops.head = 0
    for n in range(1, 7):
        removed = frozenset(all_blocks(3)[: 6 - n])
        masks = [removed | {block} for block in all_blocks(3) if block not in removed]
        assert flops.exact([removed, *masks]) == n + n * (n - 1) // 2
    assert flops.exact([DENSE]) == 6
