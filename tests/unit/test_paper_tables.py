"""The report of a set of studies: its numbers are those of the studies' files, the paper's stay the paper's."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
import zlib
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from blockpruner.core.blocks import BlockKind, format_mask, removable_units, sorted_blocks
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.sets import SetGoal
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.paper.beyond import compared, healing_grids
from blockpruner.paper.contrasts import FAILS, HOLDS, OPEN, claims, summed
from blockpruner.paper.evaluation import STUDY_ITEMS, Candidate
from blockpruner.paper.evidence import Subject, read_subject
from blockpruner.paper.experiments import METHODS, Variant, cures, variants
from blockpruner.paper.extra_tables import GRIDS, stopping
from blockpruner.paper.figures import FIGURES, draw
from blockpruner.paper.goals import goals_grid
from blockpruner.paper.healing import FACTS
from blockpruner.paper.page import build_set, write_set
from blockpruner.paper.studies import SearchRecord, model_name
from blockpruner.paper.tables import TABLES, paper_grids
from blockpruner.params import load_run
from blockpruner.reporting.findings import signs
from blockpruner.reporting.grids import Column, Grid, Number, escape_latex, to_csv, to_latex
from blockpruner.reporting.pages import Findings, Page, to_markdown
from blockpruner.reporting.results import RunLabels
from blockpruner.reporting.statistics import stratified_t
from blockpruner.settings import Run
from blockpruner.store.files import read_json, write_json, write_table
from blockpruner.store.plans import load_plan, save_plan
from tests.builders import speed_facts

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "data" / "paper"
LAYERS, MHA, MLP, TOTAL = 30, 900_000, 2_700_000, 135_000_000
TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
ITEMS, ROWS = 20, 6
LABELS = RunLabels("tiny", "a <tiny> model", "instructions", "an encyclopaedia", "stock tasks")


def seeded(*parts: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def plan_of(variant: Variant, budget: str, run: str) -> tuple[Plan, tuple[str, ...], tuple[float, ...]]:
    """A made-up plan at a share of the parameters, with the whole order of its search and the perplexities."""
    score, share = variant.score, float(budget)
    facts: dict[str, Any] = {
        "target": variant.name, "run": run, "budget": budget, "method": score.method, "metric": score.metric,
        "search": "f00d", "layers": LAYERS, "train": False,
    }  # fmt: skip
    if variant.kind == "width":
        plan = Plan(kind="slicegpt", removed=(), order=(), ratio=share, ratios=(), blocks={"mha": 0, "mlp": 0},
                    parameters={"dense": TOTAL, "pruned": round(TOTAL * (1 - share))}, nested=False,
                    calibration={"rows": 4, "tokens": 64, "dense_perplexity": None, "perplexity": None},
                    details={"width": 400, "hidden": 576}, **facts)  # fmt: skip
        return plan, (), ()
    units = removable_units(LAYERS, score.unit, score.candidates)
    title = METHODS[variant.method].title
    random = seeded(title, score.metric, variant.factor, variant.level)
    queue = [units[i] for i in random.permutation(len(units))]
    if variant.factor:  # mostly the order of its base
        base = seeded(title, score.metric, "", "")
        queue = [units[i] for i in base.permutation(len(units))]
        queue[0], queue[1] = queue[1], queue[0]
    sizes = np.cumsum([sum(MHA if block.kind is BlockKind.MHA else MLP for block in unit) for unit in queue]) / TOTAL
    steps = int(np.argmin(abs(sizes - share))) + 1
    gone = frozenset(chain(*queue[:steps]))
    rise = 0.05 if score.candidates != "mlp" else 0.09
    perplexities = tuple(float(math.exp(2.5 + rise * k)) for k in range(len(queue) + 1))
    merges = (
        {"details": {"variant": "repo", "merges": [[9, 1], [8, 1]], "threshold": 0.5}} if score.method == "laco" else {}
    )
    plan = Plan(
        kind="laco" if merges else "mask",
        removed=() if merges else tuple(str(block) for block in sorted_blocks(gone)),
        order=tuple(map(format_mask, queue[:steps])),
        ratio=float(sizes[steps - 1]),
        ratios=tuple(map(float, sizes[:steps])),
        blocks={kind: sum(block.kind is kind for block in gone) for kind in BlockKind},
        parameters={"dense": TOTAL, "pruned": round(TOTAL * (1 - float(sizes[steps - 1])))},
        calibration={"rows": 4, "tokens": 64, "dense_perplexity": perplexities[0], "perplexity": perplexities[steps]},
        **facts, **merges,
    )  # fmt: skip
    return plan, tuple(map(format_mask, queue)), perplexities


def speed_of(name: str, ratio: float, settings: dict[str, int]) -> dict[str, Any]:
    def samples(seconds: float) -> list[float]:
        drift = seeded(name, seconds).normal(1, 0.02, settings["repeats"])
        return (seconds * (1 - 0.9 * ratio) * drift).tolist()

    seconds = {"prefill": samples(0.2), "decode": samples(1.0), "generation": samples(1.2)}
    return speed_facts(seconds, round(2**22 * (1 - ratio)), round(280e6 * (1 - ratio)), dtype="bfloat16", **settings)


def items_of(name: str, skill: float, task: str) -> list[dict[str, Any]]:
    hard = seeded("items", task).random(ITEMS)
    noise = seeded(name, task).normal(0, 0.05, ITEMS)
    return [
        {"model": name, "task": task, "item": i, "gold": 0, "loglikelihoods": [0.0], "acc": float(h + e < skill),
         "acc_norm": None, "prompt_hash": "", "p_gold": float(0.5 + (skill - h - e) / 4)}
        for i, (h, e) in enumerate(zip(hard, noise, strict=True))
    ]  # fmt: skip


def facts_of(name: str, ratio: float, items: list[dict[str, Any]], main: bool, perplexity: float) -> dict[str, Any]:
    own = [item["acc"] for item in items]
    tasks = {}
    for k, task in enumerate(TASKS):
        scores = own[k * ITEMS : (k + 1) * ITEMS]
        stderr = float(np.std(scores, ddof=1) / math.sqrt(ITEMS))
        tasks[task] = {"metric": "acc", "value": float(np.mean(scores)), "stderr": stderr, "acc": 0.0, "items": ITEMS}
    if main:
        tasks["lambada_openai"] = {"metric": "acc", "value": 0.25, "stderr": 0.01, "acc": 0.25, "perplexity": 9.0,
                                   "items": 50}  # fmt: skip
    nll = math.log(perplexity) + seeded(name, "rows").normal(0, 0.02, ROWS)
    text = {"perplexity": float(np.exp(nll.mean())), "nll": float(nll.mean()), "rows": ROWS, "tokens": ROWS * 64,
            "row_nll": list(map(float, nll)), "seq_len": 64}  # fmt: skip
    texts = {"heldout": text} | ({"wikitext2": text | {"perplexity": 2 * text["perplexity"]}} if main else {})
    return {"parameters": round(TOTAL * (1 - ratio)), "weight_bytes": round(270e6 * (1 - ratio)), "perplexity": texts,
            "tasks": tasks}  # fmt: skip


STUDY = {
    "main": {"block": "0.20", "layer": "0.20", "width": "0.20"},
    "metric": ["0.10"],
    "curve": ["0.05", "0.10", "0.15", "0.20", "0.30"],
    "high": [{"block": "0.30", "layer": "0.30"}, {"block": "0.40", "layer": "0.40"}],
    "sensitivity": "0.05",
    "calibrations": {
        "16 samples": {"num_samples": 16}, "256 samples": {"num_samples": 256}, "rows of 128": {"seq_len": 128},
        "999 samples": {"num_samples": 999},
        "encyclopaedia": {"data": {"source": "path", "path": "x", "format": "text"}},
        "samples apart": {"packing": "per_sample"}, "all tokens": {"score": "all"},
    },
    "options": {"laco": {"count": 3}},
    "heal": [{"methods": ["blockpruner", "floating-search", "greedy-layers"], "budgets": ["0.20", "0.30"]}],
    "wikitext": {"max_rows": 6},
    "speed": {"new_tokens": 32, "repeats": 6},
}  # fmt: skip
PLAIN: dict[str, Any] = {"seeds": (), "calibrations": {}, "heal": ()}


def build(folder: Path, run: Run, name: str) -> Path:
    """All files of a study, made up: quality falls with the ratio, for blocks more slowly than for others."""
    models, items, speeds = {}, [], {}
    settings = {"main": run.evaluate.speed.model_dump(), "timed": run.study.speed.model_dump()}
    models["dense"], own = _model("dense", 0.0, 1.0, True)
    items += own
    speeds["dense"] = {key: {"dense": speed_of(key, 0.0, value)} for key, value in settings.items()}
    for number, variant in enumerate(variants(run)):
        rows = CalibrationSet(((1, 2, 3, number + 1),) * 4)
        path = folder / "plans" / variant.slug
        rows.save(path / "rows.parquet", "test")
        for budget in variant.budgets:
            plan, order, perplexities = plan_of(variant, budget, name)
            save_plan(plan, path / f"{budget}.json")
            candidate = Candidate(plan, rows)
            key, main = candidate.name, budget == variant.main
            quality = 1.0 if variant.method == "blockpruner" else 1.5
            if key not in models or main:
                models[key], own = _model(key, plan.ratio, quality, main)
                items = [item for item in items if item["model"] != key] + own
            timed = {"main": budget == variant.raced, "timed": budget in variant.timed}
            wanted = {k: v for k, v in settings.items() if timed[k]}
            speeds.setdefault(key, {}).update(
                {
                    k: {"dense": speed_of(k + key, 0.0, v), "pruned": speed_of("p" + k + key, plan.ratio, v)}
                    for k, v in wanted.items()
                }
            )
        first = {unit: 0.1 * (i + 1) for i, unit in enumerate(order)} if variant.score.method != "laco" else {}
        cost = {"seconds": 90.0 * (number + 1), "computed": 10 * number, "asked": 20 * number}
        found = SearchRecord(variant.name, order[: 40 if order else 0], perplexities[:41], first, 4, 64 + number, cost)
        write_json(path / "search.json", vars(found))
    for number, cure in enumerate(cures(run)):
        digest = f"{number:064d}" if number else None  # of the first nothing helped
        rows = CalibrationSet.load(folder / "plans" / cure.variant.slug / "rows.parquet")
        plan, _, _ = plan_of(cure.variant, cure.budget, name)
        key = model_name(plan, rows.digest, digest)
        if key not in models:
            models[key], own = _model(key, plan.ratio, 0.5, True)
            items += own
        write_json(folder / "healed" / cure.slug / FACTS, {"digest": digest})
    write_json(folder / "results" / "models.json", models)
    table = pa.Table.from_pylist(items, schema=STUDY_ITEMS)
    write_table(folder / "results" / "items.parquet", table)
    write_json(folder / "speed" / "speed.json", speeds)
    return folder


def _model(name: str, ratio: float, quality: float, main: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    items = [item for task in TASKS for item in items_of(name, 0.8 - quality * ratio, task)]
    return facts_of(name, ratio, items, main, 12 * math.exp(3 * quality * ratio)), items


@pytest.fixture(scope="module")
def run() -> Run:
    """The shipped one with every table, and a ratio in Table 5 that the paper has no row for."""
    shipped = load_run("smollm2-paper", ROOT / "runs").model_dump(exclude_unset=True)
    return Run.model_validate(shipped | {"study": STUDY})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run) -> Path:
    return build(tmp_path_factory.mktemp("study") / "smollm2-paper", run, "smollm2-paper")


@pytest.fixture(scope="module")
def subject(folder, run) -> Subject:
    return read_subject("smollm2-paper", run, LABELS, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, run) -> Subject:
    """A small study of a model that the paper has, at its ratios."""
    changed = {
        "methods": ("blockpruner", "slicegpt", "relative-magnitude", "shortgpt", "greedy-layers"), **PLAIN,
        "main": run.study.main.model_copy(update={"block": "0.22", "layer": "0.21", "width": "0.21"}),
    }  # fmt: skip
    there = load_run("llama2-7b", ROOT / "runs").model
    small = run.model_copy(update={"model": there, "study": run.study.model_copy(update=changed)})
    folder = build(tmp_path_factory.mktemp("study") / "llama2-7b", small, "llama2-7b")
    return read_subject("llama2-7b", small, LABELS, folder)


@pytest.fixture(scope="module")
def absent(tmp_path_factory, run) -> Subject:
    there = load_run("llama2-13b", ROOT / "runs").model
    return read_subject("llama2-13b", run.model_copy(update={"model": there}), LABELS, tmp_path_factory.mktemp("none"))


@pytest.fixture(scope="module")
def written(tmp_path_factory, subject) -> Path:
    out = tmp_path_factory.mktemp("out") / "set"
    write_set(out, "test", [subject], PUBLISHED)
    return out


@pytest.fixture(scope="module")
def page(subject) -> Page:
    return build_set("test", [subject], PUBLISHED)


@cache
def grids(*subjects: Subject) -> dict[str, Grid]:
    found = [subject.evidence for subject in subjects if subject.evidence is not None]
    named = [grid for table in TABLES for grid in paper_grids(table, subjects, PUBLISHED)]
    beyond = [make(found) for make in (*GRIDS, stopping)] if found else []
    return {grid.name: grid for grid in [*named, *beyond]}


def rows(grid: Grid) -> list[dict[str, str]]:
    """As a reader of the CSV sees them."""
    return list(csv.DictReader(to_csv(grid).splitlines()))


def row(grid: Grid, **wanted: str) -> dict[str, str]:
    found = [r for r in rows(grid) if all(r[key] == value for key, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def raw(folder: Path, variant: str, budget: str) -> tuple[str, dict[str, Any], dict[str, list[float]]]:
    """A model's name, facts and scores by task, found in the files by hand."""
    plan = json.loads((folder / "plans" / variant / f"{budget}.json").read_text())
    key = hashlib.sha256(
        json.dumps({"kind": "mask", "removed": plan["removed"]}, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    models = json.loads((folder / "results" / "models.json").read_text())
    name = next(model for model in models if model != "dense" and key.startswith(model))
    items = pq.read_table(folder / "results" / "items.parquet").to_pylist()
    scores: dict[str, list[float]] = {}
    for item in items:
        if item["model"] == name:
            scores.setdefault(item["task"], []).append(item["acc"])
    return name, models[name], scores


def p_of(folder: Path, variant: str) -> dict[str, list[float]]:
    """p of the right answers at 20 %, found by hand."""
    name, _, _ = raw(folder, variant, "0.20")
    found: dict[str, list[float]] = {}
    for item in pq.read_table(folder / "results" / "items.parquet").to_pylist():
        if item["model"] == name:
            found.setdefault(item["task"], []).append(item["p_gold"])
    return found


def _nll(folder: Path, variant: str) -> np.ndarray:
    return np.array(raw(folder, variant, "0.20")[1]["perplexity"]["heldout"]["row_nll"])


def test_a_number_is_written_with_its_uncertainty():
    assert str(Number(12.34, 1, 0.56)) == "12.3 ± 0.6"
    assert str(Number(-1.26, 1, low=-2.0, high=0.04, signed=True)) == "−1.3 [−2.0, 0.0]"
    assert str(Number(1.0, 2, low=-math.inf, high=math.inf)) == "1.00"
    assert str(Number(3e-7, 4, is_p=True)) == "< 0.0001"
    assert str(Number(0.0, 4, is_p=True)) == "0.0000"


def test_csv_has_full_precision_and_latex_is_escaped():
    columns = (Column("a_b", "a & b, %"), Column("n", "n"))
    grid = Grid("g", "100 % of_it", columns, (("x_1 <b>", Number(1 / 3, 1, 0.25)), (r"\cmd{}", None)), ("a ± note",))
    assert list(csv.reader(to_csv(grid).splitlines())) == [
        ["a_b", "n", "n_se"], ["x_1 <b>", repr(1 / 3), "0.25"], [r"\cmd{}", "", ""],
    ]  # fmt: skip
    text = to_latex(grid)
    assert r"a \& b, \%" in text and r"x\_1 \textless{}b\textgreater{}" in text and r"0.3 $\pm$ 0.2" in text
    assert r"\textbackslash{}cmd\{\}" in text and r"\caption{100 \% of\_it}" in text and r"\begin{tabular}{lr}" in text
    assert escape_latex("a−b^2~") == r"a$-$b\textasciicircum{}2\textasciitilde{}"


def test_numbers_of_table_1_are_those_of_the_files(folder, subject):
    name, facts, scores = raw(folder, "blockpruner", "0.20")
    found = row(grids(subject)["table1"], method="BlockPruner", source="here")
    means = [np.mean(scores[task]) for task in TASKS]
    errors = [np.std(scores[task], ddof=1) / math.sqrt(ITEMS) for task in TASKS]
    plan = json.loads((folder / "plans" / "blockpruner" / "0.20.json").read_text())
    assert float(found["ratio_pct"]) == pytest.approx(100 * plan["ratio"])
    assert float(found["avg"]) == pytest.approx(100 * np.mean(means))
    assert float(found["avg_se"]) == pytest.approx(100 * math.sqrt(sum(e**2 for e in errors)) / 5)
    assert float(found["heldout_ppl"]) == facts["perplexity"]["heldout"]["perplexity"]
    assert float(found["wikitext2_ppl"]) == 2 * facts["perplexity"]["heldout"]["perplexity"]
    assert float(found["piqa"]) == pytest.approx(100 * means[0])
    assert model_name(load_plan(folder / "plans" / "blockpruner" / "0.20.json"), "") == name


def test_models_that_the_paper_lacks_stand_apart_from_its_numbers(subject):
    found = grids(subject)
    for name in ("table1", "table2", "table5", "table6", "table9"):
        assert {r["source"] for r in rows(found[name])} == {"here"}
        assert {r["model"] for r in rows(found[name])} == {subject.model}
        apart = rows(found[f"{name}-paper"])
        assert subject.model not in {r["model"] for r in apart} and "the paper’s" in found[f"{name}-paper"].title
    assert row(found["table1-paper"], model="Llama2-7B", method="BlockPruner")["wikitext2_ppl"] == "11.51"
    assert len(rows(found["table1-paper"])) == 32


def test_differences_are_ours_minus_the_papers(llama):
    found = grids(llama)
    assert "table1-paper" not in found
    ours, paper, less = (
        row(found["table1"], method="BlockPruner", source=source) for source in ("here", "paper", "here − paper")
    )
    assert paper["avg"] == "60.17" and paper["heldout_ppl"] == "" and paper["model"] == "Llama2-7B"
    for column in ("ratio_pct", "wikitext2_ppl", "piqa", "arc_challenge", "avg"):
        assert float(less[column]) == pytest.approx(float(ours[column]) - float(paper[column]))
    assert less["heldout_ppl"] == ""
    assert float(row(found["table6"], method="ShortGPT", source="paper")["speedup"]) == 1.31
    minutes = row(found["table7"], method="BlockPruner", source="here − paper")["minutes"]
    assert float(minutes) == pytest.approx(1.5 - 45)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, run):
    """The study of a shipped run of the paper's models, with some of its methods."""

    def made(name: str, *methods: str) -> Subject:
        theirs = load_run(name, ROOT / "runs")
        study = theirs.study.model_copy(update={"methods": methods, **PLAIN})
        small = run.model_copy(update={"model": theirs.model, "study": study})
        return read_subject(name, small, LABELS, build(tmp_path_factory.mktemp("study") / name, small, name))

    return made


@pytest.mark.parametrize("name", ["mistral-7b", "llama3-8b"])
def test_every_row_of_table_9_is_held_against_ours(shipped, name):
    """BlockPruner's first ratio, 25.12 or 24.86 %, is none of the layer methods'."""
    subject = shipped(name, "blockpruner", "shortgpt", "relative-magnitude")
    found = rows(grids(subject)["table9"])
    assert [r["source"] for r in found] == ["here", "paper", "here − paper"] * 12
    pairs = rows(grids(subject)["table9-tests"])
    main = subject.evidence.study.main
    first = subject.evidence.at("blockpruner", main.block).ratio
    assert [float(r["against_ratio_pct"]) for r in pairs].count(pytest.approx(100 * first)) == 2


def test_tables_4_and_6_of_llama_are_at_the_papers_ratios(shipped):
    subject = shipped("llama2-7b", "blockpruner", "blockpruner-by-js", "shortgpt", "slicegpt")
    found = rows(grids(subject)["table4"])
    assert [r["source"] for r in found] == ["here", "paper", "here − paper"] * 8
    js = [float(r["ratio_pct"]) for r in found if r["method"] == "BlockPruner by JS" and r["source"] == "here"]
    assert js == pytest.approx([14.99, 26.00, 29.01, 37.02], abs=1.5)
    table6 = [r for r in rows(grids(subject)["table6"]) if r["method"] != "dense"]
    assert [r["source"] for r in table6] == ["here", "paper", "here − paper"] * 3
    assert all(float(r["ratio_pct"]) > 23 for r in table6 if r["source"] == "here")


def test_merging_and_slicing_are_in_the_time_of_table_7(shipped, run, tmp_path):
    theirs = run.model_copy(update={"study": run.study.model_copy(update={"methods": ("slicegpt",), **PLAIN})})
    folder = build(tmp_path / "smollm2-paper", theirs, "smollm2-paper")
    path = folder / "results" / "models.json"
    models = json.loads(path.read_text())
    for name in models.keys() - {"dense"}:
        models[name]["making_seconds"] = 600.0
    path.write_text(json.dumps(models))
    subject = read_subject("smollm2-paper", theirs, LABELS, folder)
    seconds = json.loads((folder / "plans" / "slicegpt" / "search.json").read_text())["cost"]["seconds"]
    assert float(rows(grids(subject)["table7"])[0]["minutes"]) == pytest.approx(seconds / 60 + 10)


def test_a_method_that_cannot_be_had_is_a_row_with_its_reason(run, tmp_path):
    study = run.study.model_copy(update={"methods": ("blockpruner", "laco"), **PLAIN})
    small = run.model_copy(update={"study": study})
    folder = build(tmp_path / "smollm2-paper", small, "smollm2-paper")
    record = json.loads((folder / "plans" / "laco" / "search.json").read_text())
    (folder / "plans" / "laco" / "0.20.json").unlink()
    (folder / "plans" / "laco" / "search.json").write_text(json.dumps(record | {"refused": "removes 6 or 8 layers"}))
    subject = read_subject("smollm2-paper", small, LABELS, folder)
    for table in ("table1", "table7"):
        (found,) = [r for r in rows(grids(subject)[table]) if r["method"].startswith("LaCo")]
        assert found["method"] == "LaCo: removes 6 or 8 layers" and found.get("avg", "") == ""


def test_only_rows_of_about_the_same_ratio_are_matched(llama):
    block = [r for r in rows(grids(llama)["table5"]) if r["method"] == "BlockPruner"]
    assert [r["source"] for r in block] == ["here", "paper", "here − paper", "here", "paper", "paper"]
    paper = [float(r["ratio_pct"]) for r in block if r["source"] == "paper"]
    assert paper == [30.0, 37.02, 43.03]


def test_a_run_that_is_not_computed_shows_the_papers_rows(absent, subject):
    found = grids(absent)
    table = rows(found["table1"])
    assert {r["avg"] for r in table if r["source"] == "here"} == {""}
    assert all("not computed here" in r["method"] for r in table if r["source"] == "here")
    assert row(found["table1"], method="ShortGPT", source="paper")["avg"] == "62.6"
    assert {r["model"] for r in table} == {"Llama2-13B"} and "Llama2-13B; models" in found["table1"].notes[0]
    assert [grid for name, grid in found.items() if name in ("speed", "seeds")] == []
    both = grids(subject, absent)["table1"]
    assert {(r["model"], r["source"]) for r in rows(both)} == {
        (subject.model, "here"), ("Llama2-13B", "here"), ("Llama2-13B", "paper"),
    }  # fmt: skip
    page = build_set("x", [absent], PUBLISHED)
    assert not page.plots and "No figure: the study has no curves" in to_markdown(page)


def test_tests_are_paired_and_corrected_over_the_rows(folder, subject):
    _, _, base = raw(folder, "blockpruner", "0.20")
    _, _, other = raw(folder, "shortgpt", "0.20")
    grid = grids(subject)["table1-tests"]
    found = row(grid, method="ShortGPT")
    difference = [np.array(other[task]) - np.array(base[task]) for task in TASKS]
    assert float(found["accuracy"]) == pytest.approx(100 * np.mean(difference))
    confident = {name: p_of(folder, name) for name in ("blockpruner", "shortgpt")}
    confidence = [np.array(confident["shortgpt"][task]) - np.array(confident["blockpruner"][task]) for task in TASKS]
    assert float(found["p_gold"]) == pytest.approx(100 * np.mean(confidence))
    table = rows(grid)
    for measure in ("accuracy", "p_gold", "perplexity"):
        holm = multipletests([float(r[f"{measure}_p"]) for r in table], method="holm")[1]
        assert [float(r[f"{measure}_p_holm"]) for r in table] == pytest.approx(holm)
    t = stats.ttest_1samp(_nll(folder, "shortgpt") - _nll(folder, "blockpruner"), 0)
    assert float(found["perplexity_p"]) == pytest.approx(t.pvalue)
    smaller = sum(float(r["perplexity_p"]) < t.pvalue for r in table)
    ends = np.exp(t.confidence_interval(1 - 0.05 / (len(table) - smaller)))  # if Holm comes so far
    assert max(float(r["perplexity_p_holm"]) for r in table if float(r["perplexity_p"]) < t.pvalue) <= 0.05
    assert (float(found["perplexity_low"]), float(found["perplexity_high"])) == pytest.approx(tuple(ends))
    assert any(note.startswith("Minimum detectable difference") for note in grid.notes)


def test_tasks_beside_the_average_have_their_own_table(subject):
    found = grids(subject)
    assert "lambada_openai" not in rows(found["table1"])[0]
    assert float(row(found["more-tasks"], method="BlockPruner")["lambada_openai"]) == 25.0
    assert rows(found["table8"])[0]["method"].startswith("not measured: ")
    assert rows(found["table10"])[0]["method"].startswith("not measured: ")


def test_speedups_are_quotients_of_medians_with_intervals(folder, subject):
    name, _, _ = raw(folder, "mha-only", "0.10")
    fields = json.loads((folder / "speed" / "speed.json").read_text())[name]["timed"]
    dense, pruned = (fields[side]["decode_seconds"]["samples"] for side in ("dense", "pruned"))
    found = row(grids(subject)["mha-mlp"], method="MHA only", mha="15")
    assert float(found["decode_speedup"]) == pytest.approx(np.median(dense) / np.median(pruned))
    assert float(found["decode_speedup_low"]) <= float(found["decode_speedup"]) <= float(found["decode_speedup_high"])
    assert float(found["decode_tokens_per_second"]) == pytest.approx(31 / np.median(pruned))
    assert float(found["prefill_tokens_per_second"]) == pytest.approx(
        128 / np.median(fields["pruned"]["prefill_seconds"]["samples"])
    )
    assert float(found["kv_mib"]) == fields["pruned"]["kv_cache_bytes"] / 2**20


def test_the_best_balance_has_the_lowest_perplexity_of_those_fast_enough(subject):
    assert subject.evidence is not None
    for found in rows(grids(subject)["balance"]):
        enough = [
            entry
            for entry in (*subject.evidence.timed("timed"), *subject.evidence.healed)
            if entry.race.speedups[found["part"]].value >= float(found["at_least"])
            and entry.race.speedups[found["part"]].interval.low > 1
        ]
        assert float(found["heldout_ppl"]) == min(entry.model.perplexity for entry in enough)


def test_seeds_are_summed_up_and_tested_in_pairs(folder, subject):
    def found_of(slug: str) -> list[tuple[str, dict[str, Any], dict[str, list[float]]]]:
        return [raw(folder, name, "0.20") for name in (slug, f"{slug}-seed-43", f"{slug}-seed-44")]

    def averages(slug: str) -> list[float]:
        return [float(np.mean([np.mean(v) for v in scores.values()])) for _, _, scores in found_of(slug)]

    def losses(slug: str) -> list[float]:
        return [math.log(facts["perplexity"]["heldout"]["perplexity"]) for _, facts, _ in found_of(slug)]

    found = row(grids(subject)["seeds"], method="ShortGPT")
    ours, base = averages("shortgpt"), averages("blockpruner")
    assert found["seeds"] == "42, 43, 44"
    assert float(found["avg_mean"]) == pytest.approx(100 * np.mean(ours))
    assert float(found["avg_sd"]) == pytest.approx(100 * np.std(ours, ddof=1), abs=1e-9)
    assert float(found["difference"]) == pytest.approx(100 * (np.mean(ours) - np.mean(base)))
    ratio = math.exp(np.mean(losses("shortgpt")) - np.mean(losses("blockpruner")))
    assert float(found["ppl_ratio"]) == pytest.approx(ratio)


def test_agreement_of_sequences(folder, subject):
    base, other = (
        json.loads((folder / "plans" / name / "0.05.json").read_text())
        for name in ("blockpruner", "blockpruner-encyclopaedia")
    )
    found = row(grids(subject)["sensitivity"], calibration="encyclopaedia")
    a, b = set(base["removed"]), set(other["removed"])
    assert float(found["jaccard_0.05"]) == pytest.approx(len(a & b) / len(a | b))
    assert found["jaccard_0.3"] == "" and float(found["rows"]) == 4
    assert 0.8 < float(found["rbo"]) < 1  # the first two are in the other order
    assert float(row(grids(subject)["sensitivity"], calibration="seed 43")["ratio_pct"]) > 15


def test_claims_say_what_the_intervals_say(subject):
    assert subject.evidence is not None
    findings, grid = claims(subject.evidence)
    verdicts = set()
    for found in rows(grid):
        for measure, equal in (("accuracy", 0), ("p_gold", 0), ("perplexity", 1)):
            low, high = (float(found[f"{measure}_{end}"]) for end in ("low", "high"))
            above, below = (FAILS, HOLDS) if measure == "perplexity" else (HOLDS, FAILS)
            assert found[f"by_{measure}"] == (above if low > equal else below if high < equal else OPEN)
            assert (found[f"by_{measure}"] == OPEN) == (float(found[f"{measure}_p_holm"]) > 0.05)
            verdicts.add(found[f"by_{measure}"])
    assert verdicts >= {HOLDS, OPEN}
    assert len(findings) == 5 and {r["claim"] for r in rows(grid)} <= {f.title.partition(": ")[0] for f in findings}
    assert summed([HOLDS, OPEN]).startswith("1 of 2 holds")


def test_a_jump_is_named_with_the_last_safe_budget(subject):
    evidence = subject.evidence
    assert evidence is not None and not any(f.rule == "jump" for f in evidence.findings)
    search = evidence.searches["blockpruner"]
    broken = tuple(value * (2 if i > 5 else 1) for i, value in enumerate(search.perplexities))
    entries = (replace(e, curve=broken) if e.variant.name == "BlockPruner" else e for e in evidence.entries)
    changed = replace(evidence, entries=tuple(entries))
    jump = next(f for f in changed.findings if f.rule == "jump")
    assert f"removal 6 ({search.order[5]})" in jump.title and "5blocks" in jump.text
    marked = [e for e in changed.of("blockpruner") if "jump" in signs(e)]
    assert marked == [e for e in changed.of("blockpruner") if len(e.plan.order) > 5]


def test_the_same_files_give_the_same_bytes(folder, run, subject):
    again = read_subject("smollm2-paper", run, LABELS, folder)
    for name, grid in grids(again).items():
        assert to_csv(grid) == to_csv(grids(subject)[name]) and to_latex(grid) == to_latex(grids(subject)[name])
    figure = next(figure for figure in FIGURES if figure.name == "figure5")
    assert draw(figure, [again.evidence]) == draw(figure, [subject.evidence])


def test_the_report_has_all_files_and_loads_nothing(written, subject, page):
    for name, grid in grids(subject).items():
        assert (written / "tables" / f"{name}.csv").read_text() == to_csv(grid)
    for grid in page.grids:
        assert (written / "tables" / f"{grid.name}.tex").read_text() == to_latex(grid)
    assert "| tiny | dense |" in (written / "report.md").read_text()
    html = (written / "index.html").read_text()
    assert "a &lt;tiny&gt; model" in html and "<tiny>" not in html
    assert not re.search(r"""(src|href)=["'](?!#|data:image/svg)""", html) and "default-src 'none'" in html
    assert {
        "healing",
        "figure1",
        "figure4",
        "figure5",
        "figure6",
        "figure7",
        "figure10",
        "quality-speed",
        "quality-memory",
    } == {path.stem for path in (written / "plots").glob("*.svg")}
    assert "Table 3 and Figure 9: this project holds neither" in html and "Figures 2 and 3 explain the method" in html
    assert "Figure 8, recovery by LoRA: what training brings here stands under Search and healing" in html
    assert "Search and healing" in [section.title for section in page.sections] and "trains no model" not in html


@pytest.mark.parametrize("kept", [set(), {"main"}, {"timed"}])
def test_a_study_that_is_not_timed_has_all_other_tables(kept, folder, run, page, tmp_path):
    shutil.copytree(folder, tmp_path / "study")
    speeds = read_json(folder / "speed" / "speed.json")
    less = {
        model: {key: times for key, times in by_setting.items() if key in kept} for model, by_setting in speeds.items()
    }
    write_json(tmp_path / "study" / "speed" / "speed.json", less)
    found = build_set("test", [read_subject("smollm2-paper", run, LABELS, tmp_path / "study")], PUBLISHED)
    text, timed = to_markdown(found), {"table6": "main", "budgets": "timed", "mha-mlp": "timed"}
    empty = {grid.name for grid in page.grids} - {grid.name for grid in found.grids}
    assert empty == ({"mha-mlp", "balance"} if "timed" not in kept else set()) | (set() if kept else {"speed"})
    for grid in found.grids:
        ours = [r for r in rows(grid) if r.get("source", "here") == "here"]
        ours = [r for r in ours if not r.get("method", "").startswith("no such search")]
        if grid.name in timed:
            assert bool(ours) == (timed[grid.name] in kept), grid.name
            assert ("ot timed." in " ".join(grid.notes)) != (timed[grid.name] in kept)
    assert ("No verdict without times" in text) == ("timed" not in kept)
    table1 = [next(to_csv(g) for g in p.grids if g.name == "table1") for p in (found, page)]
    assert table1[0] == table1[1]


@pytest.mark.parametrize(
    ("path", "damage", "message"),
    [
        *(
            (path, Path.unlink, r"python -m flows.paper.*dvc repro runs/dvc.yaml:\w+@smollm2-paper")
            for path in ("results/models.json", "speed/speed.json", "plans/shortgpt/0.20.json")
        ),
        (
            "plans/blockpruner/0.10.json",
            lambda path: write_json(path, read_json(path) | {"removed": read_json(path)["removed"][1:]}),
            "of other plans",
        ),
        ("results/items.parquet", lambda path: write_table(path, pq.read_table(path).slice(1)), "different items of"),
    ],
)
def test_files_that_are_missing_or_disagree_are_refused(path, damage, message, folder, run, tmp_path):
    shutil.copytree(folder, tmp_path / "study")
    damage(tmp_path / "study" / path)
    with pytest.raises(InputError, match=message):
        read_subject("smollm2-paper", run, LABELS, tmp_path / "study")


def test_every_verdict_and_table_of_ours_tells_what_it_holds_for(page):
    blocks = [block for section in page.sections for block in section.blocks]
    stated = [finding for block in blocks if isinstance(block, Findings) for finding in block.of]
    words = "Holds for tiny, float32, search: exact; calibration: see Conditions."
    assert len(stated) > 5 and all(finding.text.endswith(words) for finding in stated)
    ours = [grid for grid in page.grids if not grid.name.endswith(("-paper", "-tests"))]
    assert all("search: exact" in " ".join(grid.notes) for grid in ours)
    (said,) = next(section for section in page.sections if section.title == "Conditions").blocks
    assert said.startswith("tiny: a <tiny> model; search: exact; calibration: instructions; held-out text: an encyc")


def test_a_table_without_rows_is_left_out(subject, monkeypatch):
    filled, empty = (lambda found, rows=rows: replace(stopping(found), title=f"{rows} rows") for rows in ("all", "no"))
    monkeypatch.setattr("blockpruner.paper.page.GRIDS", (filled, lambda found: replace(empty(found), rows=())))
    for others in ("TABLES", "FIGURES", "SCATTERS"):
        monkeypatch.setattr(f"blockpruner.paper.page.{others}", ())
    titles = [section.title for section in build_set("test", [subject], PUBLISHED).sections]
    assert "all rows" in titles and "no rows" not in titles


def test_healed_models_stand_beside_plain_ones_and_are_held_against_those_healed_alike(subject, folder):
    """The oracle: perplexities of the files, and their quotients by hand."""
    table, tests = healing_grids([subject.evidence])
    facts = json.loads((folder / "results" / "models.json").read_text())
    dense = np.array(facts["dense"]["perplexity"]["heldout"]["row_nll"])
    rows = {}
    for i, row in enumerate(table.rows):
        cells = dict(zip([column.key for column in table.columns], row, strict=True))
        rows.setdefault(round(cells["ratio_pct"].value), []).append((cells, i in table.strong))
    healed = [c for cells in rows.values() for c, _ in cells if c["method"].endswith(" + refit")]
    assert {c["method"] for c in healed} == {
        "BlockPruner + refit", "floating search + refit", "greedy layers + refit",
    }  # fmt: skip
    by_value = {model["perplexity"]["heldout"]["perplexity"]: model for model in facts.values()}
    for cells in healed:
        own = by_value[cells["heldout_ppl"].value]["perplexity"]["heldout"]["row_nll"]
        assert cells["heldout_ratio"].value == pytest.approx(math.exp((np.array(own) - dense).mean()))
        assert cells["heldout_ratio"].low < cells["heldout_ratio"].value < cells["heldout_ratio"].high
    for group in compared(subject.evidence):
        assert len({(entry.share, entry.healing) for entry in group}) == 1
        assert group[0].model.perplexity == min(entry.model.perplexity for entry in group)
    for row in tests.rows:
        pair = dict(zip([column.key for column in tests.columns], row, strict=True))
        assert pair["method"].startswith("floating search")
        assert pair["method"].endswith(" + refit") == pair["against"].endswith(" + refit")


def test_goals_stand_beside_what_was_measured(subject):
    """Each ratio is computed anew from the rows' losses."""
    evidence = subject.evidence
    plain, healed = evidence.of("floating-search")[0], next(e for e in evidence.healed if not e.plan.train)

    def ppl(entry, text="heldout"):
        return math.exp(np.mean(entry.model.texts[text].row_nll))

    def dense(text="heldout"):
        return math.exp(np.mean(evidence.dense.model.texts[text].row_nll))

    def goal(entry, **more):
        given = {"method": entry.variant.method, "budget": entry.budget, "at_most": 1e9}
        return SetGoal(**given | {"compensate": entry.plan.compensate, "train": entry.plan.train} | more)

    others = [e for group in compared(evidence) if healed in group for e in group if e is not healed]
    ratio = ppl(plain) / dense()
    expected = {
        goal(plain): ratio,
        goal(plain, at_most=ratio + 1e-9): ratio,
        goal(plain, at_most=ratio / 2): ratio,
        goal(healed, measure="wikitext2"): ppl(healed, "wikitext2") / dense("wikitext2") / (ppl(healed) / dense()),
        goal(healed, measure="peers"): ppl(healed) / min(map(ppl, others)),
    }  # fmt: skip
    found = goals_grid(tuple(expected), [evidence])
    measured = [row[5] for row in found.rows]
    assert [cell.value for cell in measured] == pytest.approx(list(expected.values()))
    assert all(cell.low < cell.value < cell.high for cell in measured)
    assert [row[6] for row in found.rows] == ["yes", "by the point", "no", "yes", "yes"]
    (confident,) = goals_grid([goal(healed, measure="p", at_most=2)], [evidence]).rows
    found = stratified_t(healed.dense.p_gold, healed.model.p_gold)
    errors = abs(found.value) / ((found.interval.high - found.value) / 1.96)
    assert confident[5].value == pytest.approx(errors) and confident[6] == ("yes" if errors <= 2 else "no")
    bare = replace(healed, model=replace(healed.model, texts={"heldout": healed.model.texts["heldout"]}))
    (unknown,) = goals_grid([goal(healed, measure="wikitext2")], [replace(evidence, entries=(), healed=(bare,))]).rows
    assert unknown[5] == "not measured" and healed.budget in unknown[1]
    (absent,) = goals_grid([goal(plain, budget="0.9")], [evidence]).rows
    assert absent[5:7] == ("not measured", "")
    page = build_set("test", [subject], PUBLISHED, (goal(plain),))
    assert "Goals" in [section.title for section in page.sections]
