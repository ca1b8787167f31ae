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


@pytest.mark.parametrize("removed", ["", "mha.1", "mlp.0,mha.2"])
def test_a_greedy_iteration_is_torchs_count(removed):
    model = tiny_model("llama", LAYERS, torch.float32)
    model.set_attn_implementation("eager")  # the counter sees its products one by one
    rows = torch.randint(model.config.vocab_size, (ROWS, LENGTH))
    base = parse_mask(removed)
    masks = [base]
    for unit in removable_units(LAYERS, "block", "all"):
        if not unit <= base:
            masks.append(base | unit)

    def rotary():
        states = torch.zeros(1, 1, model.config.hidden_size)
        model.model.rotary_emb(states, torch.arange(LENGTH)[None])

    def naive():
        for mask in masks:
            with masked(model, mask):
                model(input_ids=rows, use_cache=False)

    def walk():
        list(Engine(model).run([Task(range(ROWS), tuple(masks))], rows.tolist()))

    flops = Flops.of(model.config.to_dict(), ROWS, LENGTH)
    # The formulas leave the rotary tables out: they are no part of a block.
    rotary_flops = counted(rotary)
    assert counted(naive) - len(masks) * rotary_flops == flops.naive(masks)
    assert counted(walk) - 2 * rotary_flops == flops.exact(masks)
