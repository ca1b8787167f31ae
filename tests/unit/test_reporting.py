"""The report: its numbers are the inputs' numbers, its warnings come when they should, its page
loads nothing."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from blockpruner.core.blocks import DENSE, Mask, format_mask, parse_mask, removable_units
from blockpruner.evaluation.store import ITEMS
from blockpruner.methods.registry import KINDS
from blockpruner.reporting.findings import (
    Finding,
    Level,
    is_broken,
    jump_at,
    paired,
    paired_confidence,
    recommended,
    stop,
    warnings,
)
from blockpruner.reporting.inputs import (
    ITERATIONS,
    ReportedRun,
    read_iterations,
    read_runs,
    steps_of,
    unit_of,
)
from blockpruner.reporting.pages import Facts, Page
from blockpruner.reporting.report import build_page, write_report
from blockpruner.reporting.results import RunLabels
from blockpruner.reporting.statistics import Mean
from blockpruner.reporting.table import Table
from blockpruner.reporting.tables import curve_csv, front, headline, iterations_csv
from blockpruner.search import iteration
from blockpruner.search.registry import SEARCHES
from blockpruner.search.trace import read_trace, save_iterations, trace_directory
from blockpruner.store.files import read_json, read_table, write_sealed_json, write_table
from stages import report as report_stage
from tests.builders import FakeScorer, by_text, scored, short_rows, small_config, speed_facts
from tests.errors import refused

LAYERS, ROWS = 12, 4
MHA, MLP, TOTAL = 900_000, 2_700_000, 60_000_000
CHANCE = {"piqa": 0.5, "winogrande": 0.5, "arc_easy": 0.25}
TITLE = "A <b>bold</b> | title & more"
LABEL = RunLabels("Tiny", "tiny 1.0 (float32)", "Alpaca prompts", "Wikipedia", "stock tasks")
LABELS = dict.fromkeys(("tiny", "shortgpt", "kl", "random", "floating", "slicegpt"), LABEL)


@dataclass(frozen=True)
class World:
    """What the fixture writes; a test changes one field. costs: NLL rise of each removal; speedups:
    by target; drift: of the repeats of pruned models."""

    run: str = "tiny"
    method: str = "greedy"
    metric: str = "perplexity"
    layers: int = LAYERS
    costs: tuple[float, ...] = (0.03, 0.035, 0.04, 0.05, 0.06, 0.07)
    removals: tuple[tuple[str, int], ...] = (("tiny-a", 3), ("tiny-b", 6))
    heldout_factor: float = 1.2
    speedups: tuple[float, ...] = (1.05, 1.12)
    drift: tuple[float, ...] = (1.02, 1.0, 0.98, 1.0, 1.0)
    accuracy_loss: float = 0.0
    items: int = 50
    spread: float = 0.2
    candidates: str = "all"
    unit: str = "block"
    losers: bool = False
    uneven: float = 0.0
    """Nats that one of two kinds of held-out text loses more, and the other less, by target."""


def build(data: Path, world: World = World()) -> Path:
    """Write plans, results and metrics of one run as the stages do."""
    random = np.random.default_rng(0)
    units = removable_units(world.layers, world.unit, world.candidates)
    extra = {
        u: world.spread * (1 + float(w))
        for u, w in zip(units, random.permutation(len(units)), strict=True)
    }
    extra |= {u: 40 * world.spread for u in units if any(block.layer == 0 for block in u)}
    queue = sorted(units, key=extra.__getitem__)
    rows: list[dict[str, Any]] = [_row(0, Mask(), None, 2.5, False)]
    nll, removed, masks, nlls = 2.5, Mask(), [], [2.5]
    for index, cost in enumerate(world.costs):
        chosen = queue[index]
        for unit in units:
            if not unit <= removed:
                rise = cost + (0.0 if unit == chosen else extra[unit] * (1 + 0.05 * index))
                rows.append(
                    _row(index, removed | unit, format_mask(unit), nll + rise, unit == chosen)
                )
        if world.losers:
            worst = format_mask(queue[-1])
            lie = next(r for r in rows if r["iteration"] == index and r["added"] == worst)
            lie.update(
                loss=nll - 5.0, perplexity=math.exp(nll - 5.0), rows_used=1, row_loss=[nll - 5.0]
            )
        removed, nll = removed | chosen, nll + cost
        masks.append(removed)
        nlls.append(nll)
    searched = world.method != "slicegpt"
    rows = [reported for row in rows if (reported := _told(world, row))]
    results(data / "evidence" / f"{world.run}-dense", world, 0, 0.0, None)
    for position, (target, count) in enumerate(world.removals):
        plan = {
            "kind": "mask",
            "target": target,
            "run": world.run,
            "budget": f"{count}blocks",
            "method": world.method,
            "metric": world.metric,
            "search": "f00d",
            "layers": world.layers,
            "removed": format_mask(masks[count - 1]).split(","),
            "order": [format_mask(unit) for unit in queue[:count]],
            "ratio": _ratio(masks[count - 1]),
            "ratios": [_ratio(mask) for mask in masks[:count]],
            "blocks": {
                kind: sum(b.kind == kind for b in masks[count - 1]) for kind in ("mha", "mlp")
            },
            "parameters": {"dense": TOTAL, "pruned": round(TOTAL * (1 - _ratio(masks[count - 1])))},
            "calibration": {
                "rows": ROWS,
                "tokens": 512,
                "dense_perplexity": math.exp(nlls[0]),
                "perplexity": math.exp(nlls[count]),
            },
        }
        used = [row for row in rows if row["iteration"] < count]
        if world.method == "floating":
            plan |= {
                "order": [format_mask(masks[count - 1])],
                "ratios": [plan["ratio"]],
                "nested": False,
            }
            used = _exchanged(masks, nlls, count)
        plan |= _transform(world, plan, count)
        write_sealed_json(data / "compensated" / target / "compensate.json", {"search": "mine"})
        if searched:
            write_table(
                data / "plans" / target / "mine.parquet", pa.Table.from_pylist(used, ITERATIONS)
            )
        heldout = world.heldout_factor * (nlls[count] - nlls[0])
        results(
            data / "evidence" / target,
            world,
            position + 1,
            heldout,
            (world.speedups[position], plan),
        )
        write_sealed_json(data / "evidence" / target / "plan.json", plan)
    return data


def _told(world: World, row: dict[str, Any]) -> dict[str, Any] | None:
    """A row of greedy by perplexity as the world's method and metric leave it, None if they leave
    none.

    An influence is three tenths of the rise of NLL over the model before.
    """
    is_kept = row["chosen"] or not row["removed"]
    if not is_kept and (
        world.method in ("random", "given") or (world.method == "one_shot" and row["iteration"])
    ):
        return None
    if world.metric == "block_influence":
        row = row | {"loss": 0.3 * (row["loss"] - 2.5 - sum(world.costs[: row["iteration"]]))}
    if world.metric != "perplexity" and not is_kept:
        row = row | {"perplexity": None, "row_nll": None}
    if world.method in ("random", "given") or (world.method == "one_shot" and row["iteration"]):
        row = row | {"loss": None, "rows_used": 0, "row_loss": []}
    return row


def _exchanged(masks: list[Mask], nlls: list[float], count: int) -> list[dict[str, Any]]:
    """Two steps to the mask of `count` removals; two others lose, one of them after one row."""
    rows = [
        _row(0, Mask(), None, nlls[0], False),
        _row(0, masks[count - 2], None, nlls[count] + 0.2, True),
    ]
    loser = masks[count - 1] ^ masks[0]
    rows += [_row(1, masks[count - 1], None, nlls[count], True), _row(1, loser, None, 9.0, False)]
    return [
        *rows,
        _row(1, masks[count - 1] | parse_mask("mlp.0"), None, 1.0, False) | {"rows_used": 1},
    ]


def _transform(world: World, plan: dict[str, Any], count: int) -> dict[str, Any]:
    """What is different in the plan of a change of weights that leaves no sequence of removals."""
    changed: dict[str, Any] = {"removed": [], "order": [], "ratios": [], "nested": False}
    if world.method == "slicegpt":
        calibration = plan["calibration"] | {"dense_perplexity": None, "perplexity": None}
        return changed | {
            "kind": "slicegpt",
            "blocks": {"mha": 0, "mlp": 0},
            "calibration": calibration,
            "details": {"width": 576 - 32 * count, "hidden": 576},
        }
    return {}


def _ratio(mask: Mask) -> float:
    return sum(MHA if b.kind == "mha" else MLP for b in mask) / TOTAL


def _row(
    iteration: int, removed: Mask, added: str | None, nll: float, chosen: bool
) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "removed": format_mask(removed).split(",") if removed else [],
        "added": added,
        "loss": nll,
        "perplexity": math.exp(nll),
        "rows_used": ROWS,
        "rows_total": ROWS,
        "chosen": chosen,
        "row_loss": [nll] * ROWS,
        "row_nll": [nll] * ROWS,
        "lazy_choice": None,
    }


def results(
    path: Path, world: World, position: int, heldout: float, pruned: tuple[float, Any] | None
) -> None:
    path.mkdir(parents=True)
    random = np.random.default_rng(7)
    items, tasks, n = [], {}, world.items
    for task, chance in CHANCE.items():
        right = random.permutation(n) < round(n * (0.52 if task == "winogrande" else chance + 0.3))
        lost = random.random(n) < world.accuracy_loss * position
        score = (right & ~lost).astype(float)
        stderr = math.sqrt(score.mean() * (1 - score.mean()) / (n - 1))
        tasks[task] = {
            "metric": "acc",
            "value": score.mean(),
            "stderr": stderr,
            "acc": score.mean(),
            "acc_stderr": stderr,
            "acc_norm": None,
            "acc_norm_stderr": None,
            "items": n,
        }
        unread = {"gold": 0, "loglikelihoods": [], "prompt_hash": "", "acc_norm": None}
        p_gold = chance + 0.1 * right - 0.05 * position * world.accuracy_loss * np.arange(n) / n
        both = zip(score, p_gold, strict=True)
        items += [
            {"task": task, "item": i, "acc": s, "p_gold": p} | unread
            for i, (s, p) in enumerate(both)
        ]
    average = {
        "value": np.mean([t["value"] for t in tasks.values()]),
        "stderr": math.sqrt(sum(t["stderr"] ** 2 for t in tasks.values())) / len(tasks),
    }
    parameters = pruned[1]["parameters"]["pruned"] if pruned else TOTAL
    speed: dict[str, Any] = {"dense": _speed(1.0, TOTAL, 24)}
    if pruned:
        factor, plan = pruned
        speed["pruned"] = _speed(factor, parameters, 24 - 2 * plan["blocks"]["mha"], world.drift)
    wobble = np.array([-2, 1, 1, -1, 1, 0]) * 0.005 * position
    rows = math.log(20) + heldout + np.array([-0.3, 0.2, 0.1, 0.4, -0.4, 0.0]) + wobble
    rows += world.uneven * position * np.array([1, 1, 1, -1, -1, -1])
    perplexity = {
        "perplexity": 20 * math.exp(heldout),
        "nll": math.log(20) + heldout,
        "row_nll": rows.tolist(),
        "rows": 6,
        "tokens": 6144,
        "seq_len": 1024,
    }
    perplexity |= {"row_kind": ["program text"] * 3 + ["web"] * 3} if world.uneven else {}
    samples = [
        {"prompt": "Why <blue>?", "text": f"answer {position}"},
        {"prompt": "And why?", "text": ""},
    ]
    write_sealed_json(
        path / "results.json",
        {
            "parameters": parameters,
            "weight_bytes": 4 * parameters,
            "perplexity": perplexity,
            "samples": samples,
            "formats": ["gguf", "hf"] if pruned else [],
            "tasks": tasks,
            "average": average,
            "chance": CHANCE,
        },
    )
    made = {"piqa": MADE, "size": {}, "perplexity": MADE if pruned else MADE | ELSEWHERE}
    write_sealed_json(path / "speed.json", {"speed": speed, "made": made})
    write_table(path / "items.parquet", pa.Table.from_pylist(items, ITEMS))


MADE = {
    "when": "2025-03-01T10:00:00Z",
    "commit": "c0ffee" * 6 + "c0ff+",
    "torch": "2.9.9",
    "transformers": "5.99.0",
    "processor": "3 x Old CPU",
    "device": "cpu",
    "device_name": "cpu",
    "attention": "eager",
}
ELSEWHERE = {
    "when": "2025-04-02T10:00:00Z",
    "device": "cuda",
    "device_name": "Some Card",
    "attention": "sdpa",
}


def _speed(
    factor: float, parameters: int, kibibytes: int, drifts: tuple[float, ...] = World.drift
) -> dict[str, Any]:
    seconds = {"prefill": 0.08, "decode": 1.92, "generation": 2.0}
    samples = {part: [s / factor * drift for drift in drifts] for part, s in seconds.items()}
    sizes = 1024 * kibibytes, 4 * parameters
    return speed_facts(samples, *sizes, prompt_tokens=64, new_tokens=32, batch=1, repeats=5)


def study(tmp_path: Path, world: World = World()) -> ReportedRun:
    build(tmp_path, world)
    return read_runs([name for name, _ in world.removals], {world.run: LABEL}, tmp_path)[0]


def others(run: str, method: str, **changes: Any) -> World:
    """A run of another method, its targets named after it."""
    world = replace(World(), run=run, method=method, removals=((f"{run}-a", 3), (f"{run}-b", 6)))
    return replace(world, **changes)


SHORTGPT = others(
    "shortgpt",
    "one_shot",
    metric="block_influence",
    unit="layer",
    costs=(0.05, 0.06, 0.07, 0.08, 0.09, 0.1),
)


def findings(found: ReportedRun) -> list[Finding]:
    return [*warnings(found.targets, found.traces), stop(found.targets)]


def warned(found: ReportedRun) -> list[str]:
    return [f.rule for f in findings(found) if f.level is Level.WARNING]


def finding(found: ReportedRun, rule: str) -> str:
    (text,) = [f"{f.title} {f.text}" for f in findings(found) if f.rule == rule]
    return text


def page_of(*found: ReportedRun) -> Page:
    return build_page("t", found, draw=False)


def facts(found: ReportedRun) -> dict[str, str]:
    own = page_of(found).sections[1].blocks[-1]
    assert isinstance(own, Facts)
    return dict(own.of)


def rows(grid: Table) -> dict[str, dict[str, str]]:
    """By the first column, then by title."""
    return {row[0]: dict(zip(grid.head, row, strict=True)) for row in grid.texts}


def curve(found: ReportedRun) -> list[str]:
    """Calibration perplexities in curve.csv."""
    return [
        row["perplexity_calibration"] for row in csv.DictReader(io.StringIO(curve_csv([found])))
    ]


def _json(path: Path) -> Any:
    return read_json(path)


def _csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = build(tmp_path_factory.mktemp("report"))
    write_report(data / "report", TITLE, ["tiny-b", "tiny-a"], LABELS, data, True)
    return data / "report"


def test_the_report_holds_the_inputs_and_is_the_same_twice(report: Path, tmp_path: Path) -> None:
    data, plots = report.parent, ("tiny-b-map",)
    files = {
        path.relative_to(report).as_posix(): path.read_bytes()
        for path in report.rglob("*")
        if path.is_file()
    }
    pictures = {f"plots/{name}.{kind}" for name in plots for kind in ("svg", "png")}
    assert files.keys() == {"report.md", "index.html", "curve.csv", "iterations.csv", *pictures}
    dense, a, b = (
        _json(data / "evidence" / name / "results.json")
        for name in ("tiny-dense", "tiny-a", "tiny-b")
    )
    markdown, page = (report / "report.md").read_text(), (report / "index.html").read_text()
    assert all(text in markdown for text in ("Chosen on ", "Judged on ", "In fewer bits: "))
    perplexities = [f"{r['perplexity']['perplexity']:.2f}" for r in (dense, a, b)]
    assert (
        f"| **Held-out perplexity** | **–** | {' | '.join(f'**{p}**' for p in perplexities)} |"
        in markdown
    )
    assert "".join(f'<td class="n">{p}</td>' for p in perplexities) in page
    for result in (dense, a, b):
        for score in (*result["tasks"].values(), result["average"]):
            assert f"{100 * score['value']:.1f} ± {100 * score['stderr']:.1f}" in page
        assert f"{result['parameters'] / 1e6:.1f} M" in page
    plan = _json(data / "evidence" / "tiny-b" / "plan.json")
    for text in (
        f"{100 * plan['ratio']:.1f} %",
        f"{plan['blocks']['mha']} MHA + {plan['blocks']['mlp']} MLP",
        "1.05 [",
        "1.12 [",
        "896.0",
        "4 rows, 512 tokens",
        "± 7",
    ):
        assert text in page
    # each place once, and never the machine that writes the page
    line = markdown.rstrip().rpartition("\n")[2]
    software = "with torch 2.9.9 and transformers 5.99.0 at commit c0ffeec0ffee+"
    assert (
        line
        == f"Results were computed: 5 on 3 x Old CPU, attention eager, {software}, 2025-03-01; "
        f"1 on Some Card (3 x Old CPU), attention sdpa, {software}, 2025-04-02."
    )
    write_report(tmp_path / "r", TITLE, ["tiny-b", "tiny-a"], LABELS, data, True)
    assert {name: (tmp_path / "r" / name).read_bytes() for name in files} == files
    (tmp_path / "r" / "old").touch()
    write_report(tmp_path / "r", TITLE, ["tiny-a"], LABELS, data, False)
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {"curve.csv", "index.html", "iterations.csv", "report.md"}


def test_csv_files_hold_full_precision(report: Path) -> None:
    dense, _, last = _csv(report / "curve.csv")
    folder = report.parent / "evidence" / "tiny-b"
    plan, result, speed = (_json(folder / f"{name}.json") for name in ("plan", "results", "speed"))
    outcome = dense["target"], float(dense["ratio"]), last["target"], int(last["removals"])
    assert outcome == ("tiny-dense", 0, "tiny-b", 6)
    assert float(last["ratio"]) == plan["ratio"]
    assert dense["compensated"] == "none"
    assert float(last["perplexity_heldout"]) == result["perplexity"]["perplexity"]
    assert float(last["perplexity_calibration"]) == plan["calibration"]["perplexity"]
    assert float(last["accuracy"]) == result["average"]["value"]
    for part in ("prefill", "decode", "generation"):
        before, after = (
            speed["speed"][side][f"{part}_seconds"]["median"] for side in ("dense", "pruned")
        )
        assert float(last[f"speedup_{part}"]) == before / after
    steps = _csv(report / "iterations.csv")
    assert [row["removed"] for row in steps] == ["", *plan["order"]]
    assert [float(row["ratio"]) for row in steps] == [0.0, *plan["ratios"]]
    nll = 2.5 + np.cumsum([0, *World().costs])
    assert np.allclose([float(row["perplexity"]) for row in steps], np.exp(nll), rtol=1e-12)


def test_the_page_loads_nothing_and_escapes_its_title(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = _Page(text)
    loads = {
        target
        for target in page.loads
        if not target.startswith(("#", "data:image/svg+xml;base64,"))
    }
    assert loads == {"curve.csv", "iterations.csv"} <= {path.name for path in report.iterdir()}
    assert all(target[1:] in page.ids for target in page.loads if target[0] == "#")
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
    }
    assert not re.search(r"@import|url\(|https?://", text)
    assert "<h1>A &lt;b&gt;bold&lt;/b&gt; | title &amp; more</h1>" in text
    assert "<b>bold" not in text
    assert (report / "report.md").read_text().startswith(r"# A \<b\>bold\</b\> \| title \& more")


def test_the_dense_models_multiples_have_the_intervals_of_scipy(tmp_path: Path) -> None:
    shown = rows(headline(study(tmp_path, replace(World(), accuracy_loss=0.25))))
    dense, pruned = (
        _json(tmp_path / f"evidence/tiny-{name}/results.json")["perplexity"]
        for name in ("dense", "b")
    )
    d = np.subtract(pruned["row_nll"], dense["row_nll"])
    low, high = np.exp(stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d)))
    assert (
        shown["Held-out perplexity, × dense"]["tiny-b"]
        == f"{math.exp(d.mean()):.2f} [{low:.2f}, {high:.2f}]"
    )
    assert shown["Generation, × dense"]["tiny-b"].startswith("1.12 [")


def test_each_kind_of_held_out_text_has_its_loss_and_an_uneven_one_is_a_warning(
    tmp_path: Path,
) -> None:
    result = study(tmp_path, replace(World(), uneven=0.1))
    shown, text = rows(headline(result)), finding(result, "uneven")
    dense, pruned = (
        _json(tmp_path / f"evidence/tiny-{name}/results.json")["perplexity"]
        for name in ("dense", "b")
    )
    d = np.subtract(pruned["row_nll"], dense["row_nll"])
    for kind, part in (("program text", slice(0, 3)), ("web", slice(3, 6))):
        low, high = np.exp(stats.t.interval(0.95, 2, d[part].mean(), stats.sem(d[part])))
        relative = f"{math.exp(d[part].mean()):.2f} [{low:.2f}, {high:.2f}]"
        assert shown[f"Perplexity of {kind}, × dense"]["tiny-b"] == relative
        assert (
            shown[f"Perplexity of {kind}"]["tiny-b"]
            == f"{math.exp(np.mean(pruned['row_nll'][part])):.2f}"
        )
    worst = (
        f"{math.exp(d[:3].mean()):.2f} times the dense model's,"
        f" {math.exp((d[:3] - d[3:]).mean() / 2):.2f} times"
    )
    assert f"tiny-b: The kind 'program text' lost most: its perplexity is {worst} the mean" in text
    assert "tiny-a" not in text
    plain = study(tmp_path / "plain")
    assert "uneven" not in warned(plain)
    assert not any("Perplexity of" in name for name in rows(headline(plain)))


class _Page(HTMLParser):
    """Collects everything that a browser would load, and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.loads += [
            value or ""
            for key, value in attrs
            if key in ("src", "href", "xlink:href", "data", "srcset")
        ]


