"""The report: its numbers are the inputs' numbers, its warnings come when they should, its page loads nothing."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockpruner.core.blocks import Mask, format_mask, parse_mask, removable_units
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.evaluation.store import ITEMS
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.commit import commit_run, save_iterations
from blockpruner.methods.score import score_run
from blockpruner.reporting.comparison import front
from blockpruner.reporting.findings import Level, findings, first_jump, is_mismatch, recommended
from blockpruner.reporting.inputs import (
    ITERATIONS,
    Considered,
    RunLabels,
    Study,
    considered,
    paired,
    read_iterations,
    read_studies,
    removals,
)
from blockpruner.reporting.markdown import render_markdown
from blockpruner.reporting.methods import METRIC_WORDS, SEARCH_WORDS, UNSCORED
from blockpruner.reporting.page import Page, build_page
from blockpruner.reporting.plots import plots
from blockpruner.reporting.report import write_report
from blockpruner.reporting.tables import curve_csv, headline, sequence
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.work import ScoredRows
from blockpruner.search import SEARCHES, iteration
from blockpruner.search.trace import read_current, read_trace, trace_directory
from blockpruner.store.files import write_json

LAYERS, ROWS = 12, 4
MHA, MLP, TOTAL = 900_000, 2_700_000, 60_000_000
CHANCE = {"piqa": 0.5, "winogrande": 0.5, "arc_easy": 0.25}
LABEL = RunLabels("tiny 1.0 (float32)", "Alpaca prompts", "Wikipedia", "stock tasks")
LABELS = dict.fromkeys(("tiny", "shortgpt", "kl", "random", "swap", "laco", "slicegpt"), LABEL)


@dataclass(frozen=True)
class World:
    """What the fixture writes; a test changes one field. costs: NLL rise of each removal; speedups: by target."""

    run: str = "tiny"
    method: str = "greedy"
    metric: str = "perplexity"
    layers: int = LAYERS
    costs: tuple[float, ...] = (0.03, 0.035, 0.04, 0.05, 0.06, 0.07)
    removals: tuple[tuple[str, int], ...] = (("tiny-a", 3), ("tiny-b", 6))
    heldout_factor: float = 1.2
    speedups: tuple[float, ...] = (1.05, 1.12)
    accuracy_loss: float = 0.0
    items: int = 50
    spread: float = 0.2
    candidates: str = "all"
    unit: str = "block"
    losers: bool = False


def build(data: Path, world: World = World()) -> Path:
    """Write plans, results and metrics of one run as the stages do."""
    random = np.random.default_rng(0)
    units = removable_units(world.layers, world.unit, world.candidates)
    extra = {u: world.spread * (1 + float(w)) for u, w in zip(units, random.permutation(len(units)), strict=True)}
    extra |= {u: 40 * world.spread for u in units if any(block.layer == 0 for block in u)}
    queue = sorted(units, key=extra.__getitem__)
    rows: list[dict[str, Any]] = [_row(0, Mask(), None, 2.5, False)]
    nll, removed, masks, nlls = 2.5, Mask(), [], [2.5]
    for index, cost in enumerate(world.costs):
        chosen = queue[index]
        for unit in units:
            if not unit <= removed:
                rise = cost + (0.0 if unit == chosen else extra[unit] * (1 + 0.05 * index))
                rows.append(_row(index, removed | unit, format_mask(unit), nll + rise, unit == chosen))
        if world.losers:
            worst = format_mask(queue[-1])
            lie = next(r for r in rows if r["iteration"] == index and r["added"] == worst)
            lie.update(loss=nll - 5.0, perplexity=math.exp(nll - 5.0), rows_used=1, row_loss=[nll - 5.0])
        removed, nll = removed | chosen, nll + cost
        masks.append(removed)
        nlls.append(nll)
    searched = world.method not in ("laco", "slicegpt")
    rows = [told for row in rows if (told := _told(world, row))]
    results(data / "results" / f"{world.run}-dense", world, 0, 0.0, None)
    for position, (target, count) in enumerate(world.removals):
        plan = {
            "kind": "mask", "target": target, "run": world.run, "budget": f"{count}blocks", "method": world.method,
            "metric": world.metric, "search": "f00d", "layers": world.layers,
            "removed": format_mask(masks[count - 1]).split(","),
            "order": [format_mask(unit) for unit in queue[:count]], "ratio": _ratio(masks[count - 1]),
            "ratios": [_ratio(mask) for mask in masks[:count]],
            "blocks": {kind: sum(b.kind == kind for b in masks[count - 1]) for kind in ("mha", "mlp")},
            "parameters": {"dense": TOTAL, "pruned": round(TOTAL * (1 - _ratio(masks[count - 1])))},
            "calibration": {"rows": ROWS, "tokens": 512, "dense_perplexity": math.exp(nlls[0]),
                            "perplexity": math.exp(nlls[count])},
        }  # fmt: skip
        used = [row for row in rows if row["iteration"] < count]
        if world.method == "swap":
            plan |= {"order": [format_mask(masks[count - 1])], "ratios": [plan["ratio"]], "nested": False}
            used = _swapped(masks, nlls, count)
        plan |= _transform(world, plan, count)
        write_json(data / "plans" / target / "plan.json", plan)
        if searched:
            pq.write_table(pa.Table.from_pylist(used, ITERATIONS), data / "plans" / target / "iterations.parquet")
        heldout = world.heldout_factor * (nlls[count] - nlls[0])
        results(data / "results" / target, world, position + 1, heldout, (world.speedups[position], plan))
    counts = {"trials_computed": 123, "trials_reused": 45, "seconds": 67.0, "units_computed": 123, "iterations": 6}
    if searched:
        write_json(data / "metrics" / world.run / "score.json", counts)
    return data


def _told(world: World, row: dict[str, Any]) -> dict[str, Any] | None:
    """A row of greedy by perplexity as the world's method and metric leave it, None if they leave none.

    KL is a tenth of the rise of NLL over the dense model, an influence three tenths of that over the model before.
    """
    is_kept = row["chosen"] or not row["removed"]
    if not is_kept and (world.method in ("random", "given") or (world.method == "one_shot" and row["iteration"])):
        return None
    if world.metric == "kl":
        row = row | {"loss": 0.1 * (row["loss"] - 2.5)}
    elif world.metric == "block_influence":
        row = row | {"loss": 0.3 * (row["loss"] - 2.5 - sum(world.costs[: row["iteration"]]))}
    if world.metric != "perplexity" and not is_kept:
        row = row | {"perplexity": None, "row_nll": None}
    if world.method in ("random", "given") or (world.method == "one_shot" and row["iteration"]):
        row = row | {"loss": None, "rows_used": 0, "row_loss": []}
    return row


def _swapped(masks: list[Mask], nlls: list[float], count: int) -> list[dict[str, Any]]:
    """Two steps to the mask of `count` removals; two others lose, one of them after one row."""
    rows = [_row(0, Mask(), None, nlls[0], False), _row(0, masks[count - 2], None, nlls[count] + 0.2, True)]
    loser = masks[count - 1] ^ masks[0]
    rows += [_row(1, masks[count - 1], None, nlls[count], True), _row(1, loser, None, 9.0, False)]
    return [*rows, _row(1, masks[count - 1] | parse_mask("mlp.0"), None, 1.0, False) | {"rows_used": 1}]


def _transform(world: World, plan: dict[str, Any], count: int) -> dict[str, Any]:
    """What is different in the plan of a change of weights that leaves no sequence of removals."""
    changed: dict[str, Any] = {"removed": [], "order": [], "ratios": [], "nested": False}
    if world.method == "laco":
        merges = [f"{world.layers - 3 - i}+1" for i in range(count)]
        details = {"variant": "repo", "merges": merges, "threshold": 0.65}
        return changed | {"kind": "laco", "order": merges, "metric": "cosine", "blocks": {"mha": count, "mlp": count},
                          "details": details}  # fmt: skip
    if world.method == "slicegpt":
        calibration = plan["calibration"] | {"dense_perplexity": None, "perplexity": None}
        return changed | {"kind": "slicegpt", "metric": "", "blocks": {"mha": 0, "mlp": 0}, "calibration": calibration,
                          "details": {"width": 576 - 32 * count, "hidden": 576}}  # fmt: skip
    return {}


def _ratio(mask: Mask) -> float:
    return sum(MHA if b.kind == "mha" else MLP for b in mask) / TOTAL


def _row(iteration: int, removed: Mask, added: str | None, nll: float, chosen: bool) -> dict[str, Any]:
    return {
        "iteration": iteration, "removed": format_mask(removed).split(",") if removed else [], "added": added,
        "loss": nll, "perplexity": math.exp(nll), "rows_used": ROWS, "rows_total": ROWS, "chosen": chosen,
        "row_loss": [nll] * ROWS, "row_nll": [nll] * ROWS, "lazy_choice": None,
    }  # fmt: skip


def results(path: Path, world: World, position: int, heldout: float, pruned: tuple[float, Any] | None) -> None:
    path.mkdir(parents=True)
    random = np.random.default_rng(7)
    items, tasks, n = [], {}, world.items
    for task, chance in CHANCE.items():
        right = random.permutation(n) < round(n * (0.52 if task == "winogrande" else chance + 0.3))
        lost = random.random(n) < world.accuracy_loss * position
        score = (right & ~lost).astype(float)
        stderr = math.sqrt(score.mean() * (1 - score.mean()) / (n - 1))
        tasks[task] = {"metric": "acc", "value": score.mean(), "stderr": stderr, "acc": score.mean(),
                       "acc_stderr": stderr, "acc_norm": None, "acc_norm_stderr": None, "items": n}  # fmt: skip
        unread = {"gold": 0, "loglikelihoods": [], "prompt_hash": "", "acc_norm": None}
        items += [{"task": task, "item": i, "acc": s} | unread for i, s in enumerate(score)]
    average = {"value": np.mean([t["value"] for t in tasks.values()]),
               "stderr": math.sqrt(sum(t["stderr"] ** 2 for t in tasks.values())) / len(tasks)}  # fmt: skip
    parameters = pruned[1]["parameters"]["pruned"] if pruned else TOTAL
    speed: dict[str, Any] = {"dense": _speed(1.0, TOTAL, 24)}
    if pruned:
        factor, plan = pruned
        speed["pruned"] = _speed(factor, parameters, 24 - 2 * plan["blocks"]["mha"])
        speed |= {"speedup_prefill": factor - 0.01, "speedup_decode": factor + 0.01, "speedup_generation": factor}
    perplexity = {"perplexity": 20 * math.exp(heldout), "nll": math.log(20) + heldout, "rows": 6, "tokens": 6144,
                  "seq_len": 1024}  # fmt: skip
    write_json(path / "results.json", {"parameters": parameters, "weight_bytes": 4 * parameters, "speed": speed,
               "perplexity": perplexity, "tasks": tasks, "average": average, "chance": CHANCE})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(items, ITEMS), path / "items.parquet")


def _speed(factor: float, parameters: int, kibibytes: int) -> dict[str, Any]:
    seconds = 2.0 / factor
    return {
        "generation_seconds": {"median": seconds, "min": seconds * 0.98, "max": seconds * 1.02},
        "prefill_tokens_per_second": 800 * factor, "decode_tokens_per_second": 16 * factor,
        "kv_cache_bytes": 1024 * kibibytes, "weight_bytes": 4 * parameters, "peak_memory_bytes": 4 * parameters,
        "peak_memory": "weights + KV cache", "prompt_tokens": 64, "new_tokens": 32, "batch": 1, "repeats": 5,
        "threads": 2, "device": "cpu", "dtype": "float32",
    }  # fmt: skip


def study(tmp_path: Path, world: World = World()) -> Study:
    build(tmp_path, world)
    return read_studies([name for name, _ in world.removals], LABELS, tmp_path)[0]


def rules(found: Study) -> list[tuple[str, str]]:
    return [(f.rule, f.level) for f in findings(found) if f.level is Level.WARNING]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = build(tmp_path_factory.mktemp("report"))
    write_report(data / "report", "A <b>bold</b> | title & more", ["tiny-b", "tiny-a"], LABELS, data, True)
    return data / "report"


def test_report_is_complete_and_its_tables_hold_the_inputs(report: Path) -> None:
    data = report.parent
    names = [f"tiny-{plot}" for plot in ("pareto", "perplexity", "accuracy", "speed", "tasks")] + [
        "tiny-b-map",
        "tiny-b-heat",
    ]
    assert {p.relative_to(report).as_posix() for p in report.rglob("*") if p.is_file()} == {
        "report.md", "index.html", "curve.csv", "iterations.csv", "pareto.csv",
        *(f"plots/{name}.{kind}" for name in names for kind in ("svg", "png")),
    }  # fmt: skip
    dense, a, b = (_json(data / "results" / name / "results.json") for name in ("tiny-dense", "tiny-a", "tiny-b"))
    markdown, page = (report / "report.md").read_text(), (report / "index.html").read_text()
    perplexities = [f"{r['perplexity']['perplexity']:.2f}" for r in (dense, a, b)]
    assert f"| **Held-out perplexity** | **–** | {' | '.join(f'**{p}**' for p in perplexities)} |" in markdown
    assert "".join(f"<td>{p}</td>" for p in perplexities) in page
    for result in (dense, a, b):
        for task in result["tasks"].values():
            assert f"{100 * task['value']:.1f} ± {100 * task['stderr']:.1f}" in page
        assert f"{100 * result['average']['value']:.1f} ± {100 * result['average']['stderr']:.1f}" in page
        assert f"{result['parameters'] / 1e6:.1f} M" in page
    plan = _json(data / "plans" / "tiny-b" / "plan.json")
    assert f"{100 * plan['ratio']:.1f} %" in page
    assert f"{plan['blocks']['mha']} MHA + {plan['blocks']['mlp']} MLP" in page
    assert "1.05×" in page
    assert "1.12×" in page
    assert "896.0 (1.11×)" in page
    assert "computed 123 trials" in page
    assert "reused 45" in page
    assert "4 rows, 512 tokens" in page
    assert "python " in page
    assert "± 7" in page
    assert "standard error is about 7 points" in page


def test_a_perplexity_is_a_row_of_its_own_and_in_no_average(tmp_path: Path) -> None:
    data = build(tmp_path)
    directories = sorted((data / "results").iterdir())
    for number, path in enumerate(directories):
        fields = _json(path / "results.json")
        fields["tasks"]["wikitext"] = {"metric": "word_perplexity", "value": 30.0 + number, "stderr": None, "items": 2}
        fields["tasks"]["gsm8k"] = {"metric": "exact_match", "value": 0.5, "stderr": 0.5, "items": 2}
        fields["chance"] |= {"wikitext": None, "gsm8k": 0.0}
        write_json(path / "results.json", fields)
        blank = {"loglikelihoods": [], "prompt_hash": ""}
        rows = [{"task": "gsm8k", "item": i, "exact_match": float(i)} | blank for i in range(2)]
        rows += [{"task": "wikitext", "item": i} | blank for i in range(2)]
        tables = [pq.read_table(path / "items.parquet").cast(ITEMS), pa.Table.from_pylist(rows, ITEMS)]
        pq.write_table(pa.concat_tables(tables), path / "items.parquet")
    (found,) = read_studies(["tiny-a", "tiny-b"], LABELS, data)
    results = [found.dense, *(target.result for target in found.targets)]
    assert [list(result.tasks) for result in results] == [[*CHANCE, "gsm8k"]] * 3
    assert {task for task, _ in found.dense.items} == {*CHANCE, "gsm8k"}
    assert found.dense.items["gsm8k", "1"] == 1.0
    values = [30.0 + [path.name for path in directories].index(name) for name in ("tiny-dense", "tiny-a", "tiny-b")]
    assert [result.perplexities for result in results] == [{"wikitext, word perplexity": value} for value in values]
    write_report(data / "report", "title", ["tiny-b", "tiny-a"], LABELS, data, False)
    markdown = (data / "report" / "report.md").read_text()
    assert f"| wikitext, word perplexity | – | {' | '.join(f'{value:.2f}' for value in values)} |" in markdown
    assert "| gsm8k, % | 0.0 | 50.0 ± 50.0" in markdown
    fields["tasks"], fields["chance"] = {"wikitext": fields["tasks"]["wikitext"]}, {"wikitext": None}
    write_json(data / "results" / "tiny-dense" / "results.json", fields)
    with pytest.raises(InputError, match=r"no task that is scored by accuracy.*zero_shot\.tasks beside wikitext"):
        read_studies(["tiny-a"], LABELS, data)


def test_csv_files_hold_full_precision(report: Path) -> None:
    curve = list(csv.DictReader((report / "curve.csv").open()))
    assert [row["target"] for row in curve] == ["tiny-dense", "tiny-a", "tiny-b"]
    plan, result = (_json(report.parent / p) for p in ("plans/tiny-b/plan.json", "results/tiny-b/results.json"))
    assert float(curve[2]["ratio"]) == plan["ratio"]
    assert int(curve[2]["removals"]) == 6
    assert float(curve[2]["perplexity_heldout"]) == result["perplexity"]["perplexity"]
    assert float(curve[2]["perplexity_calibration"]) == plan["calibration"]["perplexity"]
    assert float(curve[2]["accuracy"]) == result["average"]["value"]
    assert float(curve[0]["ratio"]) == 0
    steps = list(csv.DictReader((report / "iterations.csv").open()))
    assert [row["removed"] for row in steps] == ["", *plan["order"]]
    assert [float(row["ratio"]) for row in steps] == [0.0, *plan["ratios"]]
    nll = 2.5 + np.cumsum([0, *World().costs])
    assert np.allclose([float(row["perplexity"]) for row in steps], np.exp(nll), rtol=1e-12)
    assert [int(row["units_scored"]) for row in steps] == [0, 24, 23, 22, 21, 20, 19]


class _Page(HTMLParser):
    """Collects everything that a browser would load, and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "data", "srcset")]


