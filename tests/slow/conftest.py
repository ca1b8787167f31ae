"""What the slow tests run on: SmolLM2 as the pipeline fetches it, dense, pruned and healed."""

from dataclasses import replace
from pathlib import Path

import pytest

from blockpruner.core.progress import SilentObserver
from blockpruner.healing.choice import choose, keep
from blockpruner.healing.rows import compensation_rows, training_rows
from blockpruner.healing.settings import Compensate, Train
from blockpruner.healing.train import write_trained
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.healed import find_healed
from tests.plans import SOMEONE, narrow_plan, plan_of, pruning

MODEL = Path(__file__).parents[2] / "data/models/smollm2"
TEXT = Path("data/sources/smollm2/calibration.parquet")
REMOVED = (
    "mha.5 mha.7 mha.17 mha.18 mha.22 mha.26 mha.29 mlp.14 mlp.16 mlp.17",
    (
        "mha.5 mha.7 mha.8 mha.9 mha.15 mha.16 mha.17 mha.18 mha.20 mha.22 mha.23 mha.26 mha.29"
        " mlp.6 mlp.14 mlp.15 mlp.16 mlp.17 mlp.18"
    ),
)
"""What greedy search removed of SmolLM2-135M at 10.53 % and 20.40 % of its parameters."""


def nothing_removed(plan):
    """The plan of the dense model, from one of a pruned model."""
    none = replace(
        plan,
        removed=(),
        order=(),
        ratios=(),
        ratio=0.0,
        blocks={"mha": 0, "mlp": 0},
        compensate="none",
    )
    return replace(none, parameters=dict.fromkeys(plan.parameters, plan.parameters["dense"]))


@pytest.fixture(scope="session")
def smollm2():
    assert MODEL.exists(), "fetch the model first: dvc repro fetch@smollm2"
    return MODEL


@pytest.fixture(scope="session")
def plans(smollm2):
    """The plan of the dense model, and those of `REMOVED`, by ratio."""
    found = [plan_of(smollm2, blocks.split()) for blocks in REMOVED]
    return {"dense": nothing_removed(found[0])} | {f"{plan.ratio:.2%}": plan for plan in found}


NARROWED = {f"mlp.{layer}": range(0, 1536, 2) for layer in range(8, 18)}
"""The channels that are kept of ten MLPs."""


@pytest.fixture(scope="session")
def healed(smollm2, plans, tmp_path_factory):
    """The smallest model and a narrow one, refitted, and then trained on a few rows, by name."""
    folder, texts, tokenizer = (
        tmp_path_factory.mktemp("healed"),
        read_texts(TEXT),
        load_tokenizer(smollm2),
    )
    wanted, none, made = Compensate(method="refit", num_rows=64), CalibrationSet(()), {}
    recipe = Train(
        data=SOMEONE,
        num_rows=40,
        seq_len=128,
        weights="all",
        distill=1,
        learning_rate=3e-4,
        batch=2,
        accumulation=1,
        validation=0,  # the last state is kept, be it better or not
    )
    fit, tuning = compensation_rows(texts, tokenizer, wanted, (), wanted.seq_len)
    rows, validation = training_rows(texts, tokenizer, recipe)
    smallest = max(plans.items(), key=lambda item: item[1].ratio)
    for name, plan in (smallest, ("narrow", narrow_plan(smollm2, NARROWED))):
        refit, place = pruning(smollm2, replace(plan, compensate="refit")), folder / name
        best = choose(refit.load, {"mine": refit.plan}, fit, tuning, none, none, SilentObserver())
        keep(place / "refit", best, refit, SOMEONE)
        found = find_healed([place / "refit"], refit.identity)
        assert found is not None, best.facts
        refit = made[f"{name} + refit"] = replace(refit, healed=found)
        trained = replace(refit, plan=replace(refit.plan, train=True))
        write_trained(
            place / "trained", trained, recipe, rows, validation, place / "states", SilentObserver()
        )
        found = find_healed([place / "trained"], trained.identity)
        assert found is not None and found.digest != refit.healed.digest
        made[f"{name} + refit + training"] = replace(trained, healed=found)
    return made