@pytest.mark.parametrize(
    ("costs", "index"),
    [
        (World().costs, None),
        ((0.03, 0.035, 0.04, 0.05, 0.35, 0.07), 4),
        ((0.03, 0.03, 0.08, 0.03, 0.03, 0.03), None),  # over the factor, under JUMP_NATS
        ((0.2, 0.25, 0.3, 0.35, 0.38, 0.4), None),  # steep but steady
        ((0.45, 0.1, 0.1, 0.1, 0.1, 0.1), 0),  # a collapse at once
        ((0.2, 0.25, 0.3, 0.35, 0.41, 0.4), 4),  # a collapse at the end of a slope
    ],
)
def test_jump(tmp_path: Path, costs: tuple[float, ...], index: int | None) -> None:
    result = study(tmp_path, replace(World(), costs=costs, heldout_factor=0.1))
    (trace,) = result.traces
    assert jump_at(trace) == index
    assert warned(result) == ([] if index is None else ["jump"])
    if index is not None:
        text = finding(result, "jump")
        assert trace.plan.order[index] in text
        assert f"to {math.exp(2.5 + sum(costs[: index + 1])):.2f}." in text
        assert not index or f"{index} blocks ({100 * trace.plan.ratios[index - 1]:.2f} %" in text


@pytest.mark.parametrize(
    ("change", "name", "broken"),
    [
        ({"speedups": (1.10, 1.12)}, "tiny-b", ""),
        ({"speedups": (1.12, 1.10)}, "tiny-a", ""),
        ({"speedups": (0.98, 0.99)}, None, ""),
        (
            {"heldout_factor": 1.42},
            "tiny-b",
            "",
        ),  # 0.285 nats times that is 0.405, and ln 1.5 is 0.4055
        ({"heldout_factor": 1.43}, "tiny-a", "b"),
        ({"costs": (0.03, 0.03, 0.03, 0.9, 0.9, 0.9)}, "tiny-a", "b"),  # tiny-b is past a jump
        ({"costs": (0.9, 0.03, 0.03, 0.03, 0.03, 0.03)}, None, "ab"),
        ({"costs": (0.9, 0.03, 0.03, 0.03, 0.03, 0.03), "heldout_factor": 0.1}, "tiny-b", ""),
        ({"accuracy_loss": 0.25}, None, "ab"),  # below 1.5 times the dense perplexity
        ({"accuracy_loss": 0.04}, "tiny-b", ""),
        (
            {"drift": (1.1, 0.9, 1.2, 1.0, 1.05)},
            None,
            "",
        ),  # the medians are 1.00 and 1.07 times as fast: noise
        ({"drift": (1.1, 0.9, 1.2, 1.0, 1.05), "speedups": (1.05, 1.4)}, "tiny-b", ""),
    ],
)
def test_the_verdict_is_by_what_was_measured_of_a_model(
    tmp_path: Path, change: dict[str, Any], name: str | None, broken: str
) -> None:
    result = study(tmp_path, replace(World(), **change))
    best = recommended(result.targets)
    assert (best and best.name) == name
    assert [option.name for option in result.targets if is_broken(option)] == [
        f"tiny-{one}" for one in broken
    ]
    assert ("broken" in warned(result)) == bool(broken)
    assert (f"Fastest that holds up: {name}" if name else "Keep the dense model") in finding(
        result, "stop"
    )
    assert ("jump" in warned(result)) == (0.9 in change.get("costs", ()))


