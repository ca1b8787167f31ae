"""The engine against full forward passes of the masked model, one row and one mask at a time."""

import pytest
import torch

from blockpruner.core.blocks import DENSE, all_blocks, parse_mask
from blockpruner.core.errors import NonFiniteLossError
from blockpruner.model.models import masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task
from tests.tiny import full_nll, tiny_model, tolerance


def make_rows(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 257, (length,), generator=generator).tolist() for length in lengths]


def sweep(base=DENSE, layers=4):
    return [base, *(base | {block} for block in all_blocks(layers) if block not in base)]


def score_all(engine, masks, rows):
    found = {}
    tasks = [Task(span, tuple(masks)) for span in engine.row_batches(rows, range(len(rows)))]
    for unit in engine.run(tasks, rows):
        for offset, value in enumerate(unit.loss):
            key = (unit.mask, unit.start + offset)
            assert key not in found, "a (mask, row) was scored twice"
            found[key] = value
    assert len(found) == len(set(masks)) * len(rows)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("lengths", [[16] * 5, [16, 3, 9, 12, 2, 7]], ids=["even", "padded"])
@pytest.mark.parametrize("base", ["", "mha.1,mlp.3"])
def test_equals_full_forwards(family, lengths, base):
    """Of all variants: test_engine_properties.py, and test_streaming.py for whole sweeps."""
    model, rows = tiny_model(family), make_rows(lengths)
    masks = sweep(parse_mask(base))
    found = score_all(Engine(model, batch_tokens=40), masks, rows)
    for mask in masks:
        with masked(model, mask):
            for index, row in enumerate(rows):
                assert found[mask, index] == pytest.approx(full_nll(model, row), abs=tolerance(family))


def test_model_is_left_as_it_was():
    model, rows = tiny_model("qwen2"), make_rows([8])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(torch.tensor(rows)).logits
    score_all(Engine(model), sweep(), rows)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(torch.tensor(rows)).logits, logits)


def test_row_batches_keep_to_the_token_budget():
    engine = Engine(tiny_model(), batch_tokens=20)
    rows = make_rows([5, 5, 9, 9, 30, 2])
    batches = engine.row_batches(rows, range(len(rows)))
    assert [i for batch in batches for i in batch] == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or max(len(rows[i]) for i in batch) * len(batch) <= 20
    assert batches == [range(0, 2), range(2, 4), range(4, 5), range(5, 6)]


def test_nan_names_mask_and_row():
    model, rows = tiny_model(), [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [200, 13, 14, 15, 16, 17]]
    model.model.embed_tokens.weight[rows[2][0]] = float("nan")
    engine = Engine(model, batch_tokens=6)
    mask = parse_mask("mlp.1")
    units = []
    with pytest.raises(NonFiniteLossError, match=r"row 2 is nan with mask mlp\.1.*float32"):
        units.extend(engine.run([Task(span, (mask,)) for span in engine.row_batches(rows, range(3))], rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near(dtype):
    rows = make_rows([12, 12])
    exact = score_all(Engine(tiny_model()), sweep(), rows)
    model = tiny_model().to(dtype)
    found = score_all(Engine(model), sweep(), rows)
    tolerance = 1e-4 if dtype is torch.float32 else 0.35
    assert found == pytest.approx(exact, abs=tolerance)
