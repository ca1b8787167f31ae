"""Studies: which targets they are, and tables whose numbers are those of the targets' evidence."""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from blockpruner.config.params import load_run
from blockpruner.config.sections import Run, Target, resolve
from blockpruner.core.blocks import BlockKind, format_mask, removable_units, sorted_blocks
from blockpruner.core.plan import Plan
from blockpruner.core.settings import read_settings
from blockpruner.evaluation.settings import Evaluate
from blockpruner.evaluation.store import ITEMS
from blockpruner.methods.recipes import RECIPES
from blockpruner.methods.registry import check_score
from blockpruner.reporting.labels import labels
from blockpruner.reporting.results import RunLabels
from blockpruner.scoring.settings import Score
from blockpruner.store.files import write_sealed_json, write_table
from blockpruner.store.plans import save_plan
from study import publish
from study.paper.curves import FIGURES
from study.paper.evidence import FIVE, Row, Subject, read_rows
from study.paper.needs import differences, items_of, takes
from study.paper.page import conditions, study_tables, write_study
from study.paper.published import read_published
from study.paper.tables import TABLES, models_frame
from study.studies import Study, load_study, score_of_method, study_names, targets_of
from tests.builders import speed_facts
from tests.errors import refused

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "data" / "paper"
LAYERS, MHA, MLP, TOTAL = 30, 900_000, 2_700_000, 135_000_000
ITEM_COUNT, ROW_COUNT = 20, 6
LABELS = RunLabels("tiny", "a <tiny> model", "instructions", "an encyclopaedia", "stock tasks")


# studies/*.yaml


def test_each_item_of_a_study_names_the_models_that_it_needs_and_what_they_take(tmp_path):
    study = load_study("llama2-7b", ROOT / "studies")
    runs = {run: load_run(run, ROOT / "runs") for run in study.runs}
    subjects = [
        Subject(run, LABELS, "Llama2-7B", "alpaca", runs[run].calibration.num_samples)
        for run in runs
    ]
    frame = models_frame(read_rows(subjects, asked_of(study), tmp_path))
    items = items_of(frame, runs, PUBLISHED)
    numbers = {"table": (1, 2, 4, 5, 6, 7, 8, 9, 10), "figure": (4, 5, 6, 7, 8, 10)}
    assert list(items) == [
        *(f"{kind}{n}" for kind, ns in numbers.items() for n in ns),
        "check",
        "all",
    ]
    run = "llama2-7b"
    assert items["table2"][1]["target"].tolist() == [
        f"{run}-blockpruner-b21-99",
        f"{run}-one-shot-perplexity-b20-95",
        f"{run}-greedy-layers-b21-02",
    ]
    assert items["check"][1]["target"].tolist() == [f"{run}-dense", f"{run}-shortgpt-b21-02"]
    first = items["table1"][1]
    assert first[first["recipe"] == "blockpruner"]["target"].tolist() == [
        f"{run}-blockpruner-b21-99"
    ]
    assert len(items["all"][1]) == len(study.targets) + len(runs)
    assert takes(items["table2"][1]) == "3 models (0 measured); 3 searches; 0 trained"
    few = {**runs, run: runs[run].model_copy(update={"evaluate": Evaluate()})}
    assert not {"table8", "table10"} & items_of(frame, few, PUBLISHED).keys()


@pytest.mark.parametrize("name", study_names(ROOT / "studies"))
def test_shipped_studies_are_of_runs_and_methods_that_there_are(name):
    study = load_study(name, ROOT / "studies")
    runs = {run: load_run(run, ROOT / "runs") for run in study.runs}
    for experiment in study.experiments.values():
        for method, fields in experiment.methods.items():
            score_of_method(runs[experiment.run], method, fields)
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", target) for target in study.targets)
    for run, settings in runs.items():
        targets = [target for target in study.targets.values() if target.run == run]
        experiments = [item for item in study.experiments.values() if item.run == run]
        assert targets or experiments, f"nothing is asked of {run}"
        assert not targets or settings.export == (), "a study shows numbers, no checkpoints"
        assert settings.train is not None or not any(target.train for target in targets)