def test_a_jump_that_all_models_beyond_it_are_healed_of_is_no_warning(tmp_path: Path) -> None:
    build(tmp_path, replace(World(), costs=(0.9, 0.03, 0.03, 0.03, 0.03, 0.03)))
    for target, expected in (("tiny-a", Level.WARNING), ("tiny-b", Level.NOTE)):
        path = tmp_path / "evidence" / target / "plan.json"
        write_sealed_json(path, _json(path) | {"train": True})
        (result,) = read_runs(["tiny-a", "tiny-b"], LABELS, tmp_path)
        (jump,) = [finding for finding in findings(result) if finding.rule == "jump"]
        assert jump.level is expected


def test_a_model_is_to_be_taken_if_it_lost_little(tmp_path: Path) -> None:
    """Perplexity of less than 0.1 nats more, and no score that is lower beyond noise."""
    for number, (change, words) in enumerate(
        (
            ({}, "Take tiny-b"),
            ({"heldout_factor": 0.36}, "Fastest"),
            ({"accuracy_loss": 0.04, "items": 4000}, "Fastest"),
        )
    ):
        result = study(
            tmp_path / str(number), replace(World(), **({"heldout_factor": 0.34} | change))
        )
        assert finding(result, "stop").startswith(words)


def test_signs_are_judged_model_by_model_and_with_healing(tmp_path: Path) -> None:
    """One that is not faster has more MLP than MHA removed; one suffers on other text, and its
    refit does not help."""
    build(tmp_path, replace(World(), speedups=(1.0, 1.12), heldout_factor=1.9, candidates="mlp"))
    (result,) = read_runs(["tiny-a", "tiny-b"], LABELS, tmp_path)
    assert warned(result) == ["broken", "mismatch", "slow"]
    assert "tiny-b" in finding(result, "mismatch")
    assert "tiny-a" not in finding(result, "mismatch")
    assert "tiny-a" in finding(result, "slow")
    assert "tiny-b" not in finding(result, "slow")
    assert "more MLP than MHA" in finding(result, "slow")
    assert "more MLP than MHA" not in finding(
        study(tmp_path / "mha", replace(World(), speedups=(1.0, 1.1), candidates="mha")), "slow"
    )
    path = tmp_path / "evidence/tiny-b/plan.json"
    write_sealed_json(path, _json(path) | {"compensate": "refit", "train": True})
    # on rows of the fit: 1.1 and 1.8 times dense
    for after, expected in (
        (11.0, True),
        (18.0, False),
    ):
        rows_of_fit = {"dense": 10.0, "before": 20.0, "after": after}
        write_sealed_json(
            tmp_path / "compensated/tiny-b/compensate.json",
            {"search": "mine", "perplexity": rows_of_fit},
        )
        (result,) = read_runs(["tiny-a", "tiny-b"], LABELS, tmp_path)
        assert ("mismatch" in warned(result)) is expected


