"""What a study varies: every search by name, one factor changed at a time."""

from pathlib import Path

import pytest
import yaml

from blockpruner.core.errors import InputError
from blockpruner.core.settings import read_settings
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.methods.registry import check_score
from blockpruner.paper.estimates import calibration_rows
from blockpruner.paper.experiments import METHODS, variants
from blockpruner.params import load_run, load_set
from blockpruner.settings import Run, resolve
from blockpruner.study import Study
from stages.report import labels

ROOT = Path(__file__).parents[2]
SETS = yaml.safe_load((ROOT / "runs" / "sets.yaml").read_text())


def run_with(study, score=None):
    values = load_run("smollm2-paper", ROOT / "runs").model_dump()
    nothing = {"curve": [], "partial": [], "seeds": [], "calibrations": {}}
    values["study"] = {"main": {"block": "0.2", "layer": "0.3"}, "sensitivity": "0.1", **nothing} | study
    return Run.model_validate(values | ({"score": score} if score else {}))


def searches(study, score=None):
    return {v.slug: v for v in variants(run_with(study, score))}


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
        "main": {"block": "0.2", "layer": "0.3", "width": None}, "metric": ["0.11"], "js": ["0.14"], "curve": ["0.12"],
        "race": {"block": "0.21", "layer": "0.31"}, "partial": ["0.13"],
        "high": [{"block": "0.4", "layer": "0.5"}], "sensitivity": "0.1",
    }  # fmt: skip
    found = searches(study)
    assert list(found) == [name for name in METHODS if name != "slicegpt"]  # its kind of budget is not given
    assert [(v.method, v.name) for v in found.values()] == [(name, METHODS[name].title) for name in found]
    for name, budgets, main, timed, raced in (
        ("blockpruner", ("0.2", "0.11", "0.13", "0.12", "0.4", "0.21", "0.1"), "0.2", True, "0.21"),
        ("shortgpt", ("0.3", "0.12", "0.31"), "0.3", True, "0.31"),
        ("greedy-layers", ("0.3", "0.5"), "0.3", True, None),
        ("blockpruner-by-js", ("0.14",), None, False, None),
        ("mha-only", ("0.13",), None, True, None),
        ("blockpruner-per-parameter", ("0.2",), "0.2", True, None),
    ):
        assert (found[name].budgets, found[name].main) == (budgets, main)
        assert found[name].timed == (budgets if timed else ()) and found[name].raced == raced


def test_one_factor_is_changed_at_a_time():
    study = {
        "methods": ["blockpruner", "shortgpt", "laco"], "seeds": [43], "calibrations": {"few": {"num_samples": 3}},
        "samples": {"laco": 5}, "options": {"laco": {"count": 2}},
    }  # fmt: skip
    run, found = run_with(study), searches(study)
    base = found["blockpruner"]
    assert [(slug, v.name) for slug, v in found.items()] == [
        ("blockpruner", "BlockPruner"), ("laco", "LaCo"), ("shortgpt", "ShortGPT"),
        ("blockpruner-seed-43", "BlockPruner, seed 43"), ("shortgpt-seed-43", "ShortGPT, seed 43"),
        ("blockpruner-few", "BlockPruner, few"),
    ]  # fmt: skip
    assert base.calibration == run.calibration and base.score == run.score
    for name, change, budget in (("seed-43", {"seed": 43}, "0.2"), ("few", {"num_samples": 3}, "0.1")):
        varied = found[f"blockpruner-{name}"]
        assert varied.calibration == run.calibration.model_copy(update=change) and varied.score == base.score
        assert varied.budgets == (budget,) and (varied.main, varied.timed, varied.raced) == (None, (), None)
    assert found["laco"].calibration.num_samples == 5 and dict(found["laco"].score.options) == {"count": 2}


def test_slicegpt_of_the_papers_models_gets_rows_as_published():
    """1,024 joined rows of 2,048 tokens, from all texts: the tenth of `split: paper` fills about 305."""
    found = next(v for v in variants(load_run("llama2-7b", ROOT / "runs")) if v.method == "slicegpt").calibration
    assert (found.num_rows, found.seq_len, found.packing, found.split, found.score) == (
        1024,
        2048,
        "joined",
        "all",
        "all",
    )
    assert calibration_rows(found) == (1024, 2048)