def test_page_loads_nothing_and_escapes_its_title(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = _Page()
    page.feed(text)
    assert all(target[1:] in page.ids for target in page.loads if not target.startswith("data:image/png;base64,"))
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"https?://[^\"' <]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "<h1>A &lt;b&gt;bold&lt;/b&gt; | title &amp; more</h1>" in text
    assert "<b>bold" not in text
    assert (report / "report.md").read_text().startswith(r"# A \<b\>bold\</b\> \| title \& more")


def test_same_inputs_give_the_same_bytes(report: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "r", "A <b>bold</b> | title & more", ["tiny-b", "tiny-a"], LABELS, report.parent, True)
    for path in (p for p in report.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "r" / path.relative_to(report)).read_bytes(), path


def test_without_plots_the_old_folder_is_replaced(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "report" / "plots").mkdir(parents=True)
    write_report(tmp_path / "report", "t", ["tiny-a"], LABELS, tmp_path, False)
    names = sorted(p.name for p in (tmp_path / "report").iterdir())
    assert names == ["curve.csv", "index.html", "iterations.csv", "pareto.csv", "report.md"]
    assert "<svg" not in (tmp_path / "report" / "index.html").read_text()


def test_healthy_run_has_no_warning(tmp_path: Path) -> None:
    assert rules(study(tmp_path)) == []


@pytest.mark.parametrize(
    ("costs", "index"),
    [
        ((0.03, 0.035, 0.04, 0.05, 0.35, 0.07), 4),
        ((0.03, 0.03, 0.08, 0.03, 0.03, 0.03), None),  # over the factor, under JUMP_NATS
        ((0.2, 0.25, 0.3, 0.35, 0.38, 0.4), None),  # steep but steady
        ((0.45, 0.1, 0.1, 0.1, 0.1, 0.1), 0),  # a collapse at once
        ((0.2, 0.25, 0.3, 0.35, 0.41, 0.4), 4),  # a collapse at the end of a slope
    ],
)
def test_jump(tmp_path: Path, costs: tuple[float, ...], index: int | None) -> None:
    found = study(tmp_path, replace(World(), costs=costs))
    (trace,) = found.traces
    assert first_jump(trace.removals) == index
    warning = next((f for f in findings(found) if f.rule == "jump"), None)
    assert (warning is None) == (index is None)
    if warning is not None and index is not None:
        assert trace.plan.order[index] in warning.title
        safe = f"{index}blocks (ratio {trace.plan.ratios[index - 1]:.4f})"
        assert (safe if index else "no budget of this sequence") in warning.text
        assert f"to {math.exp(2.5 + sum(costs[: index + 1])):.2f} at" in warning.text


def test_mismatch_needs_a_factor_and_a_distance(tmp_path: Path) -> None:
    """Calibration rises by 0.105 and 0.285 nats: 1.5 times that plus 0.1 is 2.45 and 1.85 times it."""
    assert rules(study(tmp_path / "0", replace(World(), heldout_factor=1.8))) == []
    for factor, names in ((2.0, ["tiny-b"]), (2.5, ["tiny-a", "tiny-b"])):
        found = study(tmp_path / str(factor), replace(World(), heldout_factor=factor))
        (warning,) = [f for f in findings(found) if f.level is Level.WARNING]
        assert warning.rule == "mismatch"
        assert re.findall(r"tiny-\w", warning.text) == names
        assert f"{math.exp(0.285 * factor):.2f}× against 1.33× at tiny-b" in warning.text
    assert rules(study(tmp_path / "3", replace(World(), heldout_factor=0.1))) == []


def test_little_speed_up_names_the_mlp(tmp_path: Path) -> None:
    """Six MLP blocks are 27 % of the parameters; half of the ideal gain of 37 % is 18.5 %."""
    mostly_mlp = replace(World(), candidates="mlp", speedups=(1.09, 1.18))
    (warning,) = [f for f in findings(study(tmp_path / "0", mostly_mlp)) if f.level is Level.WARNING]
    assert warning.rule == "slow"
    assert "Mostly MLP" in warning.text
    assert re.findall(r"tiny-\w", warning.text) == ["tiny-b"]
    assert "27.0 %" in warning.text
    assert "1.18×" in warning.text
    assert "1.37×" in warning.text
    assert rules(study(tmp_path / "1", replace(mostly_mlp, speedups=(1.09, 1.19)))) == []
    low = replace(World(), candidates="mha", speedups=(1.0, 1.0))  # 9 % of the parameters
    assert rules(study(tmp_path / "2", low)) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"speedups": (1.10, 1.12)}, "tiny-a"),  # 83 % of the gain for 37 % of the loss
        ({"speedups": (1.02, 1.12)}, "tiny-b"),  # 17 % of the gain for 37 % of the loss
        ({"speedups": (0.99, 1.12)}, "tiny-b"),
        ({"speedups": (0.98, 0.99)}, None),
        ({"costs": (0.03, 0.03, 0.03, 0.9, 0.9, 0.9)}, "tiny-a"),  # tiny-b is past a jump
        ({"costs": (0.9, 0.03, 0.03, 0.03, 0.03, 0.03)}, None),
        ({"heldout_factor": -0.5}, "tiny-b"),
        ({"heldout_factor": 2.0}, "tiny-a"),  # tiny-b has a mismatch
    ],
)
def test_recommended_stop(tmp_path: Path, change: dict[str, Any], name: str | None) -> None:
    found = study(tmp_path, replace(World(), **change))
    best = recommended(found)
    assert (best and best.name) == name
    advice = next(f for f in findings(found) if f.level is Level.ADVICE)
    assert name in advice.title if name else "No target" in advice.title


