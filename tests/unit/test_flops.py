"""The FLOP formulas against torch's own counter, around full forward passes and around the engine."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.shapes import random_rows
from blockpruner.core.blocks import DENSE, all_blocks, parse_mask, removable_units
from blockpruner.core.errors import InputError
from blockpruner.core.settings import Train
from blockpruner.healing.loss import TrainingLoss
from blockpruner.healing.weights import trained_weights_
from blockpruner.model.models import masked
from blockpruner.paper.flops import Flops
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task
from tests.tiny import VARIANTS, tiny_model

ROWS, LENGTH, LAYERS = 3, 16, 3
SEQUENTIAL = [name for name in VARIANTS if name != "gpt_neox"]


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Counter(TorchDispatchMode):
    """torch's formulas without its hooks on modules, which do not bear a loss that is differentiated in pieces."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def tiny(family):
    model = tiny_model(family, LAYERS, torch.float32)
    model.set_attn_implementation("eager")  # whose products the counter sees one by one
    return model, random_rows(model.config.vocab_size, ROWS, LENGTH)


def tables(model):
    """Products of the rotary tables, once in a pass: no part of a block."""
    names = ("model.rotary_emb", "gpt_neox.rotary_emb")
    rotary = [module for name, module in model.named_modules() if name in names]
    if not rotary:
        return 0
    states, positions = torch.zeros(1, 1, model.config.hidden_size), torch.arange(LENGTH)[None]
    types = set(getattr(model.config, "layer_types", None) or [None])
    if model.config.model_type == "gemma3_text":
        return sum(counted(lambda kind=kind: rotary[0](states, positions, kind)) for kind in types)
    return counted(lambda: rotary[0](states, positions))


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_a_forward_pass_is_torchs_count(family):
    model, rows = tiny(family)
    found = counted(lambda: model(input_ids=torch.tensor(rows), use_cache=False)) - tables(model)
    assert found == Flops.of(model.config.to_dict(), ROWS, LENGTH).naive([DENSE])


@pytest.mark.parametrize("base", ["", "mha.1", "mlp.0,mha.2"])
def test_a_greedy_iteration_is_torchs_count(base):
    model, rows = tiny("llama")
    removed = parse_mask(base)
    units = [unit for unit in removable_units(LAYERS, "block", "all") if not unit <= removed]
    masks = [removed, *(removed | unit for unit in units)]
    flops = Flops.of(model.config.to_dict(), ROWS, LENGTH)

    def naive():
        for mask in masks:
            with masked(model, mask):
                model(input_ids=torch.tensor(rows), use_cache=False)

    assert counted(naive) - tables(model) * len(masks) == flops.naive(masks)
    engine = Engine(model)
    walk = counted(lambda: list(engine.run([Task(range(ROWS), tuple(masks))], rows)))
    assert walk - 2 * tables(model) == flops.exact(masks) == flops.sweep(removed, units, with_base=True)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("unit", "candidates"), [("block", "all"), ("block", "mha"), ("block", "mlp"), ("layer", "all")]
)
def test_a_sweep_is_the_walk_over_its_masks(unit, candidates, with_base):
    flops = Flops.of(tiny("llama")[0].config.to_dict(), ROWS, LENGTH)
    units = removable_units(LAYERS, unit, candidates)
    for count in range(len(units)):
        removed, left = DENSE.union(*units[1 : count + 1]), units[:1] + units[count + 1 :]
        masks = [removed] * with_base + [removed | one for one in left]
        assert flops.sweep(removed, left, with_base) == flops.exact(masks)


def test_a_sweep_is_n_plus_half_n_squared():
    flops = Flops.of(tiny("llama")[0].config.to_dict(), ROWS, LENGTH)
    flops = replace(flops, blocks=dict.fromkeys(flops.blocks, 1), head=0)
    for n in range(1, 7):
        removed = frozenset(all_blocks(3)[: 6 - n])
        masks = [removed | {block} for block in all_blocks(3) if block not in removed]
        assert flops.exact([removed, *masks]) == n + n * (n - 1) // 2
    assert flops.exact([DENSE]) == 6


def test_blocks_side_by_side_are_refused():
    with pytest.raises(InputError, match="use_parallel_residual: false"):
        Flops.of(tiny("gpt_neox")[0].config.to_dict(), ROWS, LENGTH)


@pytest.mark.parametrize(
    ("recipe", "error"),
    [({"weights": "all", "distill": 0.5}, 0.03), ({}, 0.1)],
)
def test_training_is_about_torchs_count(recipe, error):
    """Adapters are left out."""
    model, rows = tiny("llama")
    wanted = Train(**{"rank": 1, **recipe})
    expected = Flops.of(model.config.to_dict(), ROWS, LENGTH).training(DENSE, wanted)
    teacher, _ = tiny("llama") if wanted.distill else (None, None)
    weights = trained_weights_(model, wanted)
    objective = TrainingLoss(model, teacher, wanted)
    with Counter() as counter:
        objective(torch.tensor(rows), torch.tensor([len(row) for row in rows]), 1)[0].backward()
    weights.end_()
    assert counter.total - (1 + bool(wanted.distill)) * tables(model) == pytest.approx(expected, rel=error)
