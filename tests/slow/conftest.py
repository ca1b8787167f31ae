"""What the slow tests run on: SmolLM2 as the pipeline fetches it, dense and pruned."""

from pathlib import Path

import pytest

from benchmarks.methods import FOUND
from benchmarks.serving import nothing_removed
from blockpruner.store.files import read_json
from tests.plans import plan_of

MODEL = Path(__file__).parents[2] / "data/models/smollm2"


@pytest.fixture(scope="session")
def smollm2():
    assert MODEL.exists(), "fetch the model first: dvc repro fetch@smollm2"
    return MODEL


@pytest.fixture(scope="session")
def plans(smollm2):
    """Of the dense model, and BlockPruner's at about 10 and 20 % in benchmarks/methods.json, by ratio."""
    found = [plan_of(smollm2, record["what"]["removed"]) for record in read_json(FOUND)["methods"]["BlockPruner"]]
    return {"dense": nothing_removed(found[0])} | {f"{plan.ratio:.2%}": plan for plan in found}