def test_racing_losers_are_in_no_ranking_curve_or_heat_map(tmp_path: Path) -> None:
    """Every iteration holds a row over one calibration row with the lowest NLL of all."""
    plain, raced = study(tmp_path / "0"), study(tmp_path / "1", replace(World(), losers=True))
    (honest,), (other,) = plain.traces, raced.traces
    for left, right in zip(honest.removals, other.removals, strict=True):
        assert right.partial == 1
        assert left.partial == 0
        assert (right.added, right.perplexity, right.rise) == (left.added, left.perplexity, left.rise)
        assert len(right.costs) == len(left.costs) - 1
        assert right.costs.items() <= left.costs.items()
        assert min(right.costs.values()) == right.rise
    assert [f.text for f in findings(plain)] == [f.text for f in findings(raced)]


def test_the_page_says_what_was_spared_and_what_audits_found(tmp_path: Path) -> None:
    """Iteration 1 without two of its candidates; an audit in 2 that agrees and one in 3 that does not."""
    build(tmp_path, replace(World(), losers=True))
    path = tmp_path / "plans" / "tiny-b" / "iterations.parquet"
    rows = pq.read_table(path).to_pylist()
    skipped = [row for row in rows if row["iteration"] == 1 and not row["chosen"] and row["rows_used"] == ROWS][-2:]
    rows = [row for row in rows if row not in skipped]
    choice = {i: next(row["added"] for row in rows if row["iteration"] == i and row["chosen"]) for i in (2, 3)}
    other = next(row["added"] for row in rows if row["iteration"] == 3 and not row["chosen"])
    for row in rows:
        if row["iteration"] in (2, 3):
            row["lazy_choice"] = row["added"] == {2: choice[2], 3: other}[row["iteration"]]
    pq.write_table(pa.Table.from_pylist(rows, ITERATIONS), path)
    page = build_page("t", read_studies(["tiny-b"], LABELS, tmp_path), draw=False)
    text = dict(page.sections[0].facts)["Search"]
    everything = sum(2 * LAYERS - i for i in range(6))
    computed = (everything - 2 - 6 + 6 / ROWS) / everything
    assert f"{everything - 8} candidates scored on all rows in 6 iterations of {everything}; 6 were dropped" in text
    assert f"2 not considered: {100 * computed:.1f} %" in text
    assert f"2 audits, which chose otherwise: {choice[3]}, not {other}" in text


