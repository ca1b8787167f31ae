"""The stages that draw rows, heal a pruned model, and export it then."""

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

from blockpruner.config import dag
from blockpruner.config.params import load_run
from blockpruner.core.errors import UnreachableError
from blockpruner.core.settings import HubTexts
from blockpruner.evaluation.kinds import Loss, best_loss
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.texts import write_texts
from blockpruner.methods.healed import save_healed
from blockpruner.methods.recipes import proposals, recipe, require_reached, searches
from blockpruner.scoring.settings import Score
from blockpruner.store.files import read_json, write_json
from blockpruner.store.plans import load_plan, save_plan
from stages import calibrate, compensate, materialize, settings, train
from tests.errors import refused
from tests.fakes import unverified
from tests.integration.project import sentence
from tests.plans import SOMEONE, fetch_tiny, plan_of, pruning
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
DENSE, OUT = Path("data/models/tiny"), "model.layers.0.mlp.down_proj.weight"
RECIPE = {
    "num_samples": 8,
    "seq_len": 20,
    "rank": 2,
    "learning_rate": 0.01,
    "validation": 4,
    "distill": 0.5,
}


def text_of(number):
    return f"{number}: {sentence(number)}, {sentence(number + 1)}."


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder as after `commit`, in which the stages run; returns the plan."""
    monkeypatch.chdir(tmp_path)
    fetch_tiny(tmp_path)
    Path("data/models").mkdir(parents=True)
    dense, run = (
        Path("model").rename(DENSE),
        load_run("smollm2", ROOT / "runs").model_dump(mode="json"),
    )
    run |= {"train": {"data": SOMEONE.model_dump(), **RECIPE}, "export": ["hf"]}
    run["score"] = {"method": "recommended"}
    run["evaluate"]["perplexity"] = {"data": run["train"]["data"], "seq_len": 20}
    run["compensate"] = {"num_rows": 24, "seq_len": 32, "validation": 0.25}
    run["calibration"] |= {
        "num_samples": 40,
        "num_rows": None,
        "packing": "per_sample",
        "score": "all",
        "seq_len": 99,
    }
    write_json(Path("runs/tiny.yaml"), run)
    targets = {"t": {"run": "tiny", "budget": "4blocks", "train": True}}
    write_json(
        Path("params.yaml"), {"runs": ["tiny"], "targets": targets, "runtime": {"device": "cpu"}}
    )
    for role, first, last in (
        ("train", 0, 20),
        ("calibration", 0, 60),
        ("perplexity", 55, 70),
        ("judge", 70, 90),
    ):
        write_texts(
            Path(f"data/sources/tiny/{role}.parquet"), [text_of(i) for i in range(first, last)]
        )
    dag.write()
    settings.main("tiny")
    calibrate.main("tiny")
    plan = plan_of(dense, ["mha.0", "mlp.1", "mha.2,mlp.2"], run="tiny", train=True)
    kept(plan)
    return plan


def kept(plan):
    """What the stage compensate leaves of a plan with nothing compensated."""
    save_plan(plan, Path("data/plans/t/greedy.json"))
    compensate.main("t")


def exported():
    with unverified():
        materialize.main("t")
    out = Path("data/checkpoints/t/hf")
    return load_file(out / "model.safetensors"), (out / "README.md").read_text()


def test_rows_share_no_text_with_what_evaluates_or_judges(project):
    """The last five of the calibration texts are the first five of the held-out ones."""
    seen = {}
    for part in ("search", "fit", "tuning", "judge", "train", "validation"):
        rows = CalibrationSet.load(Path(f"data/calibration/tiny/{part}.parquet")).rows
        text = tiny_tokenizer().decode([token for row in rows for token in row])
        seen[part] = {int(number) for number in re.findall(r"(\d+): ", text)}
    assert len(seen["search"]) == 40
    assert len(seen["fit"]) > 5
    assert len(seen["train"]) == 8
    assert all(max(numbers, default=0) < 55 for numbers in seen.values())
    judge = seen.pop("judge")
    assert judge
    assert not judge & set.union(*seen.values())
    assert not seen["train"] & seen["validation"]


def test_stage_compensates_and_the_export_has_the_weights(project):
    """Writers, in float32 to the bit, of a plan that refitting helps."""
    kept(plan_of(DENSE, ["mlp.2"], run="tiny", compensate="refit"))
    facts = read_json(Path("data/compensated/t/compensate.json"))
    weights = load_file("data/compensated/t/weights.safetensors")
    assert facts["search"] == "greedy"
    assert facts["perplexity"]["after"] < facts["perplexity"]["before"]
    assert weights
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in weights)
    before = load_file(DENSE / "model.safetensors")
    result, card = exported()  # no layer is gone, so names are the dense model's
    assert {
        name for name in result if not torch.equal(before[name], result[name])
    } == weights.keys()
    assert all(torch.equal(result[name], weight) for name, weight in weights.items())
    assert re.search(
        r"workflow and compensated without training \(refit, [\d,]+ tokens of `.+`\)", card
    )


def test_the_proposal_that_judges_find_best_is_kept(project):
    other = plan_of(DENSE, ["mha.0", "mlp.0", "mlp.1", "mha.2", "mlp.3"], run="tiny")
    save_plan(other, Path("data/plans/t/other.json"))
    kept(plan_of(DENSE, ["mlp.2"], run="tiny"))
    facts = read_json(Path("data/compensated/t/compensate.json"))
    assert facts["judged"].keys() == {"greedy", "other"}
    assert facts["search"] == best_loss(
        {name: Loss({"": item["worst"]}) for name, item in facts["judged"].items()}
    )
    plan = load_plan(Path(f"data/plans/t/{facts['search']}.json"))
    assert replace(load_plan(Path("data/compensated/t/plan.json")), kinds=None) == plan


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("0.33", ["narrow", "layers"]),  # a layer is 0.1625
        ("0.65", ["layers"]),  # all four
        ("0.25", ["narrow"]),
        ("0.05", ["narrow"]),
        ("0.99", ["floating"]),
        ("4blocks", ["floating"]),
        ("0.5kv", ["floating"]),
    ],
)
def test_whole_layers_compete_where_they_come_near_the_budget(budget, expected):
    assert [
        *proposals(Score(method="recommended"), tiny_model("llama").config.to_dict(), budget)
    ] == expected


def test_the_default_takes_the_layers_of_one_pass_and_shifted_ones_are_searched():
    (alone,) = searches(Score(method="shifted")).values()
    layers = searches(Score(method="recommended"))["layers"]
    (one_pass,) = searches(Score(method="relative-magnitude-frobenius")).values()
    assert layers == one_pass
    assert (alone.unit, alone.acceleration, recipe("shifted").compensate) == (
        "shifted",
        "lazy+race",
        "refit",
    )


def test_a_mixture_loses_attentions_alone_unless_the_method_is_named():
    config, score = tiny_model("mixtral").config.to_dict(), Score(method="recommended")
    (result,) = proposals(score, config, "0.02").values()
    assert (result.candidates, result.unit, recipe("recommended").compensate) == (
        "mha",
        "block",
        "refit",
    )
    require_reached(score, config, "0.02")
    with pytest.raises(
        UnreachableError, match=r"largest reachable is 4blocks.*its experts are for expert pruning"
    ):
        require_reached(score, config, "0.4")
    require_reached(Score(method="greedy"), config, "0.4")
    require_reached(score, tiny_model("llama").config.to_dict(), "0.4")


def test_stage_trains_and_every_export_has_the_weights(project):
    before, _ = exported()
    train.main("t")
    out = Path("data/trained/t")
    facts, weights = (
        json.loads((out / "train.json").read_text()),
        load_file(out / "weights.safetensors"),
    )
    assert facts["enabled"]
    assert facts["rows"] == 8
    assert len(facts["losses"]) == 2
    assert [validation["step"] for validation in facts["validations"]] == [0, 2]
    assert facts["step"] == 2
    linear = {name for name, weight in before.items() if weight.ndim == 2 and "_proj" in name}
    assert weights.keys() == linear
    assert not any(torch.equal(weights[name], before[name]) for name in linear)
    after, card = exported()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weights.get(name, before[name])) for name in before)
    words = (
        "workflow and then trained (LoRA, rank 2, distilled from the dense model) on 8 rows of"
        " `someone/texts`"
    )
    assert words in card
    assert metadata_load("data/checkpoints/t/hf/README.md")["datasets"] == ["someone/texts"]


def test_stage_trains_what_was_compensated(project):
    """From those weights on; the file then holds the changes of both."""
    train.main("t")
    plain = load_file("data/trained/t/weights.safetensors")
    norm, of = "model.norm.weight", pruning(DENSE, project).identity
    norms = {norm: load_file(DENSE / "model.safetensors")[norm] * 2}
    save_healed(
        Path("data/compensated/t"),
        norms,
        of,
        "compensated by hand",
        HubTexts(source="hub", repo="some/one"),
    )
    train.main("t")
    weights = load_file("data/trained/t/weights.safetensors")
    assert weights.keys() == {*plain, norm}
    assert torch.equal(weights[norm], norms[norm])
    assert not torch.equal(weights[OUT], plain[OUT])
    assert not [path for path in Path("data/adapters").iterdir() if path.is_dir()]
    _, card = exported()
    assert "workflow and compensated by hand, then trained (LoRA, rank 2" in card
    assert metadata_load("data/checkpoints/t/hf/README.md")["datasets"] == [
        "some/one",
        "someone/texts",
    ]


@pytest.mark.parametrize("stage", ["compensated", "trained"])
def test_a_stage_refuses_a_model_whose_healed_weights_are_gone(project, stage):
    """They are not left out: the export would be of another model."""
    kept(plan_of(DENSE, ["mlp.2"], run="tiny", compensate="refit", train=stage == "trained"))
    train.main("t")
    Path(f"data/{stage}/t/weights.safetensors").unlink()
    with refused("lost-weights"):
        materialize.main("t")


def test_training_is_quick_when_off(project):
    kept(replace(project, train=False))
    code = (
        "import sys; from stages.train import main; main('t'); assert 'torch' not in sys.modules,"
        " 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})
    (path,) = Path("data/trained/t").iterdir()
    assert path.name == "train.json"
    assert json.loads(path.read_text()) == {"enabled": False}
