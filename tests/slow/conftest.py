"""What the slow tests run on: SmolLM2 as the pipeline fetches it, dense, pruned and healed."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.methods import FOUND
from benchmarks.scoring import TEXT
from benchmarks.serving import nothing_removed
from blockpruner.compensation.compensate import write_compensated
from blockpruner.compensation.rows import compensation_rows
from blockpruner.core.healing_settings import Compensate, Recover
from blockpruner.core.progress import SilentObserver
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.healed import find_healed
from blockpruner.recovery.recover import write_recovered
from blockpruner.recovery.rows import training_rows
from blockpruner.store.files import read_json
from tests.plans import SOMEONE, plan_of, pruning

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


@pytest.fixture(scope="session")
def healed(smollm2, plans, tmp_path_factory):
    """The smallest model refitted, and then trained on a few rows, by name."""
    folder, texts, tokenizer = tmp_path_factory.mktemp("healed"), read_texts(TEXT), load_tokenizer(smollm2)
    name, plan = max(plans.items(), key=lambda item: item[1].ratio)
    refit = pruning(smollm2, replace(plan, compensate="refit"))
    wanted = Compensate(method="refit", num_rows=64)
    rows = compensation_rows(texts, tokenizer, wanted, (), wanted.seq_len)
    write_compensated(folder / "refit", refit, rows, wanted, SOMEONE, SilentObserver())
    found = find_healed([folder / "refit"], refit.identity)
    assert found is not None, (folder / "refit/compensate.json").read_text()
    refit = replace(refit, healed=found)
    recipe = Recover(
        data=SOMEONE, num_rows=40, seq_len=128, weights="all", distill=1, learning_rate=3e-4, batch=2, accumulation=1,
        validation=4,
    )  # fmt: skip
    trained = replace(refit, plan=replace(refit.plan, recover=True))
    rows, validation = training_rows(texts, tokenizer, recipe)
    write_recovered(folder / "trained", trained, recipe, rows, validation, folder / "states", SilentObserver())
    found = find_healed([folder / "trained"], trained.identity)
    assert found is not None and read_json(folder / "trained/recover.json")["step"] > 0
    return {f"{name} + refit": refit, f"{name} + refit + training": replace(trained, healed=found)}
