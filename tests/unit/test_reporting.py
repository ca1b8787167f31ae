"""The report: its numbers are the inputs' numbers, its warnings come when they should, its page loads nothing."""

from __future__ import annotations

import csv
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

from blockpruner.blocks import Mask, format_mask, removable_units
from blockpruner.errors import InputError
from blockpruner.reporting.findings import Level, findings, first_jump, recommended
from blockpruner.reporting.inputs import ITERATIONS, RunLabels, Study, paired, read_studies
from blockpruner.reporting.page import build_page
from blockpruner.reporting.report import write_report
from blockpruner.reporting.tables import headline
from blockpruner.tables import write_json

LAYERS, ROWS = 12, 4
MHA, MLP, TOTAL = 900_000, 2_700_000, 60_000_000
CHANCE = {"piqa": 0.5, "winogrande": 0.5, "arc_easy": 0.25}
LABELS = {"tiny": RunLabels("tiny 1.0 (float32)", "Alpaca prompts", "Wikipedia", "stock tasks")}


@dataclass(frozen=True)
class World:
    """What the fixture writes; a test changes one field. costs: NLL rise of each removal; speedups: by target."""

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
    results(data / "results" / "tiny-dense", world, 0, 0.0, None)
    for position, (target, count) in enumerate(world.removals):
        plan = {
            "kind": "mask", "target": target, "run": "tiny", "budget": "0.1", "method": "greedy",
            "metric": "perplexity", "search": "f00d", "layers": world.layers,
            "removed": format_mask(masks[count - 1]).split(","),
            "order": [format_mask(unit) for unit in queue[:count]], "ratio": _ratio(masks[count - 1]),
            "ratios": [_ratio(mask) for mask in masks[:count]],
            "blocks": {kind: sum(b.kind == kind for b in masks[count - 1]) for kind in ("mha", "mlp")},
            "parameters": {"dense": TOTAL, "pruned": round(TOTAL * (1 - _ratio(masks[count - 1])))},
            "calibration": {"rows": ROWS, "tokens": 512, "dense_perplexity": math.exp(nlls[0]),
                            "perplexity": math.exp(nlls[count])},
        }  # fmt: skip
        write_json(data / "plans" / target / "plan.json", plan)
        used = [row for row in rows if row["iteration"] < count]
        pq.write_table(pa.Table.from_pylist(used, ITERATIONS), data / "plans" / target / "iterations.parquet")
        heldout = world.heldout_factor * (nlls[count] - nlls[0])
        results(data / "results" / target, world, position + 1, heldout, (world.speedups[position], plan))
    counts = {"trials_computed": 123, "trials_reused": 45, "seconds": 67.0, "units_computed": 123, "iterations": 6}
    write_json(data / "metrics" / "tiny" / "score.json", counts)
    return data


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
        items += [{"task": task, "item": i, "acc": s, "acc_norm": None} for i, s in enumerate(score)]
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
    pq.write_table(pa.Table.from_pylist(items), path / "items.parquet")


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
    names = [f"tiny-{plot}" for plot in ("perplexity", "accuracy", "speed", "tasks")] + ["tiny-b-map", "tiny-b-heat"]
    assert {p.relative_to(report).as_posix() for p in report.rglob("*") if p.is_file()} == {
        "report.md", "index.html", "curve.csv", "iterations.csv",
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
    assert names == ["curve.csv", "index.html", "iterations.csv", "report.md"]
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
        assert len(right.rises) == len(left.rises) - 1
        assert right.rises.items() <= left.rises.items()
        assert min(right.rises.values()) == right.rise
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
    pq.write_table(pa.Table.from_pylist(rows), path)
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
        (lambda d: (d / "results/tiny-a/items.parquet").write_bytes(b""), r"items\.parquet cannot be read"),
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
