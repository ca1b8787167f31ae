"""The engine against full forward passes of the masked model, one row and one mask at a time."""

import pytest
import torch

from blockpruner.core.blocks import DENSE, all_blocks, parse_mask
from blockpruner.core.errors import NonFiniteLossError
from blockpruner.core.families import FAMILIES
from blockpruner.model.models import masked
from blockpruner.scoring import engine as engine_module
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


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("lengths", [[16] * 5, [16, 3, 9, 12, 2, 7]], ids=["even", "padded"])
@pytest.mark.parametrize("base", ["", "mha.1,mlp.3"])
def test_equals_full_forwards(family, lengths, base):
    model, rows = tiny_model(family), make_rows(lengths)
    masks = sweep(parse_mask(base))
    found = score_all(Engine(model, batch_tokens=40), masks, rows)
    for mask in masks:
        with masked(model, mask):
            for index, row in enumerate(rows):
                assert found[mask, index] == pytest.approx(full_nll(model, row), abs=tolerance(family))


def test_masks_without_a_common_base():
    """A pool as a beam or an evolutionary search asks for: the walk branches where masks part, wherever that is."""
    model, rows = tiny_model(), make_rows([10, 10])
    masks = [parse_mask(m) for m in ("", "mha.0,mlp.3", "mha.0,mlp.2,mlp.3", "mlp.0", "mha.3", "mha.0,mha.1,mha.2")]
    found = score_all(Engine(model), masks, rows)
    for mask in masks:
        with masked(model, mask):
            assert found[mask, 1] == pytest.approx(full_nll(model, rows[1]), abs=1e-10)


def test_work_is_the_prefix_shared_minimum(monkeypatch):
    """n + n(n-1)/2 block forwards for a sweep with its base over n live blocks (the module docstring's formula)."""
    model, rows = tiny_model(), make_rows([8])
    engine, calls = Engine(model), []
    block = engine._block
    monkeypatch.setattr(engine, "_block", lambda *args: calls.append(args[0]) or block(*args))
    base = parse_mask("mha.2")
    score_all(engine, sweep(base), rows)
    n = 8 - len(base)
    assert len(calls) == n + n * (n - 1) // 2


def test_loss_in_chunks(monkeypatch):
    model, rows = tiny_model(), make_rows([16, 9])
    whole = score_all(Engine(model), [DENSE], rows)
    monkeypatch.setattr(engine_module, "LOGITS_BYTES", 5 * 260 * 4)  # five tokens at a time
    chunked = score_all(Engine(model), [DENSE], rows)
    assert chunked == pytest.approx(whole, abs=1e-12)


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