def test_tasks_fail_by_a_tenth_and_beyond_noise(tmp_path: Path) -> None:
    target = study(tmp_path).targets[1]
    task, model, dense = "piqa", target.model, replace(target.dense, average=Mean(0.5, 0.0))

    def judged(lost: int, won: int, p: float = 1.0) -> bool:
        """With items of one task that were right and no longer are, and the other way round."""
        before = np.repeat([1.0, 0.0], 50)
        after = before + np.repeat([-1.0, 0.0, 1.0, 0.0], [lost, 50 - lost, won, 50 - won])
        own = {"scores": {task: after}, "p_gold": {task: p * np.full(100, 0.4)}}
        base = {"scores": {task: before}, "p_gold": {task: np.full(100, 0.4)}}
        return is_broken(replace(target, model=replace(model, **own), dense=replace(dense, **base)))

    # 10 % and 12 % of 50; 6 is 2.5 standard errors
    assert [judged(5, 0), judged(6, 0)] == [
        False,
        True,
    ]
    assert not judged(16, 10)  # 12 %, but 1.2 standard errors
    assert [judged(0, 0, 0.91), judged(0, 0, 0.89)] == [False, True]


def test_nothing_is_compared_with_a_time_that_is_not_known(tmp_path: Path) -> None:
    """One target was measured with other settings."""
    data, names = build(tmp_path), ["tiny-a", "tiny-b"]
    write_sealed_json(data / "evidence" / "tiny-a" / "speed.json", {"speed": None, "made": {}})
    write_report(data / "report", "A title", names, LABELS, data, True)
    (result,) = read_runs(names, LABELS, data)
    table = rows(headline(result))
    for measure in ("Prefill, tokens/s", "Generation, × dense", "Peak memory", "KV cache"):
        assert set(table[measure].values()) == {measure, "–", "not timed"}
    (verdict,) = [f for f in findings(result) if f.rule == "stop"]
    assert verdict.level is Level.NOTE
    assert recommended(result.targets) is None
    curve = _csv(data / "report" / "curve.csv")
    assert {row["speedup_generation"] for row in curve} == {""}
    assert {row["front"] for row in curve} == {"1"}