def test_the_set_without_responses_scores_all_of_its_text():
    run = load_run("smollm2-paper", ROOT / "runs").model_dump(exclude_unset=True)
    instructions = run["calibration"] | {"data": {"source": "path", "path": "of.jsonl", "format": "alpaca"}}
    levels = {
        "text": {"data": {"source": "path", "path": "x", "format": "text"}},
        "all tokens": {"score": "all"},
        "8 samples": {"num_samples": 8},
    }
    run |= {"calibration": instructions, "study": run["study"] | {"calibrations": levels}}
    found = {v.level: v.calibration for v in variants(Run.model_validate(run)) if v.factor == "calibration"}
    assert found["text"].score == found["all tokens"].score == "all" and found["8 samples"].score == "response"


def test_acceleration_is_left_to_the_searches_that_have_steps_to_leave_out():
    found = searches({}, {"acceleration": "lazy+race"})
    assert {name for name, v in found.items() if v.score.acceleration == "lazy+race"} == {
        "blockpruner", "greedy-layers", "blockpruner-per-parameter", "floating-search", "swap-from-blockpruner",
    }  # fmt: skip
    slow = {name for name, v in found.items() if v.score.acceleration == "none"}
    assert {"shortgpt", "laco", "random", "one-shot-perplexity", "taylor", "angular-distance"} <= slow


def test_the_pool_of_the_best_at_a_given_speed_holds_every_kind_of_method():
    rows = [method for method in METHODS.values() if "timed" in method.use]
    assert {method.kind for method in rows} == {"block", "layer", "width"}
    assert {"ShortGPT", "greedy layers", "swap from BlockPruner"} <= {method.title for method in rows}


def test_budgets_of_table_4_are_pairs():
    with pytest.raises(InputError, match="js: has 2 budgets, and metric 1"):
        read_settings(
            Run,
            run_with({}).model_dump()
            | {"study": {"main": {"block": "0.2", "layer": "0.2"}, "metric": ["0.1"], "js": ["0.1", "0.2"]}},
        )


@pytest.mark.parametrize("change", [{"methods": ["blockpruner", "magic"]}, {"samples": {"magic": 3}}])
def test_an_unknown_method_is_named_with_the_valid_ones(change):
    with pytest.raises(InputError, match=f"study names the method 'magic'.*valid: {', '.join(METHODS)}"):
        variants(run_with(change))


def test_a_run_without_a_study_is_refused(tmp_path):
    with pytest.raises(InputError, match="no study section"):
        variants(load_run("smollm2", ROOT / "runs"))
    for name in ("smollm2.yaml", "sources.yaml"):
        (tmp_path / name).write_text((ROOT / "runs" / name).read_text())
    (tmp_path / "sets.yaml").write_text("mine: [smollm2]\n")
    with pytest.raises(InputError, match="set 'mine' names 'smollm2', and runs/smollm2.yaml has no study section"):
        load_set("mine", tmp_path / "sets.yaml")
    with pytest.raises(InputError, match="set 'yours' is unknown; valid: mine"):
        load_set("yours", tmp_path / "sets.yaml")


def test_items_of_the_papers_models_have_no_bos():
    """lm-eval 0.4.0, by which the paper measured, added none; lm-eval's default today is the tokenizer's own."""
    runs = [run for name in ("paper", "large") for run in load_set(name).values()]
    assert not any(run.evaluate.zero_shot.bos for run in runs)
    assert all(labels(resolve(run, [])).tasks.endswith(", without BOS") for run in runs), "the notes of tables tell"
    assert labels(resolve(run_with({}), [])).tasks.endswith(", with the BOS that the tokenizer adds")


def test_a_report_shows_what_choices_hide():
    """By default LAMBADA and answers that are generated, which the sets of the paper's models keep."""
    tasks = Study(main={"block": "0.2", "layer": "0.2"}).tasks
    assert "lambada_openai" in tasks and "generate_until" in {BENCHMARKS[task].kind for task in tasks}
    assert all(run.study.tasks == tasks for name in ("paper", "large") for run in load_set(name).values())