def test_every_method_of_the_paper_is_a_valid_search():
    for method in RECIPES.values():
        for score in method.searches.values():
            check_score(Score.model_validate(dict(score)))
    known = {key for method in RECIPES.values() for key in method.published} | {"dense"}
    assert {row.key for table in TABLES for row in read_published(PUBLISHED, table.source)} == known


def test_a_grid_is_every_method_at_every_budget():
    grids = [
        {"methods": ["floating", "greedy-layers"], "budgets": ["0.2199", "7layers"]},
        {
            "runs": ["b"],
            "methods": ["blockpruner"],
            "budgets": ["0.3kv"],
            "compensate": ["none", "refit"],
            "train": True,
        },
    ]
    extra = {"mine": {"run": "a", "budget": "0.1"}}
    result = targets_of(
        read_settings(Study, {"title": "t", "runs": ["a", "b"], "grids": grids, "targets": extra})
    )
    assert list(result) == [
        "a-floating-b21-99",
        "a-floating-7layers",
        "a-greedy-layers-b21-99",
        "a-greedy-layers-7layers",
        "b-floating-b21-99",
        "b-floating-7layers",
        "b-greedy-layers-b21-99",
        "b-greedy-layers-7layers",
        "b-blockpruner-b30kv-train",
        "b-blockpruner-b30kv-refit-train",
        "mine",
    ]
    assert result["b-blockpruner-b30kv-refit-train"] == Target(
        run="b", budget="0.3kv", method="blockpruner", compensate="refit", train=True
    )
    assert result["mine"].method is None


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("unknown-run", {"grids": [{"runs": ["b"], "methods": ["floating"], "budgets": ["0.1"]}]}),
        ("unknown-method", {"grids": [{"methods": ["flaoting"], "budgets": ["0.1"]}]}),
        ("same-name", {"targets": {"a-floating-b10": {"run": "a", "budget": "0.2"}}}),
    ],
)
def test_a_study_that_is_wrong_is_refused(rule, change):
    grids = [{"methods": ["floating"], "budgets": ["0.1"]}]
    with refused(rule):
        targets_of(read_settings(Study, {"title": "t", "runs": ["a"], "grids": grids} | change))


# The tables