def test_a_recovered_target_says_so(tmp_path: Path) -> None:
    """Two targets with one budget, of which tiny-a was trained: it stands behind the other, marked."""
    build(tmp_path, replace(World(), removals=(("tiny-a", 3), ("tiny-b", 3))))
    path = tmp_path / "plans" / "tiny-a" / "plan.json"
    write_json(path, _json(path) | {"recover": True})
    labels = {"tiny": replace(LABELS["tiny"], recovery="8,000 samples")}
    (section,) = build_page("t", read_studies(["tiny-a", "tiny-b"], labels, tmp_path), draw=False).sections
    assert section.headline.head == ("", "chance", "dense", "tiny-b", "tiny-a")
    assert ("Trained since", "–", "no", "no", "LoRA") in section.headline.rows
    assert dict(section.facts)["Recovery"] == "LoRA on 8,000 samples: tiny-a"
    titles = [finding.title for finding in section.findings if finding.level is Level.RESULT]
    assert [title.endswith("then recovered with LoRA") for title in titles] == [False, True]
    build(tmp_path / "plain")
    (section,) = build_page("t", read_studies(["tiny-a"], labels, tmp_path / "plain"), draw=False).sections
    assert "Recovery" not in dict(section.facts)
    assert "Trained since" not in [row[0] for row in section.headline.rows]