def test_a_speed_stands_beside_that_of_the_dense_model_in_the_same_turns(tmp_path: Path) -> None:
    data = build(tmp_path)
    table = rows(headline(read_runs(["tiny-a", "tiny-b"], LABELS, data)[0]))
    for target in ("tiny-a", "tiny-b"):
        speed = read_json(data / "evidence" / target / "speed.json")["speed"]
        pruned, dense = (
            31 / median(speed[item]["decode_seconds"]["samples"]) for item in ("pruned", "dense")
        )
        assert table["Decode, tokens/s"][target] == f"{pruned:.2f} (dense {dense:.2f})"


def test_a_report_needs_no_run_that_was_not_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone has evidence of targets that it has not built, and a flow may make another run."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(
        'runs: [smollm2]\ntargets: {a: {run: smollm2, budget: "0.1"}}\nreport: {title: T}\n'
    )
    shutil.copytree(root / "runs", "runs")
    Path("data/evidence/a").mkdir(parents=True)
    Path("data/evidence/a/results.json").write_text("{}")
    given: list[Any] = []
    monkeypatch.setattr(report_stage, "write_report", lambda *values: given.extend(values))
    report_stage.main("")
    assert given[1:4] == ["T", [], {}]


def test_racing_losers_are_in_no_ranking_and_no_curve(tmp_path: Path) -> None:
    """Every iteration holds a row over one calibration row with the lowest NLL of all."""
    plain, raced = study(tmp_path / "0"), study(tmp_path / "1", replace(World(), losers=True))
    (honest,), (other,) = plain.traces, raced.traces
    assert honest.curve == other.curve
    assert findings(plain) == findings(raced)