def seeded(*parts: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def plan_of(target: Target) -> Plan:
    """A made-up plan at a share of the parameters."""
    (own,) = RECIPES[target.method].searches.values()
    score = {"unit": "block", "candidates": "all"} | dict(own)
    units = removable_units(LAYERS, score["unit"], score["candidates"])
    queue = [units[i] for i in seeded(target.method, target.run).permutation(len(units))]
    sizes = (
        np.cumsum([sum({"mha": MHA, "mlp": MLP}[b.kind] for b in unit) for unit in queue]) / TOTAL
    )
    steps = int(np.argmin(abs(sizes - float(target.budget)))) + 1
    gone = frozenset().union(*queue[:steps])
    ratio = float(sizes[steps - 1])
    return Plan(
        kind="mask",
        target="",
        run=target.run,
        budget=target.budget,
        method=score["method"],
        metric="perplexity",
        search="f00d",
        layers=LAYERS,
        removed=tuple(str(block) for block in sorted_blocks(gone)),
        order=tuple(map(format_mask, queue[:steps])),
        ratio=ratio,
        ratios=tuple(map(float, sizes[:steps])),
        blocks={kind: sum(block.kind is kind for block in gone) for kind in BlockKind},
        removes={"kv": sum(block.kind is BlockKind.MHA for block in gone) / LAYERS},
        parameters={"dense": TOTAL, "pruned": round(TOTAL * (1 - ratio))},
        calibration={"rows": 4, "tokens": 64, "dense_perplexity": 12.0, "perplexity": 20.0},
    )


def measure(
    folder: Path, ratio: float, quality: float, tasks: tuple[str, ...], dense: dict | None
) -> None:
    """Made-up results of one model: they fall with the ratio, and with what is removed by a worse
    method."""
    skill, name = 0.7 - quality * ratio, folder.name
    items, facts = [], {}
    for task in tasks:
        hard = seeded("items", task).random(ITEM_COUNT)
        noise = seeded(name, task).normal(0, 0.05, ITEM_COUNT)
        own = [float(h + e < skill) for h, e in zip(hard, noise, strict=True)]
        blank = dict.fromkeys(ITEMS.names)
        items += [
            blank
            | {
                "task": task,
                "item": i,
                "gold": 0,
                "loglikelihoods": [0.0],
                "acc": a,
                "prompt_hash": "",
                "p_gold": 0.5 + (skill - hard[i]) / 4,
            }
            for i, a in enumerate(own)
        ]
        error = float(np.std(own, ddof=1) / math.sqrt(ITEM_COUNT))
        facts[task] = {
            "metric": "acc",
            "value": float(np.mean(own)),
            "stderr": error,
            "items": ITEM_COUNT,
        }
    nll = (
        2.5
        + 5 * quality * ratio
        + seeded("rows").normal(0, 0.2, ROW_COUNT)
        + seeded(name).normal(0, 0.02, ROW_COUNT)
    )
    text = {
        "perplexity": float(np.exp(nll.mean())),
        "rows": ROW_COUNT,
        "tokens": 384,
        "row_nll": nll.tolist(),
    }
    write_table(folder / "items.parquet", pa.Table.from_pylist(items, ITEMS))
    results = {
        "parameters": round(TOTAL * (1 - ratio)),
        "weight_bytes": 270_000_000,
        "perplexity": text,
        "tasks": facts,
        "average": {"value": 0.0, "stderr": 0.0},
    }
    write_sealed_json(folder / "results.json", results)
    seconds = {
        part: (s * (1 - 0.9 * ratio) * seeded(name, part).normal(1, 0.02, 8)).tolist()
        for part, s in (("prefill", 0.2), ("decode", 1.0), ("generation", 1.2))
    }
    own = speed_facts(
        seconds, 2**22, 280_000_000, prompt_tokens=128, new_tokens=32, batch=1, repeats=8
    )
    speed = {"dense": own} if dense is None else {"dense": dense, "pruned": own}
    search = {"seconds": 90.0, "trials_asked": 20, "trials_computed": 10}
    write_sealed_json(folder / "speed.json", {"speed": speed, "made": {}, "search": search})


def evidence(folder: Path, study: Study, tasks: tuple[str, ...] = FIVE) -> Path:
    for run in study.runs:
        dense = folder / f"{run}-dense"
        measure(dense, 0.0, 1.0, tasks, None)
        timed = json.loads((dense / "speed.json").read_text())["speed"]["dense"]
        for name, target in study.targets.items():
            if target.run == run:
                plan = plan_of(target)
                save_plan(plan, folder / name / "plan.json")
                quality = (1.0 if target.method == "blockpruner" else 1.5) - 0.3 * (
                    target.compensate != "none"
                )
                measure(folder / name, plan.ratio, quality - 0.8 * target.train, tasks, timed)
    return folder


def study_of(
    methods: list[str], budgets: list[str], *more: dict[str, Any], runs: tuple[str, ...] = ("tiny",)
) -> Study:
    grids = [{"methods": methods, "budgets": budgets}, *more]
    study = read_settings(Study, {"title": "A study", "runs": list(runs), "grids": grids})
    return study.model_copy(update={"targets": targets_of(study)})


def asked_of(study: Study) -> dict[str, Target]:
    return {
        name: target.model_copy(
            update={"method": target.method or "greedy", "compensate": target.compensate or "none"}
        )
        for name, target in study.targets.items()
    }


def rows_of(study: Study, folder: Path, paper: str | None = None) -> list[Row]:
    return read_rows([Subject(run, LABELS, paper) for run in study.runs], asked_of(study), folder)


def tables_of(rows: list[Row]) -> dict[str, pd.DataFrame]:
    return {table.name: table.frame for table in study_tables(rows, PUBLISHED)}


REFIT = {"methods": ["blockpruner", "shortgpt"], "budgets": ["0.20"], "compensate": ["refit"]}
TRAINED = {"methods": ["shortgpt"], "budgets": ["0.20"], "compensate": ["refit"], "train": True}
STUDY = study_of(["blockpruner", "shortgpt", "greedy-layers"], ["0.10", "0.20"], REFIT, TRAINED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return evidence(tmp_path_factory.mktemp("evidence"), STUDY)


@pytest.fixture(scope="module")
def rows(folder):
    return rows_of(STUDY, folder)


def raw(folder: Path, target: str) -> tuple[dict[str, Any], pd.DataFrame]:
    return json.loads((folder / target / "results.json").read_text()), pd.read_parquet(
        folder / target / "items.parquet"
    )


def test_numbers_of_a_model_are_those_of_its_files(folder, rows):
    frame = models_frame(rows).set_index("target")
    result, (facts, items) = frame.loc["tiny-shortgpt-b20"], raw(folder, "tiny-shortgpt-b20")
    plan = json.loads((folder / "tiny-shortgpt-b20" / "plan.json").read_text())
    dense, _ = raw(folder, "tiny-dense")
    assert result["removed_pct"] == pytest.approx(100 * plan["ratio"])
    assert result["mha"] == plan["blocks"]["mha"]
    assert result["heldout_ppl"] == facts["perplexity"]["perplexity"]
    ratio = stats.ttest_rel(
        facts["perplexity"]["row_nll"], dense["perplexity"]["row_nll"]
    ).confidence_interval(0.95)
    assert (result["heldout_x_low"], result["heldout_x_high"]) == pytest.approx(
        np.exp([ratio.low, ratio.high])
    )
    by_task = items.groupby("task")["acc"]
    assert result["avg_pct"] == pytest.approx(100 * by_task.mean().mean())
    assert result["avg_pct_se"] == pytest.approx(100 * np.sqrt((by_task.sem() ** 2).sum()) / 5)
    assert result["p_gold_pct"] == pytest.approx(
        100 * items.groupby("task")["p_gold"].mean().mean()
    )
    timed = json.loads((folder / "tiny-shortgpt-b20" / "speed.json").read_text())["speed"]
    dense_s, pruned_s = (
        timed[side]["generation_seconds"]["samples"] for side in ("dense", "pruned")
    )
    assert result["generation_x"] == pytest.approx(np.median(dense_s) / np.median(pruned_s))
    assert result["generation_x_low"] <= result["generation_x"] <= result["generation_x_high"]
    assert frame.loc["tiny-shortgpt-b20-refit-train", "healing"] == "refit + training"


def test_the_average_is_of_the_papers_tasks_whatever_else_is_measured(tmp_path):
    study = study_of(["blockpruner"], ["0.20"])
    extra = rows_of(study, evidence(tmp_path / "more", study, (*FIVE, "lambada_openai")))
    own = models_frame(extra).iloc[1]
    assert (
        own["avg_pct"]
        == pytest.approx(np.mean([own[task] for task in FIVE]))
        != own["lambada_openai"]
    )
    few = models_frame(rows_of(study, evidence(tmp_path / "few", study, ("piqa", "race")))).iloc[1]
    assert few["avg_pct"] == pytest.approx((few["piqa"] + few["race"]) / 2)


def test_comparisons_are_paired_and_corrected_over_the_table(folder, rows):
    result = tables_of(rows)["paired"]
    item = result[(result["method"] == "ShortGPT") & (result["removed_pct"] > 15)].iloc[0]
    (other, items), (base, own) = (
        raw(folder, "tiny-shortgpt-b20"),
        raw(folder, "tiny-blockpruner-b20"),
    )
    gaps = (
        (items.set_index(["task", "item"])["acc"] - own.set_index(["task", "item"])["acc"])
        .groupby("task")
        .mean()
    )
    assert item["against"] == "BlockPruner"
    assert item["avg_against"] == pytest.approx(100 * gaps.mean())
    t = stats.ttest_rel(other["perplexity"]["row_nll"], base["perplexity"]["row_nll"])
    p_values = []
    for line in result.itertuples():
        target = f"-b{10 if line.removed_pct < 15 else 20}" + "-refit" * ("refit" in line.method)
        method = {"S": "shortgpt", "g": "greedy-layers"}[line.method[0]]
        pair = [
            raw(folder, f"tiny-{m}{target}")[0]["perplexity"]["row_nll"]
            for m in (method, "blockpruner")
        ]
        p_values.append(stats.ttest_rel(*pair).pvalue)
    assert result["ppl_against_p"].tolist() == pytest.approx(
        multipletests(p_values, method="holm")[1]
    )
    smaller = sum(p < t.pvalue for p in p_values)
    ends = np.exp(t.confidence_interval(1 - 0.05 / (len(p_values) - smaller)))
    assert (item["ppl_against_low"], item["ppl_against_high"]) == pytest.approx(tuple(ends))
    assert not result["method"].str.contains("training").any()  # BlockPruner's is not trained


def test_methods_are_compared_on_each_task_and_corrected_over_the_tasks_of_a_pair(folder, rows):
    result = tables_of(rows)["paired-tasks"]
    own = result[(result["method"] == "ShortGPT") & (result["removed_pct"] > 15)].set_index("task")
    assert tuple(own.index) == FIVE
    (_, items), (_, base) = raw(folder, "tiny-shortgpt-b20"), raw(folder, "tiny-blockpruner-b20")
    scores = [
        table.pivot(index="item", columns="task", values="acc")[list(FIVE)]
        for table in (items, base)
    ]
    t = stats.ttest_rel(*scores)
    assert own["score_against"].tolist() == pytest.approx(
        (100 * (scores[0] - scores[1]).mean()).tolist()
    )
    assert own["score_against_p"].tolist() == pytest.approx(
        multipletests(np.nan_to_num(t.pvalue, nan=1.0), method="holm")[1]
    )


CALIBRATIONS = {
    "a": ("alpaca", 256),
    "b": ("alpaca", 256),
    "c": ("alpaca", 64),
    "d": ("wiki", 256),
    "e": ("mix", None),
}


def calibrated(folder: Path) -> list[Row]:
    study = study_of(
        ["blockpruner"],
        ["0.2199"],
        {"runs": ["a"], "methods": ["blockpruner"], "budgets": ["0.10"]},
        {
            "runs": ["a"],
            "methods": ["blockpruner", "shortgpt"],
            "budgets": ["0.2199"],
            "train": True,
        },
        runs=tuple(CALIBRATIONS),
    )
    subjects = [Subject(run, LABELS, "Llama2-7B", *drawn) for run, drawn in CALIBRATIONS.items()]
    return read_rows(subjects, asked_of(study), evidence(folder, study))


def test_figures_of_calibration_and_training_have_their_models_alone(tmp_path):
    rows = calibrated(tmp_path)
    result, frame = tables_of(rows), models_frame(rows).set_index("target")
    seven, eight = result["figure7"], result["figure8"]
    assert list(seven[["texts", "samples"]].itertuples(index=False, name=None)) == [
        ("alpaca", 256),
        ("alpaca", 64),
        ("wiki", 256),
    ]
    assert seven["avg_pct"].tolist() == [
        frame["avg_pct"][f"{run}-blockpruner-b21-99"] for run in "acd"
    ]
    assert eight["method"].tolist() == ["dense", "BlockPruner", "BlockPruner + training"]
    assert eight["heldout_ppl"].tolist() == [
        frame["heldout_ppl"][f"a-{name}"]
        for name in ("dense", "blockpruner-b21-99", "blockpruner-b21-99-train")
    ]
    assert "table1" not in result, "which has plain models alone, here of one method"


def test_what_a_study_takes_is_told_of_any_method_and_checked_where_the_paper_has_it(tmp_path):
    study = study_of(["blockpruner", "shortgpt", "greedy-layers"], ["0.2102"])
    for title, checked in (("Llama2-7B", True), ("tiny", False)):
        frame = models_frame(rows_of(study, evidence(tmp_path / title, study), title))
        frame["recipe"] = frame["recipe"].replace("greedy-layers", "recommended")  # two searches
        runs = {run: load_run("llama2-7b", ROOT / "runs") for run in frame["run"]}
        result = items_of(frame, runs, PUBLISHED)
        assert ("check" in result) is checked
        assert takes(result["all"][1]).startswith(
            f"{len(frame)} models ({len(frame)} measured); 3 searches; "
        )


def test_a_figure_has_no_panel_of_one_point():
    recipes = ["dense", "blockpruner", "blockpruner", "dense", "blockpruner"]
    frame = pd.DataFrame(
        {"model": list("aaabb"), "recipe": recipes, "method": recipes, "run": "r", "healing": ""}
    )
    (curve,) = (curve for curve in FIGURES if curve.name == "figure5")
    assert set(curve.points(frame)["model"]) == {"a"}


def test_what_differs_from_the_paper_is_a_fault_only_where_nothing_searches(tmp_path):
    study = study_of(["blockpruner", "shortgpt"], ["0.2102", "0.2199"])
    frame = models_frame(rows_of(study, evidence(tmp_path, study), "Llama2-7B"))
    _, faults, others = differences(frame, PUBLISHED)
    assert {line.partition(":")[0] for line in faults} == {
        "Llama2-7B, dense",
        "Llama2-7B, ShortGPT",
    }
    assert {line.partition(":")[0] for line in others} == {"Llama2-7B, BlockPruner"}
    assert any(
        line.startswith("Llama2-7B, dense: piqa is ") and line.endswith("in the paper 79.05")
        for line in faults
    )
    theirs = {
        row.key: row.numbers
        for row in read_published(PUBLISHED, "table1_main")
        if row.model == "Llama2-7B"
    }
    for index, line in frame.iterrows():
        numbers = {key: value for key, value in theirs[line["recipe"]].items() if key in FIVE}
        frame.loc[index, [*numbers, "avg_pct"]] = [
            *numbers.values(),
            theirs[line["recipe"]]["avg"] + 0.9,
        ]
        frame.loc[index, "wikitext2_ppl"] = theirs[line["recipe"]]["wikitext2_ppl"] * 1.009
    assert differences(frame, PUBLISHED) == (24, [], [])


def test_rows_of_the_paper_follow_ours_at_the_nearest_ratio(tmp_path):
    study = study_of(["blockpruner", "greedy-layers"], ["0.2199", "0.30", "0.47"])
    result = tables_of(rows_of(study, evidence(tmp_path, study), "Llama2-7B"))
    table5 = result["table5"]
    block = table5[table5["method"] == "BlockPruner"]
    # 0.47 is too far from 43.03
    assert block["source"].tolist() == [
        "here",
        "paper",
        "paper",
        "paper",
    ]
    assert block[block["source"] == "paper"]["removed_pct"].tolist() == [30.0, 37.02, 43.03]
    table1 = result["table1"]
    assert table1[table1["method"] == "BlockPruner"]["source"].tolist() == ["here", "paper"]
    theirs = table1[(table1["method"] == "BlockPruner") & (table1["source"] == "paper")].iloc[0]
    assert theirs["avg_pct"] == 60.17
    assert theirs["heldout_ppl"] is None
    assert set(table1["method"]) >= {"SliceGPT", "LaCo"}  # which the study has not
    minutes = result["table7"].set_index(["method", "source"])["minutes"]
    assert minutes["BlockPruner", "here"] == 1.5
    assert minutes["BlockPruner", "paper"] == 45


def test_tables_without_ratios_are_at_those_of_table_1(tmp_path):
    study = study_of(["blockpruner", "shortgpt"], ["0.17", "0.2199", "0.30"])
    result = tables_of(
        rows_of(study, evidence(tmp_path, study, (*FIVE, "agieval_aqua_rat")), "Llama2-7B")
    )
    item = result["table1"].query("method == 'BlockPruner' and source == 'here'").iloc[0]
    every = result["models"].query("method == 'BlockPruner'").set_index("budget")
    (aqua,) = result["table8"].query("method == 'BlockPruner' and source == 'here'")[
        "agieval_aqua_rat"
    ]
    assert item["avg_pct"] == every["avg_pct"]["0.2199"]
    assert aqua == every["agieval_aqua_rat"]["0.2199"]


def test_both_readings_of_relative_magnitude_are_shown_with_the_papers_row(tmp_path):
    study = study_of(
        ["blockpruner", "relative-magnitude", "relative-magnitude-frobenius"], ["0.2102", "0.2407"]
    )
    result = tables_of(rows_of(study, evidence(tmp_path / "a", study), "Llama2-7B"))["table1"]
    own = result[result["method"].str.startswith("Relative")]
    assert own["method"].tolist() == [
        "Relative Magnitude",
        "Relative Magnitude, Frobenius",
        "Relative Magnitude",
    ]
    assert own["source"].tolist() == ["here", "here", "paper"]
    newer = tables_of(rows_of(study, evidence(tmp_path / "b", study), "Mistral-7B-v0.3"))["table9"]
    assert (newer["method"] == "Relative Magnitude, Frobenius").sum() == 1


HUB = {"source": "hub", "repo": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}


@pytest.mark.parametrize(
    ("perplexity", "named"),
    [
        ({}, True),
        ({"data": {**HUB, "split": "test", "revision": "0" * 40}}, True),
        ({"data": {**HUB, "split": "train"}}, False),
        ({"seq_len": 1024}, False),
        ({"packing": "documents"}, False),
        ({"data": {"source": "path", "path": "wikitext.txt"}}, False),
    ],
)
def test_only_wikitext_2_as_in_the_paper_is_in_its_column(tmp_path, perplexity, named):
    run = load_run("llama2-7b", ROOT / "runs").model_dump(mode="json")
    run["evaluate"]["perplexity"] = perplexity
    given = labels(resolve(read_settings(Run, run), ()))
    study = study_of(["blockpruner", "greedy-layers"], ["0.30"])
    folder = evidence(tmp_path, study)
    rows = read_rows([Subject("tiny", given, "Llama2-7B")], asked_of(study), folder)
    table = tables_of(rows)["table5"]
    assert ("wikitext2_ppl" in models_frame(rows)) is named
    own = table[table["source"] == "here"]
    assert own["wikitext2_ppl" if named else "heldout_ppl"].tolist() == [
        raw(folder, f"tiny-{method}-b30")[0]["perplexity"]["perplexity"]
        for method in ("blockpruner", "greedy-layers")
    ]


def test_a_target_without_evidence_is_a_row_with_its_reason(tmp_path):
    study = study_of(["blockpruner", "shortgpt", "mha-only"], ["0.20"])
    folder = evidence(tmp_path / "evidence", study)
    shutil.rmtree(folder / "tiny-shortgpt-b20")
    table = pa.Table.from_pandas(
        raw(folder, "tiny-mha-only-b20")[1].iloc[:-1], ITEMS, preserve_index=False
    )
    write_table(folder / "tiny-mha-only-b20" / "items.parquet", table)
    frame = models_frame(rows_of(study, folder))
    reasons = frame.set_index("target")["reason"]
    assert reasons["tiny-blockpruner-b20"] == ""
    assert reasons["tiny-shortgpt-b20"] == "not measured yet"
    assert "different items" in reasons["tiny-mha-only-b20"]


def test_conditions_tell_of_healing_and_name_runs_that_differ_by_a_seed_once():
    apart, reported = (
        (("a", "42", ""), ("b", "43", "more"), ("c", "44", "")),
        {"training": "LoRA", "compensation": "texts"},
    )
    subjects = [
        Subject(run, replace(LABELS, calibration=f"web, seed {seed}", tasks=tasks, **reported))
        for run, seed, tasks in apart
    ]
    rows = [
        Row(item.run, item, "laco", how, "", None) for item in subjects for how in ("", "refit")
    ]
    both, other = conditions(rows)
    assert both.startswith("a, c: ")
    assert "web, seed 42, 44; " in both
    assert both.endswith("; refit: texts.")
    assert other.startswith("b: ")
    assert "web, seed 43; " in other
    assert "LoRA" not in other
    (trained,) = conditions([replace(rows[0], healing="refit + training")])
    assert trained.endswith("; refit: texts; training: LoRA.")


@pytest.fixture(scope="module")
def written(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("project") / "data" / "tables" / "mine"
    write_study(out, "A study", rows, PUBLISHED)
    return out


def test_a_study_writes_its_tables_figures_and_pages(written, rows):
    out, tables = written, tables_of(rows)
    assert {path.stem for path in (out / "tables").glob("*.csv")} == tables.keys()
    kept = pd.read_csv(out / "tables" / "models.csv")
    assert kept["heldout_ppl"].tolist() == pytest.approx(
        tables["models"]["heldout_ppl"].tolist(), rel=1e-15
    )
    plots = {path.stem for path in (out / "plots").glob("*.png")}
    assert plots == {"figure5", "figure10"}
    assert plots < tables.keys()
    html = (out / "index.html").read_text()
    assert "&lt;tiny&gt;" in html
    assert "<tiny>" not in html


# docs/


def test_pages_hold_the_tables_of_docs_results():
    """`python -m study.publish` fills them."""
    result = 0
    for path in publish.pages(ROOT):
        text = path.read_text(encoding="utf-8")
        assert publish.filled(text, ROOT / "docs" / "results") == text, path
        result += len(publish.BLOCK.findall(text))
    assert result >= 2


def test_a_number_in_a_text_is_that_of_the_only_row_with_these_values(tmp_path):
    lines = (
        "method,healing,at_20_x,at_20_x_low,at_20_x_high",
        "a,plain,1.5,1.4,1.61",
        "a,refit,1.204,1.1,1.3",
    )
    (tmp_path / "sizes.csv").write_text("\n".join(lines))
    text = "So <!-- value: sizes; method=a; healing={}; at_20_x -->{}<!-- / --> times."
    assert publish.filled(text.format("refit", "?"), tmp_path) == text.format(
        "refit", "1.20 [1.10, 1.30]"
    )
    alone = "<!-- value: sizes; healing=refit; at_20_x! -->{}<!-- / -->"
    assert publish.filled(alone.format("?"), tmp_path) == alone.format("1.20")
    for where, rule in (
        ("none", "no-rows"),
        ("refit; method=c", "no-rows"),
        ("plain|refit", "not-one-row"),
    ):
        with refused(rule):
            publish.filled(text.format(where, ""), tmp_path)


def test_a_table_of_a_page_keeps_the_rows_and_columns_that_its_mark_names(tmp_path):
    (tmp_path / "sizes.csv").write_text(
        "method,healing,draws,x,y\na,plain,2,1.5,3\na,refit,2,1.2,\nb,refit,1,1.4,\n"
    )
    text = "<!-- table: sizes; healing={}; -healing; -draws -->\n{}<!-- /table -->"
    refit = "| method | x |\n| --- | ---: |\n| a | 1.20 |\n| b | 1.40 |\n"
    assert publish.filled(text.format("refit", "old\n"), tmp_path) == text.format("refit", refit)
    assert "| a | 1.50 | 3.00 |" in publish.filled(text.format("plain|refit", "old\n"), tmp_path)
    assert "| a, quickly | 1.50 | 3.00 |" in publish.filled(
        text.format("plain|refit; a: a, quickly", ""), tmp_path
    )
    for mark, rule in (
        ("healing=none", "no-rows"),
        ("healing=refit|non", "no-rows"),
        ("heal=refit", "no-rows"),
        ("-healng", "no-column"),
    ):
        with refused(rule):
            publish.filled(f"<!-- table: sizes; {mark} -->\n<!-- /table -->", tmp_path)


def test_publish_copies_a_study_and_fills_the_pages(written, monkeypatch, capsys):
    root = written.parents[2]
    (root / "docs").mkdir()
    (root / "README.md").write_text("a\n  <!-- table: figure5 -->\n  old\n  <!-- /table -->\nb\n")
    with refused("no-results"):
        publish.publish("other", root)
    publish.publish("mine", root)
    assert publish.fill(root) == [root / "README.md"]
    assert publish.fill(root) == []
    lines = (root / "README.md").read_text().splitlines()
    assert lines[2].startswith("  | model | method |")
    assert lines[-2:] == ["  <!-- /table -->", "b"]
    assert (root / "docs" / "results" / "figure5.png").exists()
    (root / "README.md").write_text("<!-- table: none -->\n<!-- /table -->\n")
    monkeypatch.chdir(root)
    assert publish.main(["mine"]) == 2
    assert "table 'none'" in capsys.readouterr().err
    (root / "README.md").write_text("<!-- table: figure5 -->\n<!-- /table -->\n")
    assert publish.main([]) == 0
    assert capsys.readouterr().out == "written: README.md\n"
