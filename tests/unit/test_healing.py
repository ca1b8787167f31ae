"""The stages that heal a pruned model, and the one that exports it then."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file

from blockpruner.core.errors import InputError
from blockpruner.core.settings import HubTexts, TaskAnswers
from blockpruner.healing.compensate import Compensated
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.texts import write_texts
from blockpruner.methods.healed import save_healed
from blockpruner.params import load_run
from blockpruner.store.files import read_json, write_json
from blockpruner.store.plans import save_plan
from stages import calibrate, compensate, materialize, train
from tests.golden import unverified
from tests.integration.project import sentence
from tests.plans import SOMEONE, fetch_tiny, plan_of, pruning
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
ROWS = CalibrationSet(tuple(tuple((7 * r + 3 * k) % 250 + 1 for k in range(16)) for r in range(4)))
DENSE, OUT = Path("data/models/tiny"), "model.layers.0.mlp.down_proj.weight"


def text_of(number):
    return f"{number}: {sentence(number)}, {sentence(number + 1)}."


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder as after `compensate`, which changed nothing, in which the stage runs; returns the plan."""
    monkeypatch.chdir(tmp_path)
    fetch_tiny(tmp_path)
    Path("data/models").mkdir(parents=True)
    dense, run = Path("model").rename(DENSE), load_run("smollm2", ROOT / "runs").model_dump(mode="json")
    run["train"] = {
        "data": SOMEONE.model_dump(),
        "num_samples": 8,
        "seq_len": 20,
        "rank": 2,
        "learning_rate": 0.01,
        "validation": 4,
        "distill": 0.5,
    }
    run["export"] = ["hf"]
    run["evaluate"]["perplexity"] = {"data": run["train"]["data"], "seq_len": 20}
    run["compensate"] = {"num_rows": 24, "seq_len": 32, "validation": 0.25}
    write_json(Path("runs/tiny.yaml"), run)
    targets = {"t": {"run": "tiny", "budget": "4blocks", "train": True}}
    write_json(Path("params.yaml"), {"runs": ["tiny"], "targets": targets, "runtime": {"device": "cpu"}})
    for role, first, last in (("train", 0, 20), ("calibration", 0, 60), ("perplexity", 55, 70)):
        write_texts(Path(f"data/sources/tiny/{role}.parquet"), [text_of(i) for i in range(first, last)])
    ROWS.save(Path("data/calibration/tiny/rows.parquet"), "here")
    plan = plan_of(dense, ["mha.0", "mlp.1", "mha.2,mlp.2"], run="tiny", train=True)
    save_plan(plan, Path("data/plans/t/plan.json"))
    return plan


def exported(form):
    with unverified():
        materialize.main("t")
    out = Path("data/checkpoints/t") / form
    return load_file(out / "model.safetensors"), (out / "README.md").read_text()


def refitted():
    """The report of a plan that refitting helps; of a random model not every one is worse than the dense model."""
    save_plan(plan_of(DENSE, ["mlp.2"], run="tiny", compensate="refit"), Path("data/plans/t/plan.json"))
    compensate.main("t")
    return read_json(Path("data/compensated/t/compensate.json"))


def test_stage_compensates_and_the_export_has_the_weights(project):
    """Writers, in float32 to the bit; the rows share no text with what is evaluated."""
    facts, weights = refitted(), load_file("data/compensated/t/weights.safetensors")
    assert facts["enabled"] and facts["perplexity"]["after"] < facts["perplexity"]["before"]
    assert weights and all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in weights)
    before = load_file(DENSE / "model.safetensors")
    found, card = exported("hf")  # no layer is gone, so names are the dense model's
    assert {name for name in found if not torch.equal(before[name], found[name])} == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert re.search(r"workflow and compensated without training \(refit, [\d,]+ tokens of `.+`\)", card)


def test_calibration_sees_nothing_that_is_evaluated(project, capfd):
    """The last five of its texts are the first five of the held-out ones."""
    run = read_json(Path("runs/tiny.yaml"))
    run["calibration"] |= {"num_samples": 55, "num_rows": None, "packing": "per_sample", "score": "all"}
    write_json(Path("runs/tiny.yaml"), run)
    calibrate.main("tiny")
    rows = CalibrationSet.load(Path("data/calibration/tiny/rows.parquet")).rows
    assert sorted(map(tiny_tokenizer().decode, rows)) == sorted(map(text_of, range(55)))
    assert "5 of 60 calibration texts are evaluated too: they are not drawn" in "".join(capfd.readouterr())