def test_methods_without_a_sequence(tmp_path: Path) -> None:
    """One mask for each budget; a width, whose calibration perplexity nobody knows."""
    walked = study(tmp_path / "floating", others("floating", "floating"))
    assert walked.traces == ()
    nlls = (2.5, 2.5 + 0.03 + 0.035 + 0.04, 2.5 + 0.03 + 0.035 + 0.04 + 0.05 + 0.06 + 0.07)
    assert curve(walked) == [str(math.exp(nll)) for nll in nlls]
    steps = [
        row
        for row in csv.DictReader(io.StringIO(iterations_csv([walked])))
        if row["target"] == "floating-a"
    ]
    assert [row["blocks"] for row in steps] == ["0", "2", "3"]
    assert not any(row["put_back"] for row in steps)
    assert parse_mask(",".join(row["removed"] for row in steps[1:])) == walked.targets[0].plan.mask
    assert np.log([float(row["perplexity"]) for row in steps]) == pytest.approx(
        [nlls[0], nlls[1] + 0.2, nlls[1]]
    )
    assert [row["ratio"] for row in steps] == ["0.0", "", str(walked.targets[0].ratio)]
    sliced = study(
        tmp_path / "slicegpt",
        others("slicegpt", "slicegpt", heldout_factor=2.5, speedups=(1.0, 1.01)),
    )
    assert curve(sliced) == ["", "", ""]
    taken = list(rows(headline(sliced))["Taken out"].values())
    assert taken[2:] == ["nothing", "width 576 → 480", "width 576 → 384"]