def test_a_partial_row_cannot_be_chosen(tmp_path: Path) -> None:
    build(tmp_path)
    path = tmp_path / "plans" / "tiny-a" / "iterations.parquet"
    rows = pq.read_table(path).to_pylist()
    next(row for row in rows if row["chosen"])["rows_used"] = 1
    pq.write_table(pa.Table.from_pylist(rows, ITERATIONS), path)
    with pytest.raises(InputError, match=r"0 fully scored choices in iteration 0.*dvc repro"):
        read_studies(["tiny-a"], LABELS, tmp_path)


def test_paired_errors_match_numpy_and_mark_only_real_differences(tmp_path: Path) -> None:
    found = study(tmp_path, replace(World(), accuracy_loss=0.25))
    dense, target = found.dense, found.targets[1]
    errors = []
    for task in CHANCE:
        left, right = ([r.items[task, str(i)] for i in range(50)] for r in (dense, target.result))
        d = np.array(right) - np.array(left)
        errors.append(d.std(ddof=1) / math.sqrt(50))
        assert paired(dense, target.result, task).value == pytest.approx(d.mean())
        assert paired(dense, target.result, task).stderr == pytest.approx(errors[-1])
    average = paired(dense, target.result)
    assert average.stderr == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3)
    assert average.value < -2 * average.stderr
    row = next(row for row in headline(found).rows if row[0] == "Average, %")
    assert row[-1].endswith("↓")
    assert not row[2].endswith("↓")
    winogrande = next(row for row in headline(found).rows if row[0] == "winogrande, %")
    assert winogrande[1] == "50.0"
    assert winogrande[2] == "52.0 ± 7.1 †"
    assert "winogrande (dense, tiny-a)" in next(f for f in findings(found) if f.rule == "noise").text


def test_equal_models_are_within_noise(tmp_path: Path) -> None:
    found = study(tmp_path)
    assert not any("↓" in cell or "↑" in cell for row in headline(found).rows for cell in row)
    assert all("within noise" in f.text for f in findings(found) if f.rule == "outcome")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "results/tiny-dense/results.json").unlink(), r"tiny-dense/results\.json does not exist"),
        (lambda d: (d / "plans/tiny-a/iterations.parquet").write_bytes(b"PAR1"), r"iterations\.parquet is truncated"),
        (lambda d: (d / "results/tiny-a/items.parquet").write_bytes(b""), r"items\.parquet is truncated"),
        (
            lambda d: pq.write_table(
                pq.read_table(d / "results/tiny-a/items.parquet").slice(1), d / "results/tiny-a/items.parquet"
            ),
            "different items",
        ),
        (
            lambda d: (d / "plans/tiny-a/plan.json").write_text(
                (d / "plans/tiny-a/plan.json").read_text().replace('"order": [\n    "m', '"order": [\n    "x')
            ),
            "different searches",
        ),
    ],
)
def test_damaged_inputs_are_named_and_the_old_report_stays(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    build(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "old").touch()
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path / "report", "t", ["tiny-a"], LABELS, tmp_path, False)
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["old"]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_searches_that_are_not_nested_are_both_shown(tmp_path: Path) -> None:
    found = study(tmp_path)
    short, long = found.targets
    other = replace(short, plan=replace(short.plan, order=("mha.11", "mlp.11", "mha.10")))
    assert found.traces == (long,)
    assert replace(found, targets=(other, long)).traces == (other, long)


