"""What a study varies: every search by name, one factor changed at a time."""

from pathlib import Path

import pytest
import yaml

from blockpruner.core.errors import InputError
from blockpruner.core.settings import Run
from blockpruner.methods.registry import check_score
from blockpruner.paper.experiments import METHODS, variants
from blockpruner.params import load_run, load_set

ROOT = Path(__file__).parents[2]
SETS = yaml.safe_load((ROOT / "runs" / "sets.yaml").read_text())


def run_with(study, score=None):
    values = load_run("smollm2-paper", ROOT / "runs").model_dump()
    nothing = {"curve": [], "partial": [], "seeds": [], "calibrations": {}}
    values["study"] = {"main": {"block": "0.2", "layer": "0.3"}, "sensitivity": "0.1", **nothing} | study
    return Run.model_validate(values | ({"score": score} if score else {}))


@pytest.mark.parametrize("name", SETS)
def test_every_search_of_the_shipped_sets_is_valid_and_named_once(name):
    for run in load_set(name, ROOT / "runs" / "sets.yaml").values():
        found = variants(run)
        assert len({v.name for v in found}) == len({v.slug for v in found}) == len(found)
        for variant in found:
            check_score(variant.score)
            assert variant.budgets and len(set(variant.budgets)) == len(variant.budgets)
            assert variant.main is None or variant.main in variant.budgets
            assert set(variant.timed) <= set(variant.budgets)


def test_the_paper_set_is_the_eight_models_of_the_paper():
    parts = [SETS[name] for name in ("llama2-7b", "llama2-13b", "baichuan2", "qwen1.5", "newer")]
    assert SETS["paper"] == [run for part in parts for run in part]


def test_what_each_part_of_a_study_asks_of_a_method():
    study = {
        "main": {"block": "0.2", "layer": "0.3", "width": None}, "metric": ["0.11"], "curve": ["0.12"],
        "partial": ["0.13"], "high": [{"block": "0.4", "layer": "0.5"}], "sensitivity": "0.1",
    }  # fmt: skip
    found = {v.name: v for v in variants(run_with(study))}
    assert set(found) == set(METHODS) - {"SliceGPT"}  # its kind of budget is not given
    assert found["BlockPruner"].budgets == ("0.2", "0.11", "0.13", "0.12", "0.4", "0.1")
    assert found["ShortGPT"].budgets == ("0.3", "0.12")
    assert found["greedy layers (SLEB)"].budgets == ("0.3", "0.5")
    assert found["BlockPruner by JS"].budgets == ("0.11",)
    assert found["MHA only"].budgets == ("0.13",) == found["MHA only"].timed
    assert [v.main for v in found.values() if v.method in ("BlockPruner", "ShortGPT", "MHA only")] == [
        "0.2",
        "0.3",
        None,
    ]


def test_one_factor_is_changed_at_a_time():
    study = {
        "methods": ["BlockPruner", "ShortGPT", "LaCo"], "seeds": [43], "calibrations": {"few": {"num_samples": 3}},
        "samples": {"LaCo": 5}, "options": {"LaCo": {"count": 2}},
    }  # fmt: skip
    run = run_with(study)
    found = {v.name: v for v in variants(run)}
    base = found["BlockPruner"]
    assert list(found) == [
        "BlockPruner",
        "LaCo",
        "ShortGPT",
        "BlockPruner, seed 43",
        "ShortGPT, seed 43",
        "BlockPruner, few",
    ]
    assert base.calibration == run.calibration and base.score == run.score
    for name, change in (("BlockPruner, seed 43", {"seed": 43}), ("BlockPruner, few", {"num_samples": 3})):
        assert found[name].calibration == run.calibration.model_copy(update=change)
        assert found[name].score == base.score
    assert found["BlockPruner, few"].budgets == ("0.1",) and found["BlockPruner, seed 43"].budgets == ("0.2",)
    assert found["LaCo"].calibration.num_samples == 5 and dict(found["LaCo"].score.options) == {"count": 2}


def test_acceleration_is_left_to_the_searches_that_have_steps_to_leave_out():
    found = {v.name: v.score.acceleration for v in variants(run_with({}, {"acceleration": "lazy+race"}))}
    slow = {name for name, acceleration in found.items() if acceleration == "none"}
    assert {name for name, a in found.items() if a == "lazy+race"} == {
        "BlockPruner", "greedy layers (SLEB)"
    }  # fmt: skip
    assert {"ShortGPT", "LaCo", "random", "one-shot perplexity", "BlockPruner by BI"} <= slow | {"BlockPruner by BI"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["BlockPruner", "magic"]}, "study names the method 'magic', which is unknown; valid: BlockPruner"),
        ({"samples": {"magic": 3}}, "study names the method 'magic'"),
    ],
)
def test_an_unknown_method_is_named(change, message):
    with pytest.raises(InputError, match=message):
        variants(run_with(change))


def test_a_run_without_a_study_is_refused(tmp_path):
    with pytest.raises(InputError, match="no study section"):
        variants(load_run("smollm2", ROOT / "runs"))
    (tmp_path / "smollm2.yaml").write_text("model: {source: hub, repo: a/b}")
    (tmp_path / "sets.yaml").write_text("mine: [smollm2]\n")
    with pytest.raises(InputError, match="set 'mine' names 'smollm2', and runs/smollm2.yaml has no study section"):
        load_set("mine", tmp_path / "sets.yaml")
    with pytest.raises(InputError, match="set 'yours' is unknown; valid: mine"):
        load_set("yours", tmp_path / "sets.yaml")