def test_searches_that_are_not_nested_are_both_shown(tmp_path: Path) -> None:
    result = study(tmp_path)
    short, long = result.targets
    other = replace(short, plan=replace(short.plan, order=("mha.11", "mlp.11", "mha.10")))
    assert result.traces == (long,)
    assert replace(result, targets=(other, long)).traces == (other, long)


def test_an_answer_that_nobody_guesses_is_in_the_average(tmp_path: Path) -> None:
    data = build(tmp_path)
    directories = sorted(path.parent for path in (data / "evidence").glob("*/results.json"))
    for path in directories:
        fields = _json(path / "results.json")
        fields["tasks"]["gsm8k"] = {
            "metric": "exact_match",
            "value": 0.5,
            "stderr": 0.5,
            "items": 2,
        }
        fields["chance"] |= {"gsm8k": 0.0}
        write_sealed_json(path / "results.json", fields)
        items = read_table(path / "items.parquet", ITEMS)[0].to_pylist()
        items += [
            items[0] | {"task": "gsm8k", "item": i, "acc": None, "exact_match": float(i)}
            for i in range(2)
        ]
        write_table(path / "items.parquet", pa.Table.from_pylist(items, ITEMS))
    (result,) = read_runs(["tiny-a", "tiny-b"], LABELS, data)
    assert list(result.chance) == [*CHANCE, "gsm8k"]
    assert all(set(option.model.scores) == {*CHANCE, "gsm8k"} for option in result.options)
    assert result.dense.model.scores["gsm8k"].tolist() == [0.0, 1.0]
    assert rows(headline(result))["gsm8k, %"]["chance"] == "0.0"


def test_what_healed_a_target_is_shown(tmp_path: Path) -> None:
    """Three targets with one budget: one as pruned, one compensated, one trained after that."""
    same = (("tiny-a", 3), ("tiny-b", 3), ("tiny-c", 3))
    build(tmp_path, replace(World(), removals=same, speedups=(1.1, 1.1, 1.1)))
    (plain,) = read_runs(["tiny-a"], LABELS, tmp_path)
    assert "Weights healed by" not in rows(headline(plain))
    for name, after, changes in (("tiny-a", 20.5, {"train": True}), ("tiny-b", 30.25, {})):
        path = tmp_path / "evidence" / name / "plan.json"
        write_sealed_json(path, _json(path) | {"compensate": "refit"} | changes)
        result = {"dense": 12.0, "before": 30.25, "after": after}
        write_sealed_json(
            tmp_path / "compensated" / name / "compensate.json",
            {"search": "mine", "perplexity": result},
        )
    labels = {"tiny": replace(LABEL, compensation="Wikipedia", training="LoRA on 8,000 samples")}
    (result,) = read_runs(["tiny-a", "tiny-b", "tiny-c"], labels, tmp_path)
    row = rows(headline(result))["Weights healed by"]
    assert [row[name] for name in ("tiny-c", "tiny-b", "tiny-a")] == [
        "nothing",
        "nothing",
        "refit + training",
    ]
    shown = facts(replace(result, targets=result.targets[1:]))
    assert shown["Training"] == "LoRA on 8,000 samples: tiny-a"
    assert "tiny-a: refit, 30.25 → 20.50 (dense 12.00)" in shown["Compensation"]


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda d: (d / "evidence/tiny-dense/results.json").unlink(), "missing-file"),
        (lambda d: (d / "plans/tiny-a/mine.parquet").write_bytes(b"PAR1"), "damaged-file"),
        (lambda d: (d / "evidence/tiny-a/items.parquet").write_bytes(b""), "damaged-file"),
        (
            lambda d: write_table(
                d / "evidence/tiny-a/items.parquet",
                read_table(d / "evidence/tiny-a/items.parquet", ITEMS)[0].slice(1),
            ),
            "different-items",
        ),
        (
            lambda d: write_sealed_json(
                d / "evidence/tiny-a/plan.json",
                _json(d / "evidence/tiny-a/plan.json") | {"order": ["mha.5", "mha.6", "mha.7"]},
            ),
            "different-searches",
        ),
    ],
)
def test_damaged_inputs_are_named_and_the_old_report_stays(
    tmp_path: Path, damage: Callable[[Path], object], rule: str
) -> None:
    build(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "old").touch()
    damage(tmp_path)
    with refused(rule):
        write_report(tmp_path / "report", "t", ["tiny-a"], LABELS, tmp_path, False)
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["old"]


