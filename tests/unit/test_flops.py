"""The FLOP formulas of the benchmarks against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import Flops
from blockpruner.core.blocks import parse_mask, removable_units
from blockpruner.model.models import masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task
from tests.tiny import tiny_model

ROWS, LENGTH, LAYERS = 3, 16, 3


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("base", ["", "mha.1", "mlp.0,mha.2"])
def test_a_greedy_iteration_is_torchs_count(base):
    model = tiny_model("llama", LAYERS, torch.float32)
    model.set_attn_implementation("eager")  # whose products the counter sees one by one
    rows = torch.randint(model.config.vocab_size, (ROWS, LENGTH)).tolist()
    removed = parse_mask(base)
    units = [unit for unit in removable_units(LAYERS, "block", "all") if not unit <= removed]
    masks = [removed, *(removed | unit for unit in units)]
    flops = Flops.of(model.config.to_dict(), ROWS, LENGTH)
    states, positions = torch.zeros(1, 1, model.config.hidden_size), torch.arange(LENGTH)[None]
    rotary = counted(lambda: model.model.rotary_emb(states, positions))  # no part of a block

    def naive():
        for mask in masks:
            with masked(model, mask):
                model(input_ids=torch.tensor(rows), use_cache=False)

    assert counted(naive) - len(masks) * rotary == flops.naive(masks)
    engine = Engine(model)
    walk = counted(lambda: list(engine.run([Task(range(ROWS), tuple(masks))], rows)))
    assert walk - 2 * rotary == flops.exact(masks)
