"""The worst kind of text decides: which proposal is kept, and how much of a refit."""

import math
from dataclasses import replace

import pytest
import torch

from blockpruner.core.progress import SilentObserver
from blockpruner.evaluation.kinds import Loss, best_loss
from blockpruner.evaluation.perplexity import HeldOutPerplexity
from blockpruner.healing import choice
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.pipeline import require_kept
from tests.errors import refused
from tests.plans import plan_of
from tests.tiny import tiny_model

CONFIG = tiny_model().config.to_dict()
KINDS = ("prose",) * 2 + ("code",) * 2
ROWS = CalibrationSet(tuple((1, 2, 3, number) for number in range(4)), kinds=KINDS)


@pytest.fixture
def heal(monkeypatch):
    """Runs the choice on a tiny model, with losses that a test gives for each model in place of
    measured ones."""

    def run(losses, *removed, weights=None):
        dense = tiny_model(dtype=torch.float32)
        torch.nn.init.ones_(dense.model.norm.weight)
        healing = "refit" if weights else "none"
        plans = {name: plan_of(CONFIG, [name], compensate=healing) for name in removed}

        def measured(model, rows, batch=1):
            lost = losses(model)
            kinds = [KINDS[row[-1]] for row in rows]
            nll = tuple(2.0 + lost[kind] for kind in kinds)
            return HeldOutPerplexity(0.0, 0.0, len(nll), len(nll), nll)

        def compensate(model, plans, *_, **__):
            return {name: (weights or {}, {"method": "refit", "share": 1.0}) for name in plans}

        monkeypatch.setattr(choice, "measure_perplexity", measured)
        monkeypatch.setattr(choice, "compensate", compensate)
        none = CalibrationSet(())
        return choice.choose(lambda: dense, plans, none, none, ROWS, none, SilentObserver())

    return run


def size(model):
    return sum(weight.numel() for weight in model.parameters())


def test_a_proposal_that_wins_by_the_mean_and_loses_a_kind_is_not_taken(heal):
    """The models are told apart by their sizes."""
    lost = {"mha.0": {"prose": 0.0, "code": 0.3}, "mlp.0": {"prose": 0.2, "code": 0.2}}
    by_size = {plan_of(CONFIG, [name]).parameters["pruned"]: own for name, own in lost.items()}
    result = heal(lambda model: by_size.get(size(model), {"prose": 0.0, "code": 0.0}), *lost)
    judged = result.facts["judged"]
    assert judged["mha.0"]["mean"] < judged["mlp.0"]["mean"]
    assert judged["mha.0"]["kind"] == "code"
    assert result.name == "mlp.0"
    assert result.plan.kinds.keys() == {"prose", "code"}
    assert Loss.of(result.plan.kinds).worst == pytest.approx(judged["mlp.0"]["worst"])


@pytest.mark.parametrize(
    ("worse", "better", "expected"),
    [
        ({"a": 1.0, "b": 1.5}, {"a": 1.4, "b": 1.4}, "better"),
        (
            {"a": 1.4, "b": 1.42},
            {"a": 1.0, "b": 1.425},
            "better",
        ),  # a tie of the worst, and a lower mean
        ({"a": 1.0, "b": 1.41}, {"a": 1.4, "b": 1.4}, "worse"),  # the same the other way round
    ],
)
def test_the_worst_kind_decides_and_the_mean_where_it_is_level(worse, better, expected):
    assert best_loss({"worse": Loss(worse), "better": Loss(better)}) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (lambda share: -0.2 * share, 1.0),  # helps
        (
            lambda share: 4 * (share - 0.5) ** 2 + 0.1 * share - 1,
            0.5,
        ),  # helps most if half of it is kept
        (lambda share: 4 * share, 0.0),  # harms
    ],
)
def test_a_refit_that_harms_a_kind_is_scaled_or_left(heal, code, expected):
    """The refit doubles the last norm; the loss of program text follows from how much of that is
    kept."""
    dense = size(tiny_model())

    def losses(model):
        share = float(model.model.norm.weight.mean()) - 1
        if size(model) == dense:
            return {"prose": 0.0, "code": 0.0}
        return {"prose": 0.1 - 0.05 * share, "code": 1.2 + code(share)}

    result = heal(losses, "mlp.1", weights={"model.norm.weight": torch.full((32,), 2.0)})
    assert result.facts["share"] == expected
    if expected:
        assert torch.equal(result.weights["model.norm.weight"], torch.full((32,), 1 + expected))
    else:
        assert not result.weights
    assert Loss.of(result.plan.kinds).kinds["code"] == pytest.approx(math.exp(1.2 + code(expected)))


def test_a_model_that_has_lost_too_much_of_a_kind_is_refused():
    plan = plan_of(CONFIG, ["mlp.1"])
    judged = {"a": {"dense": 2.0, "after": 2.2}, "b": {"dense": 2.0, "after": 3.2}}
    plan = replace(plan, kinds=judged)
    require_kept(plan, None)
    require_kept(plan, 1.6)
    with refused("too-much-lost") as caught:
        require_kept(plan, 1.5)
    assert "worst 1.60 (b)" in str(caught.value)
    assert "--max-loss 1.60" in str(caught.value)