def test_compensation_sees_nothing_that_is_evaluated(project):
    rows = compensate.rows_of("tiny", load_run("tiny"), ROWS)
    text = tiny_tokenizer().decode([token for row in rows.rows for token in row])
    assert {len(row) for row in rows.rows} == {32} and len(rows.rows) == 24
    drawn = [number for number in range(60) if text_of(number) in text]
    assert len(drawn) > 5 and max(drawn) < 55


def test_compensation_takes_the_texts_that_there_are(project):
    """Fewer than the run asks for; of a run that is calibrated on answers all tokens of these."""
    run = load_run("tiny")
    few = run.model_copy(update={"compensate": run.compensate.model_copy(update={"num_rows": 10_000})})
    assert 24 < len(compensate.rows_of("tiny", few, ROWS).rows) < 200
    answers = run.calibration.model_copy(update={"data": TaskAnswers(source="tasks", tasks=("piqa",))})
    given = CalibrationSet(((~5, ~6, 7), (~3, 4, 2)))
    found = compensate.rows_of("tiny", run.model_copy(update={"calibration": answers}), given)
    assert found.rows == ((5, 6, 7), (3, 4, 2))


def test_compensation_that_does_not_help_changes_nothing(project, monkeypatch):
    found = Compensated(report={"perplexity": {"dense": 1.0, "before": 2.0, "after": 2.0}})
    monkeypatch.setattr("blockpruner.healing.compensate.compensate", lambda *given: found)
    assert refitted() == {"enabled": True} | dict(found.report)
    assert [path.name for path in Path("data/compensated/t").iterdir()] == ["compensate.json"]
    before, (after, card) = load_file(DENSE / "model.safetensors"), exported("hf")
    assert all(torch.equal(after[name], before[name]) for name in after) and "and not retrained" in card


def test_stage_trains_and_every_export_has_the_weights(project):
    before, _ = exported("hf")
    train.main("t")
    out = Path("data/trained/t")
    facts, weights = json.loads((out / "train.json").read_text()), load_file(out / "weights.safetensors")
    assert facts["enabled"] and facts["rows"] == 8 and len(facts["losses"]) == 2
    assert [validation["step"] for validation in facts["validations"]] == [0, 2] and facts["step"] == 2
    linear = {name for name, weight in before.items() if weight.ndim == 2 and "_proj" in name}
    assert weights.keys() == linear and not any(torch.equal(weights[name], before[name]) for name in linear)
    after, card = exported("hf")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weights.get(name, before[name])) for name in before)
    assert (
        "workflow and then trained (LoRA, rank 2, distilled from the dense model) on 8 rows of `someone/texts`" in card
    )
    assert metadata_load("data/checkpoints/t/hf/README.md")["datasets"] == ["someone/texts"]


def test_stage_trains_what_was_compensated(project):
    """From those weights on; the file then holds the changes of both."""
    train.main("t")
    plain = load_file("data/trained/t/weights.safetensors")
    norm, of = "model.norm.weight", pruning(DENSE, project).identity
    norms = {norm: load_file(DENSE / "model.safetensors")[norm] * 2}
    save_healed(Path("data/compensated/t"), norms, of, "compensated by hand", HubTexts(source="hub", repo="some/one"))
    train.main("t")
    weights = load_file("data/trained/t/weights.safetensors")
    assert weights.keys() == {*plain, norm} and torch.equal(weights[norm], norms[norm])
    assert not torch.equal(weights[OUT], plain[OUT])
    assert not list(Path("data/adapters").iterdir())
    _, card = exported("hf")
    assert "workflow and compensated by hand, then trained (LoRA, rank 2" in card
    assert metadata_load("data/checkpoints/t/hf/README.md")["datasets"] == ["some/one", "someone/texts"]


@pytest.mark.parametrize("stage", [train, materialize])
def test_weights_of_another_plan_are_refused(project, stage):
    of = pruning(DENSE, replace(project, removed=("mha.0",))).identity
    save_healed(Path("data/compensated/t"), {OUT: torch.zeros(32, 32)}, of, "", SOMEONE)
    with pytest.raises(InputError, match="compensated/t/weights.safetensors belongs to another model, plan"):
        stage.main("t")


@pytest.mark.parametrize(("stage", "folder"), [("compensate", "compensated"), ("train", "trained")])
def test_a_stage_is_quick_when_off(project, stage, folder):
    save_plan(replace(project, train=False), Path("data/plans/t/plan.json"))
    code = f"import sys; from stages.{stage} import main; main('t'); assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})
    (path,) = Path(f"data/{folder}/t").iterdir()
    assert path.name == f"{stage}.json" and json.loads(path.read_text()) == {"enabled": False}