def test_paired_errors_match_numpy_and_mark_only_real_differences(tmp_path: Path) -> None:
    result = study(tmp_path, replace(World(), accuracy_loss=0.25))
    dense, target = result.dense.model, result.targets[1].model
    errors = []
    for task in CHANCE:
        d = target.scores[task] - dense.scores[task]
        errors.append(d.std(ddof=1) / math.sqrt(50))
        assert paired(dense, target, task).value == pytest.approx(d.mean())
        assert paired(dense, target, task).stderr == pytest.approx(errors[-1])
    average = paired(dense, target)
    assert average.stderr == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3)
    assert average.value < -2 * average.stderr
    table = rows(headline(result))
    assert table["Average, %"]["tiny-b"].endswith("↓")
    assert not table["Average, %"]["dense"].endswith("↓")
    assert (table["winogrande, %"]["chance"], table["winogrande, %"]["dense"]) == (
        "50.0",
        "52.0 ± 7.1",
    )
    d = np.array([target.p_gold[task] - dense.p_gold[task] for task in CHANCE])
    change = paired_confidence(dense, target)
    assert change.value == pytest.approx(d.mean())
    assert change.stderr == pytest.approx(math.sqrt((d.var(axis=1, ddof=1) / 50).sum()) / 3)
    shown = np.mean([target.p_gold[task].mean() for task in CHANCE])
    assert table["p of the right answer, %"]["tiny-b"].startswith(f"{100 * shown:.1f} ± ")
    assert table["p of the right answer, %"]["tiny-b"].endswith("↓")
    equal = study(tmp_path / "equal")
    assert not any("↓" in cell or "↑" in cell for row in headline(equal).texts for cell in row)


def test_front_agrees_with_brute_force() -> None:
    """On a coarse grid, so that ties in one coordinate and duplicates abound."""
    random = np.random.default_rng(1)
    for size in (*range(6), *[20] * 200):
        points = [(int(x), int(y)) for x, y in random.integers(0, 7, (size, 2))]
        dominated = [
            any(p[0] <= q[0] and p[1] <= q[1] and (p[0] < q[0] or p[1] < q[1]) for p in points)
            for q in points
        ]
        assert front(points) == [i for i, below in enumerate(dominated) if not below]
    assert front([(1.0, 2.0)]) == [0]
    assert front([(1.0, 2.0), (1.0, 2.0), (1.0, 3.0), (2.0, 2.0)]) == [0, 1]


SEVERAL = (
    replace(World(), speedups=(1.05, 1.12)),
    replace(
        SHORTGPT,
        removals=(("shortgpt-a", 2), ("shortgpt-b", 5)),
        speedups=(1.13, 1.3),
        accuracy_loss=0.2,
    ),
    others("random", "random", speedups=(1.05, 1.14), costs=(0.1, 0.12, 0.14, 0.16, 0.18, 0.2)),
    others("floating", "floating", speedups=(1.05, 1.1), heldout_factor=1.0),
    others("slicegpt", "slicegpt", speedups=(0.97, 1.02), heldout_factor=1.7),
)
NAMES = [name for world in SEVERAL for name, _ in world.removals]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs of one model."""
    data = tmp_path_factory.mktemp("several")
    for world in SEVERAL:
        build(data, world)
    write_report(data / "report", "Several", NAMES, LABELS, data, False)
    return data


def test_every_run_has_a_verdict_of_its_own(several: Path) -> None:
    runs = read_runs(NAMES, LABELS, several)
    assert (
        [section.title for section in page_of(*runs).sections].count("Tiny")
        == len(runs)
        == len(SEVERAL)
    )
    assert not re.search(r"\b(nan|None|inf)\b", (several / "report" / "index.html").read_text())


@pytest.mark.parametrize(
    ("method", "changes", "unit"),
    [
        ("greedy", {"acceleration": "lazy+race"}, "blocks"),
        ("greedy", {"metric": "block_influence", "candidates": "mlp"}, "MLP blocks"),
        ("one_shot", {"metric": "kl", "unit": "layer"}, "whole layers"),
        ("greedy", {"unit": "shifted"}, "shifted layers"),
        ("random", {}, "blocks"),
        (
            "given",
            {"options": {"order": ("mha.1,mlp.1", "mha.2,mlp.2", "mha.0,mlp.0")}},
            "whole layers",
        ),
        ("floating", {"candidates": "mha"}, "MHA blocks"),
        ("floating", {"options": {"tries": 6}}, "blocks"),
    ],
)
def test_the_tables_of_every_search_are_read(
    tmp_path: Path, method: str, changes: dict[str, Any], unit: str
) -> None:
    """From the search itself, by way of the files that score and commit write."""
    config = small_config(5)
    # rows differ
    scorer = FakeScorer(lambda *asked: by_text(*asked) + by_text(*asked) * asked[-1] % 0.37)
    run = scored(tmp_path, scorer, config, ["4blocks"], short_rows(4), method=method, **changes)
    plan, tables = KINDS["mask"].commit(tmp_path / "scores", config, "4blocks", run.current)
    assert plan.nested == SEARCHES[method].nested
    trace = read_trace(
        trace_directory(tmp_path / "scores", run.current, "4blocks"), run.current.search
    )
    order, perplexities = iteration.removals(trace, plan.nested)
    path = tmp_path / "iterations.parquet"
    save_iterations(tables, path)
    table = read_iterations(path)
    assert unit_of(table) == unit
    steps = steps_of(table, plan, path)
    if plan.nested:
        assert list(plan.order) == [format_mask(unit) for unit in order[: len(plan.order)]]
        assert [step.perplexity for step in steps] == pytest.approx(
            perplexities[: len(plan.order) + 1]
        )
    else:
        chosen = [DENSE, *(result.removed for result in trace)]
        assert [step.mask for step in steps] == [mask for mask, _ in groupby(chosen)]