def test_whole_layers_count_as_their_blocks(tmp_path: Path) -> None:
    data = build(tmp_path, replace(World(), unit="layer", costs=(0.03, 0.035, 0.04, 0.05, 0.35, 0.07)))
    write_report(data / "report", "layers", ["tiny-a", "tiny-b"], LABELS, data, True)
    text = (data / "report" / "report.md").read_text()
    assert "The last safe budget is 8blocks" in text
    assert "6 MHA + 6 MLP" in text
    first = _json(data / "plans" / "tiny-b" / "plan.json")["order"][0]
    assert first.count(",") == 1
    assert f"| 1 | {first} |" in text


def others(run: str, method: str, **changes: Any) -> World:
    """A run of another method, its targets named after it."""
    world = replace(World(), run=run, method=method, removals=((f"{run}-a", 3), (f"{run}-b", 6)))
    return replace(world, **changes)


SHORTGPT = others(
    "shortgpt", "one_shot", metric="block_influence", unit="layer", costs=(0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
)


def search_of(found: Study) -> str:
    (section,) = build_page("t", [found], draw=False).sections
    return dict(section.facts)["Search"]


def drawn(found: Study) -> dict[str, str]:
    """The SVG and the caption of a run's plots."""
    return {plot.name: plot.svg + plot.caption for plot in plots(found)}


def test_every_search_and_metric_has_words() -> None:
    assert SEARCH_WORDS.keys() == SEARCHES.keys()
    assert METRIC_WORDS.keys() == METRICS.keys()
    assert set(UNSCORED) == {name for name, method in SEARCHES.items() if not method.scores}


def test_costs_are_in_the_metric_and_rises_in_nats(tmp_path: Path) -> None:
    """A KL divergence counts from that of the mask before; an influence is of the unit itself."""
    (nll,) = study(tmp_path / "0").traces
    for run, metric, factor, words in (
        ("kl", "kl", 0.1, ("KL divergence rise", "nats per token")),
        ("influence", "block_influence", 0.3, ("Block Influence", "1 - cosine")),
    ):
        world = others(run, "greedy", metric=metric)
        build(tmp_path / run, world)
        (found,) = read_studies([name for name, _ in world.removals], {run: LABEL}, tmp_path / run)
        (trace,) = found.traces
        for left, right in zip(nll.removals, trace.removals, strict=True):
            assert right.added == left.added
            assert right.rise == pytest.approx(left.rise)
            assert right.costs.keys() == left.costs.keys()
            assert all(right.costs[unit] == pytest.approx(factor * left.costs[unit]) for unit in left.costs)
        table = sequence(trace)
        assert table.head[-1] == ", ".join(words)
        costs = [float(row[-1]) for row in table.rows[1:]]
        assert costs == pytest.approx([factor * cost for cost in World().costs], rel=1e-3)
        heat = drawn(found)[f"{run}-b-heat"]
        assert all(word in heat for word in words)
        assert "NLL" not in heat
        assert search_of(found).startswith(f"greedy, blocks, by {METRIC_WORDS[metric]}: 129 candidates scored on all")
    assert sequence(nll).head[-1] == "NLL rise, nats/token"


def test_one_ranking_decides_all_removals_and_nothing_was_spared(tmp_path: Path) -> None:
    found = study(tmp_path, SHORTGPT)
    words = "one-shot, whole layers, by Block Influence"
    assert all(words in f.title for f in findings(found) if f.rule == "outcome")
    assert search_of(found).startswith(f"{words}: 12 candidates scored on all rows in 1 iteration; the last run of")
    (trace,) = found.traces
    ranking = trace.removals[0].costs
    assert [row[-1] for row in sequence(trace).rows[1:]] == [f"{ranking[r.added]:.4g}" for r in trace.removals]
    assert [r.rise for r in trace.removals] == pytest.approx(SHORTGPT.costs)
    heat = drawn(found)["shortgpt-b-heat"]
    assert "This one ranking decided all removals" in heat
    assert "whole layers" in heat
    assert "already removed" not in heat


def test_the_likelihood_of_answers_is_not_held_against_a_text(tmp_path: Path) -> None:
    worlds = [others(run, "greedy", metric=run, heldout_factor=2.5) for run in ("perplexity", "answer_likelihood")]
    labels = {world.metric: LABEL for world in worlds}
    for world in worlds:
        build(tmp_path, world)
    texts, answers = read_studies([name for world in worlds for name, _ in world.removals], labels, tmp_path)
    assert [rule for rule, _ in rules(texts)] == ["mismatch"]
    assert rules(answers) == []
    assert "greedy, blocks, by likelihood of the right answers" in search_of(answers)
    assert "nats per token of the right answer" in drawn(answers)["answer_likelihood-b-heat"]


def test_a_search_without_scores_has_an_order_but_no_heat_map(tmp_path: Path) -> None:
    """Held-out text may then suffer as it likes: the calibration text has decided nothing."""
    found = study(tmp_path, others("random", "random", heldout_factor=2.5))
    assert set(drawn(found)) == {f"random-{name}" for name in ("perplexity", "accuracy", "speed", "tasks", "b-map")}
    assert search_of(found).startswith("random order, blocks: no candidate was scored; the last run")
    assert rules(found) == []
    assert len(sequence(found.traces[0]).rows) == 7


def test_a_search_for_one_budget_has_no_sequence(tmp_path: Path) -> None:
    world = others("swap", "swap", removals=(("swap-a", 3), ("swap-b", 6)))
    found = study(tmp_path, world)
    assert found.traces == ()
    assert {t.considered for t in found.targets} == {Considered("blocks", 2, 3, 1)}
    assert "swap search, blocks, by perplexity: 6 masks scored on all rows and 2 on the first rows only" in (
        search_of(found)
    )
    assert ", in 4 steps of 2 searches, one for each budget; the last" in search_of(found)
    assert not any("not considered" in text for text in (search_of(found), render_markdown(page_of(found))))
    plot = drawn(found)
    assert {name for name in plot if name.endswith(("map", "heat"))} == {"swap-a-map", "swap-b-map"}
    assert "have no order" in plot["swap-a-map"]
    assert "Rings are the targets on the calibration rows" in plot["swap-perplexity"]
    assert page_of(found).sections[0].sequences == ()
    assert [row["perplexity_calibration"] for row in csv.DictReader(io.StringIO(curve_csv([found])))] == [
        str(math.exp(nll)) for nll in (2.5, 2.5 + 0.03 + 0.035 + 0.04, 2.5 + 0.03 + 0.035 + 0.04 + 0.05 + 0.06 + 0.07)
    ]
    path = tmp_path / "plans" / "swap-a" / "plan.json"
    write_json(path, _json(path) | {"order": ["mha.1"]})
    with pytest.raises(InputError, match=r"swap-a/iterations\.parquet removes .* the plan beside it removes mha\.1"):
        read_studies(["swap-a"], LABELS, tmp_path)


def test_merged_layers_have_no_tables_and_no_trials(tmp_path: Path) -> None:
    found = study(tmp_path, others("laco", "laco"))
    assert set(drawn(found)) == {f"laco-{name}" for name in ("perplexity", "accuracy", "speed", "tasks")}
    page = page_of(found)
    text = render_markdown(page)
    assert "3 layers by merging; LaCo (repo), layers merged, by cosine similarity" in text
    method = dict(page.sections[0].facts)["Method"]
    assert "laco-a: 9+1, 8+1, 7+1 (those above a similarity of 0.65)" in method
    assert "Search" not in dict(page.sections[0].facts)
    assert found.targets[1].calibration_rise == pytest.approx(sum(World().costs))
    assert is_mismatch(replace(found, dense=replace(found.dense, perplexity=1.0)), found.targets[1])


def test_an_unknown_calibration_perplexity_is_a_dash_and_in_no_curve(tmp_path: Path) -> None:
    """Held-out perplexity is 2.5 times what the calibration would allow, were it known."""
    found = study(tmp_path, others("slicegpt", "slicegpt", heldout_factor=2.5))
    assert (found.dense_calibration, found.targets[0].calibration_rise) == (None, None)
    plot = drawn(found)["slicegpt-perplexity"]
    assert "Held-out perplexity of the dense" in plot
    assert ">calibration<" not in plot
    assert rules(found) == []
    (overview,) = page_of(found).overviews
    at = overview.targets.head.index("calibration PPL")
    assert [row[at] for row in overview.targets.rows] == ["–", "–"]
    assert [row["perplexity_calibration"] for row in csv.DictReader(io.StringIO(curve_csv([found])))] == ["", "", ""]
    row = next(row for row in headline(found).rows if row[0] == "Taken out")
    assert row[2:] == ("nothing", "width 576 → 480", "width 576 → 384")
    slow = replace(found.targets[1], speedups=replace(found.targets[1].speedups, generation=1.01))
    (warning,) = [f for f in findings(replace(found, targets=(slow,))) if f.rule == "slow"]
    assert "Slicing" in warning.text
    assert "MLP" not in warning.text


def page_of(*found: Study) -> Page:
    return build_page("t", found, draw=False)


def test_front_agrees_with_brute_force() -> None:
    """On a coarse grid, so that ties in one coordinate and duplicates abound."""
    random = np.random.default_rng(1)
    for size in (*range(6), *[20] * 200):
        points = [(int(x), int(y)) for x, y in random.integers(0, 7, (size, 2))]
        dominated = [
            any(p[0] <= q[0] and p[1] <= q[1] and (p[0] < q[0] or p[1] < q[1]) for p in points) for q in points
        ]
        assert front(points) == [i for i, below in enumerate(dominated) if not below]
    assert front([(1.0, 2.0)]) == [0]
    assert front([(1.0, 2.0), (1.0, 2.0), (1.0, 3.0), (2.0, 2.0)]) == [0, 1]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs of one model."""
    data = tmp_path_factory.mktemp("several")
    for world in SEVERAL:
        build(data, world)
    names = [name for world in SEVERAL for name, _ in world.removals]
    write_report(data / "report", "Several", names, LABELS, data, False)
    return data


SEVERAL = (
    replace(World(), speedups=(1.05, 1.12)),
    replace(SHORTGPT, removals=(("shortgpt-a", 2), ("shortgpt-b", 5)), speedups=(1.13, 1.3), accuracy_loss=0.2),
    others("random", "random", speedups=(1.05, 1.14), costs=(0.1, 0.12, 0.14, 0.16, 0.18, 0.2)),
    others("swap", "swap", removals=(("swap-a", 3), ("swap-b", 6)), speedups=(1.05, 1.1), heldout_factor=1.0),
    others("laco", "laco", speedups=(1.1, 1.26), heldout_factor=2.2),
    others("slicegpt", "slicegpt", speedups=(0.97, 1.02), heldout_factor=1.7),
)


def test_pareto_csv_holds_every_model_and_the_fronts(several: Path) -> None:
    rows = list(csv.DictReader((several / "report" / "pareto.csv").open()))
    assert len(rows) == 13
    assert {row["target"] for row in rows} == {"dense", *(n for world in SEVERAL for n, _ in world.removals)}
    speeds = [float(row["speedup_generation"]) for row in rows]
    assert speeds == sorted(speeds)
    points = {
        row["target"]: {
            "speed": float(row["speedup_generation"]),
            "kv_cache": -float(row["kv_cache_bytes"]),
            "parameters": float(row["ratio"]),
            "loss": float(row["perplexity_heldout"]),
        }
        for row in rows
    }
    for name, point in points.items():
        if name != "dense":
            plan, result = (_json(several / p) for p in (f"plans/{name}/plan.json", f"results/{name}/results.json"))
            assert point["speed"] == result["speed"]["speedup_generation"]
            assert point["loss"] == result["perplexity"]["perplexity"]
            assert point["parameters"] == plan["ratio"]
    for gain in ("speed", "kv_cache", "parameters"):
        worse = {
            name
            for name, point in points.items()
            for other in points.values()
            if other[gain] >= point[gain]
            and other["loss"] <= point["loss"]
            and (other[gain], other["loss"]) != (point[gain], point["loss"])
        }
        assert {row["target"] for row in rows if row[f"front_{gain}"] == "1"} == points.keys() - worse, gain


def test_runs_of_one_model_are_compared_by_size(several: Path) -> None:
    names = [name for world in SEVERAL for name, _ in world.removals]
    found = read_studies(names, LABELS, several)
    (overview,) = page_of(*found).overviews
    assert overview.title == "What to take for tiny 1.0 (float32)"
    front_rows = [row[2] for row in overview.choices.rows]
    csv_rows = list(csv.DictReader((several / "report" / "pareto.csv").open()))
    assert front_rows == [row["target"] for row in csv_rows if row["front_speed"] == "1"]
    rows = {row[0]: dict(zip(overview.targets.head, row, strict=True)) for row in overview.targets.rows}
    assert list(rows)[:1] == ["tiny-a"]
    assert set(rows) == set(names)
    assert {list(rows)[i] for i in overview.targets.strong} == set(front_rows) - {"dense"}
    assert rows["shortgpt-a"]["method"] == "one-shot, whole layers, by Block Influence"
    ratios = {name: _json(several / "plans" / name / "plan.json")["ratio"] for name in names}
    reference = ""
    for name, row in rows.items():
        if row["against ref"] == "ref":
            assert not reference or ratios[name] > ratios[reference]
            reference = name
            continue
        assert abs(ratios[name] - ratios[reference]) <= 0.015
        left, right = (pq.read_table(several / "results" / n / "items.parquet").to_pylist() for n in (reference, name))
        d = np.array([b["acc"] - a["acc"] for a, b in zip(left, right, strict=True)]).reshape(3, 50)
        error = math.sqrt(float((d.var(axis=1, ddof=1) / 50).sum())) / 3
        text = f"{100 * d.mean():+.1f} ± {100 * error:.1f}".replace("-", "−")
        assert row["against ref"].rstrip(" ↓↑") == text
        assert row["against ref"].endswith("↓") == (d.mean() < -2 * error)
    assert rows["shortgpt-b"]["against ref"].endswith("ref")


def test_runs_that_cannot_be_compared_are_kept_apart(tmp_path: Path) -> None:
    worlds = (World(), others("random", "random"))
    for world in worlds:
        build(tmp_path, world)
    names = [name for world in worlds for name, _ in world.removals]
    other = LABELS | {"random": replace(LABEL, heldout="another text")}
    assert len(page_of(*read_studies(names, LABELS, tmp_path)).overviews) == 1
    assert len(page_of(*read_studies(names, other, tmp_path)).overviews) == 2
    assert page_of(*read_studies(names[:1], other, tmp_path)).overviews == ()


def test_the_page_of_several_methods_is_sound(several: Path, tmp_path: Path) -> None:
    text = (several / "report" / "index.html").read_text()
    assert not re.search(r"\b(nan|None|inf)\b", text)
    write_report(tmp_path / "two", "Two", ["swap-a", "shortgpt-a", "slicegpt-a"], LABELS, several, True)
    text = (tmp_path / "two" / "index.html").read_text()
    page = _Page()
    page.feed(text)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg ") == len(list((tmp_path / "two" / "plots").glob("*.svg"))) == 1 + 3 * 4 + 3


class FakeScorer:
    """Answers any question about a mask by a number that its text fixes."""

    def row_batches(self, rows: Any, span: range) -> list[range]:
        return [span]

    def run(self, tasks: Any, rows: Any) -> Any:
        for task in tasks:
            for mask in task.masks:
                value = 1 + len(mask) + sum(map(ord, format_mask(mask))) % 97 / 100
                yield ScoredRows(mask, task.span.start, (value,) * len(task.span))

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("method", "changes", "unit"),
    [
        ("greedy", {"acceleration": "lazy+race"}, "blocks"),
        ("greedy", {"metric": "block_influence", "candidates": "mlp"}, "MLP blocks"),
        ("one_shot", {"metric": "kl", "unit": "layer"}, "whole layers"),
        ("random", {}, "blocks"),
        ("given", {"options": {"order": ("mha.1,mlp.1", "mha.2,mlp.2", "mha.0,mlp.0")}}, "whole layers"),
        ("beam", {"candidates": "mha"}, "MHA blocks"),
        ("evolution", {"options": {"generations": 3, "offspring": 4, "survivors": (2,)}}, "blocks"),
        ("swap", {"options": {"tries": 4}}, "blocks"),
    ],
)
def test_the_tables_of_every_search_are_read(tmp_path: Path, method: str, changes: dict[str, Any], unit: str) -> None:
    """From the search itself, by way of the files that score and commit write."""
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 5,
              "num_attention_heads": 2, "vocab_size": 16}  # fmt: skip
    score = {"method": method, "unit": "block", "candidates": "all", "metric": "perplexity", "acceleration": "none"}
    score_run(
        tmp_path / "scores", tmp_path / "trials", calibration=CalibrationSet(((1, 2), (3, 4), (5, 6), (7, 8))),
        model_identity="m", dtype="float32", config=config, score=score | changes, budgets=["4blocks"],
        scorer=FakeScorer(), make_bench=lambda: None, observer=SilentObserver(), metrics=tmp_path / "score.json",
    )  # fmt: skip
    plan, tables = commit_run(tmp_path / "scores", config, "4blocks", {"target": "t", "run": "r"})
    assert plan.nested == SEARCHES[method].nested
    facts = read_current(tmp_path / "scores")
    trace = read_trace(trace_directory(tmp_path / "scores", facts, "4blocks"), facts["search"])
    order, perplexities = iteration.removals(trace, plan.nested)
    used = range(len(tables))
    path = tmp_path / "iterations.parquet"
    save_iterations(tables, path)
    rows = read_iterations(path)
    found = considered(rows)
    assert found.unit == unit
    scored = [score for i in used for score in trace[i].scores if score.mask and score.row_loss]
    complete = {score.mask for score in scored if score.is_complete}
    assert (found.complete, found.partial) == (len(complete), len({score.mask for score in scored} - complete))
    if plan.nested:
        sequence = removals(rows, plan, path)
        assert [removal.added for removal in sequence] == order[: len(plan.order)]
        assert [sequence[0].before, *(removal.perplexity for removal in sequence)] == pytest.approx(
            perplexities[: len(plan.order) + 1]
        )
        assert not any(math.isnan(cost) for removal in sequence for cost in removal.costs.values())
        asked = [bool(score.row_loss) for score in trace[0].scores]
        assert sequence[0].candidates == (len(asked) - 1 if any(asked) else 0)
    else:
        assert sum(row["chosen"] for row in rows) == len(trace)
