"""The report: its numbers are the inputs' numbers, its warnings come when they should, its page loads nothing."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from blockpruner.core.blocks import BlockId, Mask, format_mask, parse_mask, removable_units
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.evaluation.store import ITEMS, write_timings
from blockpruner.methods.commit import commit_run, save_iterations
from blockpruner.reporting.comparison import front
from blockpruner.reporting.figures import figures, of_search
from blockpruner.reporting.findings import (
    Finding,
    Level,
    is_broken,
    is_mismatch,
    jump_at,
    noise,
    paired,
    paired_confidence,
    recommended,
    stop,
    warnings,
)
from blockpruner.reporting.grids import Grid
from blockpruner.reporting.inputs import (
    ITERATIONS,
    Coverage,
    ReportedRun,
    considered,
    read_iterations,
    read_studies,
    removals,
)
from blockpruner.reporting.pages import Facts, Page, to_markdown
from blockpruner.reporting.report import build_page, write_report
from blockpruner.reporting.results import RunLabels
from blockpruner.reporting.statistics import Mean
from blockpruner.reporting.tables import curve_csv, headline, sequence, tiles
from blockpruner.scoring.metrics import METRICS
from blockpruner.search import iteration
from blockpruner.search.registry import SEARCHES
from blockpruner.search.trace import read_trace, trace_directory
from blockpruner.store.files import write_json
from stages.report import name_of
from tests.builders import FakeScorer, by_text, scored, short_rows, small_config, speed_facts

LAYERS, ROWS = 12, 4
MHA, MLP, TOTAL = 900_000, 2_700_000, 60_000_000
CHANCE = {"piqa": 0.5, "winogrande": 0.5, "arc_easy": 0.25}
LABEL = RunLabels("Tiny", "tiny 1.0 (float32)", "Alpaca prompts", "Wikipedia", "stock tasks")
LABELS = dict.fromkeys(("tiny", "shortgpt", "kl", "random", "swap", "laco", "slicegpt"), LABEL)


@dataclass(frozen=True)
class World:
    """What the fixture writes; a test changes one field. costs: NLL rise of each removal; speedups: by target;
    drift: of the repeats of pruned models."""

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
        write_json(data / "timings" / f"{world.run}-search.json", counts)
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
        return changed | {"kind": "laco", "order": merges, "blocks": {"mha": count, "mlp": count},
                          "details": details}  # fmt: skip
    if world.method == "slicegpt":
        calibration = plan["calibration"] | {"dense_perplexity": None, "perplexity": None}
        return changed | {"kind": "slicegpt", "blocks": {"mha": 0, "mlp": 0}, "calibration": calibration,
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
        p_gold = chance + 0.1 * right - 0.05 * position * world.accuracy_loss * np.arange(n) / n
        both = zip(score, p_gold, strict=True)
        items += [{"task": task, "item": i, "acc": s, "p_gold": p} | unread for i, (s, p) in enumerate(both)]
    average = {"value": np.mean([t["value"] for t in tasks.values()]),
               "stderr": math.sqrt(sum(t["stderr"] ** 2 for t in tasks.values())) / len(tasks)}  # fmt: skip
    parameters = pruned[1]["parameters"]["pruned"] if pruned else TOTAL
    speed: dict[str, Any] = {"dense": _speed(1.0, TOTAL, 24)}
    if pruned:
        factor, plan = pruned
        speed["pruned"] = _speed(factor, parameters, 24 - 2 * plan["blocks"]["mha"], world.drift)
        speed |= {
            f"speedup_{part}": speed["dense"][key]["median"] / speed["pruned"][key]["median"]
            for part in ("prefill", "decode", "generation") if (key := f"{part}_seconds")
        }  # fmt: skip
    wobble = np.array([-2, 1, 1, -1, 1, 0]) * 0.005 * position
    rows = math.log(20) + heldout + np.array([-0.3, 0.2, 0.1, 0.4, -0.4, 0.0]) + wobble
    perplexity = {"perplexity": 20 * math.exp(heldout), "nll": math.log(20) + heldout, "row_nll": rows.tolist(),
                  "rows": 6, "tokens": 6144, "seq_len": 1024}  # fmt: skip
    samples = [{"prompt": "Why <blue>?", "text": f"answer {position}"}, {"prompt": "And why?", "text": ""}]
    write_json(path / "results.json", {"parameters": parameters, "weight_bytes": 4 * parameters, "speed": speed,
               "perplexity": perplexity, "samples": samples, "formats": ["gguf", "hf"] if pruned else [],
               "tasks": tasks, "average": average, "chance": CHANCE,
               "made": {"piqa": MADE, "old": {}, "perplexity": MADE if pruned else MADE | ELSEWHERE}})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(items, ITEMS), path / "items.parquet")


MADE = {
    "when": "2025-03-01T10:00:00Z", "commit": "c0ffee" * 6 + "c0ff+", "torch": "2.9.9", "transformers": "5.99.0",
    "processor": "3 x Old CPU", "device": "cpu", "device_name": "cpu", "attention": "eager",
}  # fmt: skip
ELSEWHERE = {"when": "2025-04-02T10:00:00Z", "device": "cuda", "device_name": "Some Card", "attention": "sdpa"}


def test_a_page_names_where_and_when_its_numbers_were_made(report: Path) -> None:
    """Once for each place, and never the machine that writes the page."""
    line = (report / "report.md").read_text().rstrip().rpartition("\n")[2]
    software = "with torch 2.9.9 and transformers 5.99.0 at commit c0ffeec0ffee+"
    assert line == (
        f"Results were computed: 5 on 3 x Old CPU, attention eager, {software}, 2025-03-01; "
        f"1 on Some Card (3 x Old CPU), attention sdpa, {software}, 2025-04-02."
    )
    assert line in (report / "index.html").read_text()


def _speed(factor: float, parameters: int, kibibytes: int, drifts: tuple[float, ...] = World.drift) -> dict[str, Any]:
    seconds = {"prefill": 0.08, "decode": 1.92, "generation": 2.0}
    samples = {part: [s / factor * drift for drift in drifts] for part, s in seconds.items()}
    sizes = 1024 * kibibytes, 4 * parameters
    return speed_facts(samples, *sizes, prompt_tokens=64, new_tokens=32, batch=1, repeats=5)


def study(tmp_path: Path, world: World = World()) -> ReportedRun:
    build(tmp_path, world)
    return read_studies([name for name, _ in world.removals], {world.run: LABEL}, tmp_path)[0]


def others(run: str, method: str, **changes: Any) -> World:
    """A run of another method, its targets named after it."""
    world = replace(World(), run=run, method=method, removals=((f"{run}-a", 3), (f"{run}-b", 6)))
    return replace(world, **changes)


SHORTGPT = others(
    "shortgpt", "one_shot", metric="block_influence", unit="layer", costs=(0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
)


def findings(found: ReportedRun) -> list[Finding]:
    return [*warnings(found.targets, found.traces), stop(found.targets), noise(found)]


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


def drawn(found: ReportedRun) -> dict[str, str]:
    """The SVG and the caption of a run's plots."""
    plots = [*figures(found), *(plot for target in found.targets for plot in of_search(target))]
    return {plot.name.removeprefix(f"{found.run}-"): plot.svg + plot.caption for plot in plots}


def rows(grid: Grid) -> dict[str, dict[str, str]]:
    """By the first column, then by title."""
    return {row[0]: dict(zip(grid.head, row, strict=True)) for row in grid.texts}


def curve(found: ReportedRun) -> list[str]:
    """Calibration perplexities in curve.csv."""
    return [row["perplexity_calibration"] for row in csv.DictReader(io.StringIO(curve_csv([found])))]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = build(tmp_path_factory.mktemp("report"))
    write_report(data / "report", "A <b>bold</b> | title & more", ["tiny-b", "tiny-a"], LABELS, data, True)
    return data / "report"


def test_report_is_complete_and_its_tables_hold_the_inputs(report: Path) -> None:
    data = report.parent
    names = [*(f"tiny-{plot}" for plot in ("pareto", "perplexity", "differences")), "tiny-b-map", "tiny-b-heat"]
    assert {p.relative_to(report).as_posix() for p in report.rglob("*") if p.is_file()} == {
        "report.md", "index.html", "curve.csv", "iterations.csv", "pareto.csv",
        *(f"plots/{name}.{kind}" for name in names for kind in ("svg", "png")),
    }  # fmt: skip
    dense, a, b = (_json(data / "results" / name / "results.json") for name in ("tiny-dense", "tiny-a", "tiny-b"))
    markdown, page = (report / "report.md").read_text(), (report / "index.html").read_text()
    perplexities = [f"{r['perplexity']['perplexity']:.2f}" for r in (dense, a, b)]
    assert f"| **Held-out perplexity** | **–** | {' | '.join(f'**{p}**' for p in perplexities)} |" in markdown
    assert "".join(f'<td class="n">{p}</td>' for p in perplexities) in page
    for result in (dense, a, b):
        for score in (*result["tasks"].values(), result["average"]):
            assert f"{100 * score['value']:.1f} ± {100 * score['stderr']:.1f}" in page
        assert f"{result['parameters'] / 1e6:.1f} M" in page
    plan = _json(data / "plans" / "tiny-b" / "plan.json")
    for text in (f"{100 * plan['ratio']:.1f} %", f"{plan['blocks']['mha']} MHA + {plan['blocks']['mlp']} MLP", "1.05 [",
                 "1.12 [", "1.12×", "896.0", "computed 123 trials", "reused 45", "4 rows, 512 tokens", "± 7",
                 "standard error is about 7 points"):  # fmt: skip
        assert text in page


def test_the_big_row_has_the_intervals_of_scipy(tmp_path: Path) -> None:
    build(tmp_path, replace(World(), accuracy_loss=0.25))
    target = read_studies(["tiny-a", "tiny-b"], {"tiny": LABEL}, tmp_path)[0].targets[1]
    size, perplexity, answers, speed, cache = tiles(target).of
    saved = 100 * 2 * target.plan.blocks["mha"] / 24
    assert (size.value, cache.value) == (f"−{100 * target.ratio:.1f} %", f"−{saved:.0f} %")
    dense, pruned = (_json(tmp_path / f"results/tiny-{name}/results.json")["perplexity"] for name in ("dense", "b"))
    d = np.subtract(pruned["row_nll"], dense["row_nll"])
    low, high = np.exp(stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d)))
    assert perplexity.value == f"{math.exp(d.mean()):.2f}×" and perplexity.tone == "bad"
    assert perplexity.interval == f"95 %: {low:.2f} to {high:.2f}"
    items = [pq.read_table(tmp_path / f"results/tiny-{name}/items.parquet").to_pylist() for name in ("dense", "b")]
    p = np.array([b["p_gold"] - a["p_gold"] for a, b in zip(*items, strict=True)]).reshape(3, 50)
    error = math.sqrt(float((p.var(axis=1, ddof=1) / 50).sum())) / 3
    ends = [f"{100 * (p.mean() + k * error):+.1f}".replace("-", "−") for k in (-2, 2)]
    assert (answers.interval, answers.tone) == (f"95 %: {' to '.join(ends)}", "bad")
    assert (speed.value, speed.tone) == ("1.12×", "good")
    bare = replace(target, model=replace(target.model, texts={"heldout": replace(target.model.heldout, row_nll=())}))
    assert (tiles(bare).of[1].tone, tiles(bare).of[1].interval) == ("", "its interval is not known")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"source": "pypi", "package": "p==1", "file": "p/SmolLM2-135M-Instruct.Q4_1.gguf"}, "SmolLM2-135M-Instruct"),
        ({"source": "pypi-parts", "title": "t", "parts": [SimpleNamespace(file="d/gemma-3-270m-q4-k-m.gguf.part00")]},
         "gemma-3-270m"),
        ({"source": "hub", "repo": "Qwen/Qwen3-8B"}, "Qwen3-8B"),
        ({"source": "path", "path": Path("/models/mine-v1.5")}, "mine-v1.5"),
    ],
)  # fmt: skip
def test_a_model_has_a_short_name(source: dict[str, Any], name: str) -> None:
    assert name_of(SimpleNamespace(**source)) == name


def test_the_page_has_samples_and_commands_of_every_target(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert ">Why &lt;blue&gt;?</th>" in text and "Why <blue>" not in text
    assert [f">answer {i}</td>" in text for i in range(4)] == [True, True, True, False]
    for name in ("tiny-a", "tiny-b"):
        folder = report.parent / "checkpoints" / name
        for command in (
            f"blockpruner chat {folder}/hf",
            f"python -m vllm.entrypoints.openai.api_server --model {folder}/hf --host 127.0.0.1 --port 8000",
            f"llama-server -m {folder}/gguf/model-Q8_0.gguf --port 8080",
        ):
            assert f"<pre>{command}</pre>" in text
    assert "tiny-b/nas" not in text and text.index("Use tiny-b") < text.index("Use tiny-a")


def test_marks_tell_their_values_and_a_plot_describes_itself(tmp_path: Path) -> None:
    found, space = study(tmp_path), "{http://www.w3.org/2000/svg}"
    trace = found.targets[1]
    roots = {plot.name: ElementTree.fromstring(plot.svg) for plot in (*figures(found), *of_search(trace))}
    for root in roots.values():
        title, description = list(root)[:2]
        assert (title.tag, description.tag) == (f"{space}title", f"{space}desc") and description.text
    cells = [group.findtext(f"{space}title") or "" for group in roots["tiny-b-heat"].iter(f"{space}g")]
    told = [cell for cell in cells if cell.startswith("removal ")]
    costs = [
        (f"removal {i}: {format_mask(u)} {r.costs[u]:.4g}") for i, r in enumerate(trace.removals, 1) for u in r.costs
    ]
    assert sorted(told) == sorted(costs)
    heldout = [mark for mark in roots["tiny-perplexity"].iter(f"{space}title") if "on held-out" in (mark.text or "")]
    assert [mark.text.partition("×")[0] for mark in heldout] == [
        f"{o.name}: {math.exp(o.heldout_rise):.2f}" for o in found.targets
    ]


def test_a_perplexity_is_a_row_of_its_own_and_in_no_average(tmp_path: Path) -> None:
    data = build(tmp_path)
    directories = sorted(path.parent for path in (data / "results").glob("*/results.json"))
    for number, path in enumerate(directories):
        fields = _json(path / "results.json")
        fields["tasks"]["wikitext"] = {"metric": "word_perplexity", "value": 30.0 + number, "stderr": None, "items": 2}
        fields["tasks"]["gsm8k"] = {"metric": "exact_match", "value": 0.5, "stderr": 0.5, "items": 2}
        fields["chance"] |= {"wikitext": None, "gsm8k": 0.0}
        write_json(path / "results.json", fields)
        items = pq.read_table(path / "items.parquet").to_pylist()
        items += [items[0] | {"task": "gsm8k", "item": i, "acc": None, "exact_match": float(i)} for i in range(2)]
        items += [items[0] | {"task": "wikitext", "item": i, "acc": None, "word_perplexity": 30.0} for i in range(2)]
        pq.write_table(pa.Table.from_pylist(items, ITEMS), path / "items.parquet")
    (found,) = read_studies(["tiny-a", "tiny-b"], LABELS, data)
    assert list(found.chance) == [*CHANCE, "gsm8k"]
    assert all(set(option.model.scores) == {*CHANCE, "gsm8k"} for option in found.options)
    assert found.dense.model.scores["gsm8k"].tolist() == [0.0, 1.0]
    values = [30.0 + [path.name for path in directories].index(name) for name in ("tiny-dense", "tiny-a", "tiny-b")]
    write_report(data / "report", "title", ["tiny-b", "tiny-a"], LABELS, data, False)
    markdown = (data / "report" / "report.md").read_text()
    assert f"| wikitext, word perplexity | – | {' | '.join(f'{value:.2f}' for value in values)} |" in markdown
    assert "| gsm8k, % | 0.0 | 50.0 ± 50.0" in markdown
    fields["tasks"], fields["chance"] = {"wikitext": fields["tasks"]["wikitext"]}, {"wikitext": None}
    write_json(data / "results" / "tiny-dense" / "results.json", fields)
    with pytest.raises(InputError, match=r"no task that is scored by accuracy.*zero_shot\.tasks beside wikitext"):
        read_studies(["tiny-a"], LABELS, data)


def test_csv_files_hold_full_precision(report: Path) -> None:
    dense, _, last = _csv(report / "curve.csv")
    plan, result = (_json(report.parent / p) for p in ("plans/tiny-b/plan.json", "results/tiny-b/results.json"))
    assert (dense["target"], float(dense["ratio"]), last["target"], int(last["removals"])) == (
        "tiny-dense", 0, "tiny-b", 6,
    )  # fmt: skip
    assert float(last["ratio"]) == plan["ratio"]
    assert float(last["perplexity_heldout"]) == result["perplexity"]["perplexity"]
    assert float(last["perplexity_calibration"]) == plan["calibration"]["perplexity"]
    assert float(last["accuracy"]) == result["average"]["value"]
    for part in ("prefill", "decode", "generation"):
        assert float(last[f"speedup_{part}"]) == result["speed"][f"speedup_{part}"]
    steps = _csv(report / "iterations.csv")
    assert [row["removed"] for row in steps] == ["", *plan["order"]]
    assert [float(row["ratio"]) for row in steps] == [0.0, *plan["ratios"]]
    nll = 2.5 + np.cumsum([0, *World().costs])
    assert np.allclose([float(row["perplexity"]) for row in steps], np.exp(nll), rtol=1e-12)
    assert [int(row["units_scored"]) for row in steps] == [0, 24, 23, 22, 21, 20, 19]
    told = [tuple(row[key] for key in ("rows_compared", "units_compared", "rivals", "kept")) for row in steps]
    assert told == [("",) * 4, *(("4", str(units), "0", "1.0") for units in (23, 22, 21, 20, 19, 18))]
    (study,) = read_studies(["tiny-a", "tiny-b"], LABELS, report.parent)
    costs = [sorted(removal.costs.values()) for removal in study.traces[0].removals]
    margins = [second - first for first, second, *_ in costs]
    assert steps[0]["margin"] == "" and [float(row["margin"]) for row in steps[1:]] == pytest.approx(margins)


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
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "data", "srcset")]


def test_page_loads_nothing_and_escapes_its_title(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = _Page(text)
    places = {target for target in page.loads if not target.startswith(("#", "data:image/png;base64,"))}
    assert all(target[1:] in page.ids for target in page.loads if target[0] == "#")
    assert places == {"curve.csv", "iterations.csv", "pareto.csv"} <= {path.name for path in report.iterdir()}
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert {url.rpartition("/")[0] for url in re.findall(r"https?://[^\"' <]+", text)} <= {
        "http://www.w3.org/2000", "http://www.w3.org/1999",
    }  # fmt: skip
    assert "<h1>A &lt;b&gt;bold&lt;/b&gt; | title &amp; more</h1>" in text and "<b>bold" not in text
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
    found = study(tmp_path, replace(World(), costs=costs))
    (trace,) = found.traces
    assert jump_at(trace) == index
    assert warned(found) == ([] if index is None else ["jump"])
    if index is not None:
        text = finding(found, "jump")
        assert trace.plan.order[index] in text and f"to {math.exp(2.5 + sum(costs[: index + 1])):.2f} at" in text
        safe = f"{index}blocks ({100 * trace.plan.ratios[index - 1]:.2f} %"
        assert (safe if index else "no budget of this sequence") in text


@pytest.mark.parametrize(("factor", "names"), [(0.1, []), (1.8, []), (2.0, ["tiny-b"]), (2.5, ["tiny-a", "tiny-b"])])
def test_mismatch_needs_a_factor_and_a_distance(tmp_path: Path, factor: float, names: list[str]) -> None:
    """Calibration rises by 0.105 and 0.285 nats: 1.5 times that plus 0.1 is 2.45 and 1.85 times it."""
    found = study(tmp_path, replace(World(), heldout_factor=factor))
    assert warned(found) == (["mismatch"] if names else [])
    if names:
        text = finding(found, "mismatch")
        assert re.findall(r"tiny-\w", text) == names
        assert f"{math.exp(0.285 * factor):.2f}× against 1.33× at tiny-b" in text


def test_timings_lie_apart_and_a_report_does_without_them(tmp_path: Path) -> None:
    """The page is the one of results that hold their timings, as those of before do."""
    data, names = build(tmp_path), ["tiny-a", "tiny-b"]

    def page() -> str:
        write_report(data / "report", "A title", names, LABELS, data, False)
        return (data / "report" / "report.md").read_text()

    before = page()
    assert "s of scoring" in before and "Results were computed:" in before
    for path in sorted((data / "results").glob("*/results.json")):
        fields = _json(path)
        apart = {key: fields.pop(key) for key in ("speed", "made")}
        write_json(path, fields)
        write_timings(data / "timings", fields, apart)
    assert page() == before
    shutil.rmtree(data / "timings")
    after = page()
    assert "not timed" in after and "s of scoring" not in after and "Results were computed:" not in after
    rows = [line for line in before.splitlines() if line.startswith("| Held-out perplexity")]
    assert rows and all(row in after for row in rows)


@pytest.mark.parametrize("untimed", [("tiny-dense", "tiny-a", "tiny-b"), ("tiny-a",)])
def test_what_is_not_timed_is_said_to_be(tmp_path: Path, untimed: tuple[str, ...]) -> None:
    """Be it the whole run or a part that was computed with other settings: nothing is held against a time."""
    data, names = build(tmp_path), ["tiny-a", "tiny-b"]
    for name in untimed:
        path = data / "results" / name / "results.json"
        write_json(path, _json(path) | {"speed": None})
    write_report(data / "report", "A title", names, LABELS, data, True)
    markdown = (data / "report" / "report.md").read_text()
    rates = [f"{part}, {of}" for part in ("Prefill", "Decode", "Generation") for of in ("tokens/s", "× dense")]
    for measure in (*rates, "Peak memory", "KV cache"):
        assert f"| {measure} | – | not timed | not timed | not timed |" in markdown
    assert "- **Speed against dense:** not timed\n" in markdown and "No stopping point without times" in markdown
    listed = [line for line in markdown.splitlines() if line.startswith(("| tiny-a | ", "| tiny-b | "))]
    assert [line.count("not timed") for line in listed[:2]] == [2, 2] and all("●" in line for line in listed[:2])
    assert "Keep the dense model" not in markdown and "| Weights | – | 229 MiB |" in markdown
    assert "generation speed-up" not in (data / "report" / "plots" / "tiny-pareto.svg").read_text()
    curve, pareto = (_csv(data / "report" / f"{name}.csv") for name in ("curve", "pareto"))
    assert {row["speedup_generation"] for row in curve} == {row["front_speed"] for row in pareto} == {""}
    assert [row["target"] for row in pareto] == ["dense", *names]  # by size
    assert [row["front_parameters"] for row in pareto] == ["1", "1", "1"]


def test_little_speed_up_names_the_mlp(tmp_path: Path) -> None:
    """Six MLP blocks are 27 % of the parameters; half of the ideal gain of 37 % is 18.5 %."""
    mostly_mlp = replace(World(), candidates="mlp", speedups=(1.09, 1.18))
    found = study(tmp_path / "0", mostly_mlp)
    assert warned(found) == ["slow"]
    text = finding(found, "slow")
    assert re.findall(r"tiny-\w", text) == ["tiny-b"]
    assert all(part in text for part in ("Mostly MLP", "27.0 %", "1.18×", "1.37×"))
    assert warned(study(tmp_path / "1", replace(mostly_mlp, speedups=(1.09, 1.19)))) == []
    low = replace(World(), candidates="mha", speedups=(1.0, 1.0))  # 9 % of the parameters
    assert warned(study(tmp_path / "2", low)) == []


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
        ({"accuracy_loss": 0.25}, None),  # without a jump, below 1.5 times the dense perplexity
        ({"accuracy_loss": 0.04}, "tiny-b"),
        ({"drift": (1.1, 0.9, 1.2, 1.0, 1.05)}, None),  # the medians are 1.00 and 1.07 times as fast: noise
        ({"drift": (1.1, 0.9, 1.2, 1.0, 1.05), "speedups": (1.05, 1.4)}, "tiny-b"),
    ],
)
def test_recommended_stop(tmp_path: Path, change: dict[str, Any], name: str | None) -> None:
    found = study(tmp_path, replace(World(), **change))
    best = recommended(found.targets)
    assert (best and best.name) == name
    assert (f"Take {name}" if name else "Keep the dense model") in finding(found, "stop")


PAST_JUMP = World(costs=(0.03, 0.03, 0.9, 0.3, 0.3, 0.3), heldout_factor=0.2, speedups=(1.10, 1.11))
"""Both targets are past the third removal, a jump. Held-out perplexity is 1.21 and 1.45 times the dense model's."""


def healed(tmp_path: Path, world: World, *targets: str) -> ReportedRun:
    """A run of which these targets are trained."""
    build(tmp_path, world)
    for path in (tmp_path / "plans" / target / "plan.json" for target in targets):
        write_json(path, _json(path) | {"train": True})
    return read_studies([name for name, _ in world.removals], LABELS, tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "targets", "name", "broken"),
    [
        ({}, "", None, ""),
        ({}, "ab", "tiny-a", ""),
        ({}, "b", "tiny-b", ""),  # a plain target past the jump bars no healed one
        ({"heldout_factor": 0.215}, "b", "tiny-b", ""),  # 0.400 nats, and ln 1.5 is 0.405
        ({"heldout_factor": 0.22}, "ab", "tiny-a", "b"),
        ({"heldout_factor": 0.22}, "b", None, "b"),
        ({"speedups": (0.99, 0.99)}, "ab", None, ""),
        ({"accuracy_loss": 0.25}, "ab", None, "ab"),
        ({"accuracy_loss": 0.04}, "b", "tiny-b", ""),
    ],
)
def test_a_healed_model_is_judged_by_itself(
    tmp_path: Path, change: dict[str, Any], targets: str, name: str | None, broken: str
) -> None:
    found = healed(tmp_path, replace(PAST_JUMP, **change), *(f"tiny-{target}" for target in targets))
    best = recommended(found.targets)
    assert (best and best.name) == name
    assert [o.name for o in found.targets if is_broken(o)] == [f"tiny-{target}" for target in broken]
    assert {*warned(found)} - {"slow"} == {*["jump"] * (targets != "ab"), *["broken"] * bool(broken)}
    text = finding(found, "jump")
    assert ("breaks the model before healing" in text) == (targets == "ab")
    assert re.findall(r"tiny-(\w)", text.partition("but healed")[2]) == list(targets)


def test_healed_tasks_fail_by_a_tenth_and_beyond_noise(tmp_path: Path) -> None:
    target = healed(tmp_path, World(), "tiny-b").targets[1]
    task, model, dense = "piqa", target.model, replace(target.dense, average=Mean(0.5, 0.0))

    def judged(lost: int, won: int, p: float = 1.0) -> bool:
        """With items of one task that were right and no longer are, and the other way round."""
        before = np.repeat([1.0, 0.0], 50)
        after = before + np.repeat([-1.0, 0.0, 1.0, 0.0], [lost, 50 - lost, won, 50 - won])
        own = {"scores": {task: after}, "p_gold": {task: p * np.full(100, 0.4)}}
        base = {"scores": {task: before}, "p_gold": {task: np.full(100, 0.4)}}
        return is_broken(replace(target, model=replace(model, **own), dense=replace(dense, **base)))

    assert [judged(5, 0), judged(6, 0)] == [False, True]  # 10 % and 12 % of 50; 6 is 2.5 standard errors
    assert not judged(16, 10)  # 12 %, but 1.2 standard errors
    assert [judged(0, 0, 0.91), judged(0, 0, 0.89)] == [False, True]


def test_noise_is_what_the_interval_of_the_speed_up_holds(tmp_path: Path) -> None:
    """Against all samples of five pairs with replacement."""
    found = study(tmp_path, replace(World(), drift=(1.1, 0.9, 1.2, 1.0, 1.05)))
    for target in found.targets:
        dense, pruned = (np.array(s.seconds["generation"]) for s in (target.race.dense, target.race.pruned))
        every = np.array(list(itertools.product(range(5), repeat=5)))
        low, high = np.quantile(np.median(dense[every], axis=1) / np.median(pruned[every], axis=1), [0.025, 0.975])
        assert (target.race.is_faster, target.race.is_noise) == (low > 1, low <= 1 <= high)
    assert [target.race.is_noise for target in found.targets] == [True, True]
    assert [tiles(target).of[3].interval.endswith(", within noise") for target in found.targets] == [True, True]


@pytest.mark.parametrize(("slowest", "rules"), [(1.49, []), (1.51, ["spread"])])
def test_spread_timings_are_warned_of(tmp_path: Path, slowest: float, rules: list[str]) -> None:
    found = study(tmp_path, replace(World(), drift=(1.0, 1.0, 1.0, 1.0, slowest)))
    assert warned(found) == rules
    if rules:
        assert "tiny-a (1.51×) and tiny-b (1.51×)" in finding(found, "spread")


def test_racing_losers_are_in_no_ranking_curve_or_heat_map(tmp_path: Path) -> None:
    """Every iteration holds a row over one calibration row with the lowest NLL of all."""
    plain, raced = study(tmp_path / "0"), study(tmp_path / "1", replace(World(), losers=True))
    (honest,), (other,) = plain.traces, raced.traces
    for left, right in zip(honest.removals, other.removals, strict=True):
        assert (left.partial, right.partial) == (0, 1)
        assert (right.added, right.perplexity, right.rise) == (left.added, left.perplexity, left.rise)
        assert len(right.costs) == len(left.costs) - 1 and right.costs.items() <= left.costs.items()
        assert min(right.costs.values()) == right.rise
    assert findings(plain) == findings(raced)


def test_the_page_says_what_was_spared_and_what_audits_found(tmp_path: Path) -> None:
    """Iteration 1 without two of its candidates; an audit in 2 that agrees and one in 3 that does not."""
    build(tmp_path, replace(World(), losers=True))
    path = tmp_path / "plans" / "tiny-b" / "iterations.parquet"
    table = pq.read_table(path).to_pylist()
    skipped = [row for row in table if row["iteration"] == 1 and not row["chosen"] and row["rows_used"] == ROWS][-2:]
    table = [row for row in table if row not in skipped]
    choice = {i: next(row["added"] for row in table if row["iteration"] == i and row["chosen"]) for i in (2, 3)}
    other = next(row["added"] for row in table if row["iteration"] == 3 and not row["chosen"])
    for row in table:
        if row["iteration"] in (2, 3):
            row["lazy_choice"] = row["added"] == {2: choice[2], 3: other}[row["iteration"]]
    pq.write_table(pa.Table.from_pylist(table, ITERATIONS), path)
    (found,) = read_studies(["tiny-b"], LABELS, tmp_path)
    text = facts(found)["Search"]
    everything = sum(2 * LAYERS - i for i in range(6))
    computed = (everything - 2 - 6 + 6 / ROWS) / everything
    assert f"{everything - 8} candidates scored on all rows in 6 iterations of {everything}; 6 were dropped" in text
    assert f"2 not considered: {100 * computed:.1f} %" in text
    assert f"2 audits, which chose otherwise: {choice[3]}, not {other}" in text
    next(row for row in table if row["chosen"])["rows_used"] = 1
    pq.write_table(pa.Table.from_pylist(table, ITERATIONS), path)
    with pytest.raises(InputError, match=r"0 fully scored choices in iteration 0.*dvc repro"):
        read_studies(["tiny-b"], LABELS, tmp_path)


def test_a_healed_target_says_so(tmp_path: Path) -> None:
    """Three targets with one budget: one as pruned, one compensated, one trained after that; marked, in this order."""
    same = (("tiny-a", 3), ("tiny-b", 3), ("tiny-c", 3))
    build(tmp_path, replace(World(), removals=same, speedups=(1.1, 1.1, 1.1)))
    (plain,) = read_studies(["tiny-a"], LABELS, tmp_path)
    assert not {"Training", "Compensation"} & facts(plain).keys()
    assert "Weights healed by" not in rows(headline(plain))
    for name, after, changes in (("tiny-a", 20.5, {"train": True}), ("tiny-b", 30.25, {})):
        path = tmp_path / "plans" / name / "plan.json"
        write_json(path, _json(path) | {"compensate": "refit"} | changes)
        found = {"dense": 12.0, "before": 30.25, "after": after}
        write_json(tmp_path / "compensated" / name / "compensate.json", {"enabled": True, "perplexity": found})
    labels = {"tiny": replace(LABEL, compensation="Wikipedia", training="LoRA on 8,000 samples")}
    (found,) = read_studies(["tiny-a", "tiny-b", "tiny-c"], labels, tmp_path)
    assert headline(found).head == ("", "chance", "dense", "tiny-c", "tiny-b", "tiny-a")
    row = list(rows(headline(found))["Weights healed by"].values())
    assert row == ["Weights healed by", "–", "nothing", "nothing", "nothing", "refit + training"]
    told = facts(replace(found, targets=found.targets[1:]))
    assert told["Training"] == "LoRA on 8,000 samples: tiny-a"
    assert told["Compensation"] == (
        "Wikipedia; tiny-b: refit, no help, left out; tiny-a: refit, 30.25 → 20.50 (dense 12.00)"
    )
    assert [row["method"] for row in rows(page_of(found).grids[0]).values()] == [
        "greedy, blocks, by perplexity", "greedy, blocks, by perplexity",
        "greedy, blocks, by perplexity + refit + training",
    ]  # fmt: skip


def test_paired_errors_match_numpy_and_mark_only_real_differences(tmp_path: Path) -> None:
    found = study(tmp_path, replace(World(), accuracy_loss=0.25))
    dense, target = found.dense.model, found.targets[1].model
    errors = []
    for task in CHANCE:
        d = target.scores[task] - dense.scores[task]
        errors.append(d.std(ddof=1) / math.sqrt(50))
        assert paired(dense, target, task).value == pytest.approx(d.mean())
        assert paired(dense, target, task).stderr == pytest.approx(errors[-1])
    average = paired(dense, target)
    assert average.stderr == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3)
    assert average.value < -2 * average.stderr
    table = rows(headline(found))
    assert table["Average, %"]["tiny-b"].endswith("↓") and not table["Average, %"]["dense"].endswith("↓")
    assert (table["winogrande, %"]["chance"], table["winogrande, %"]["dense"]) == ("50.0", "52.0 ± 7.1 †")
    assert "winogrande (dense, tiny-a)" in finding(found, "noise")
    d = np.array([target.p_gold[task] - dense.p_gold[task] for task in CHANCE])
    change = paired_confidence(dense, target)
    assert change.value == pytest.approx(d.mean())
    assert change.stderr == pytest.approx(math.sqrt((d.var(axis=1, ddof=1) / 50).sum()) / 3)
    shown = np.mean([target.p_gold[task].mean() for task in CHANCE])
    assert table["p of the right answer, %"]["tiny-b"].startswith(f"{100 * shown:.1f} ± ")
    assert table["p of the right answer, %"]["tiny-b"].endswith("↓")
    equal = study(tmp_path / "equal")
    assert not any("↓" in cell or "↑" in cell for row in headline(equal).texts for cell in row)
    assert [tiles(o).of[2].tone for o in (found.targets[1], equal.targets[1])] == ["bad", ""]


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
            "tiny-dense and tiny-a were evaluated on different items of piqa",
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


def test_searches_that_are_not_nested_are_both_shown(tmp_path: Path) -> None:
    found = study(tmp_path)
    short, long = found.targets
    other = replace(short, plan=replace(short.plan, order=("mha.11", "mlp.11", "mha.10")))
    assert found.traces == (long,)
    assert replace(found, targets=(other, long)).traces == (other, long)


def test_whole_layers_count_as_their_blocks(tmp_path: Path) -> None:
    found = study(tmp_path, replace(World(), unit="layer", costs=(0.03, 0.035, 0.04, 0.05, 0.35, 0.07)))
    assert "The last safe budget is 8blocks" in finding(found, "jump")
    text = to_markdown(build_page("t", [found], draw=True))
    first = found.targets[1].order[0]
    assert first.count(",") == 1 and f"| 1 | {first} |" in text and "6 MHA + 6 MLP" in text


@pytest.mark.parametrize(
    ("metric", "factor", "words"),
    [
        ("kl", 0.1, ("KL divergence rise", "nats per token")),
        ("block_influence", 0.3, ("Block Influence", "1 - cosine")),
    ],
)
def test_costs_are_in_the_metric_and_rises_in_nats(
    tmp_path: Path, metric: str, factor: float, words: tuple[str, str]
) -> None:
    """A KL divergence counts from that of the mask before; an influence is of the unit itself."""
    (nll,) = study(tmp_path / "0").traces
    assert sequence(nll).head[4:] == ("NLL rise, nats/token", "next by, nats/token", "rivals", "same choice")
    found = study(tmp_path / "1", others("run", "greedy", metric=metric))
    (trace,) = found.traces
    for left, right in zip(nll.removals, trace.removals, strict=True):
        assert right.added == left.added and right.rise == pytest.approx(left.rise)
        assert right.costs == pytest.approx({unit: factor * cost for unit, cost in left.costs.items()})
    table = sequence(trace)
    assert table.head[5] == ", ".join(words)
    assert [float(row[5]) for row in table.texts[1:]] == pytest.approx([factor * c for c in World().costs], rel=1e-3)
    heat = drawn(found)["b-heat"]
    assert all(word in heat for word in words) and "NLL" not in heat
    search = f"greedy, blocks, by {METRICS[metric].title}: 129 candidates scored on all"
    assert facts(found)["Search"].startswith(search)


def test_one_ranking_decides_all_removals_and_nothing_was_spared(tmp_path: Path) -> None:
    found = study(tmp_path, SHORTGPT)
    words = "one-shot, whole layers, by Block Influence"
    assert [row["method"] for row in rows(page_of(found).grids[0]).values()] == [words, words]
    start = f"{words}: 12 candidates scored on all rows in 1 iteration; the last run of"
    assert facts(found)["Search"].startswith(start)
    (trace,) = found.traces
    ranking = trace.removals[0].costs
    assert [row[5] for row in sequence(trace).texts[1:]] == [f"{ranking[r.added]:.4g}" for r in trace.removals]
    assert [r.rise for r in trace.removals] == pytest.approx(SHORTGPT.costs)
    heat = drawn(found)["b-heat"]
    assert "This one ranking decided all removals" in heat and "whole layers" in heat and "already removed" not in heat


def test_a_heat_map_does_not_depend_on_the_order_of_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(frozenset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[BlockId]:
            return iter(sorted(super().__iter__(), key=str, reverse=True))

    found = study(tmp_path, SHORTGPT)
    heat, mask = drawn(found)["b-heat"], Plan.mask.fget
    monkeypatch.setattr(Plan, "mask", property(lambda plan: Backwards(mask(plan))))
    assert drawn(found)["b-heat"] == heat


def test_the_likelihood_of_answers_is_not_held_against_a_text(tmp_path: Path) -> None:
    answers = study(tmp_path, others("run", "greedy", metric="answer_likelihood", heldout_factor=2.5))
    assert warned(answers) == []
    assert "greedy, blocks, by likelihood of the right answers" in facts(answers)["Search"]
    assert "nats per token of the right answer" in drawn(answers)["b-heat"]


def test_a_search_without_scores_has_an_order_but_no_heat_map(tmp_path: Path) -> None:
    """Held-out text may then suffer as it likes: the calibration text has decided nothing."""
    found = study(tmp_path, others("random", "random", heldout_factor=2.5))
    assert set(drawn(found)) == {"perplexity", "differences", "a-map", "b-map"}
    assert facts(found)["Search"].startswith("random order, blocks: no candidate was scored; the last run")
    assert warned(found) == [] and len(sequence(found.traces[0]).rows) == 7


def test_a_search_for_one_budget_has_no_sequence(tmp_path: Path) -> None:
    found = study(tmp_path, others("swap", "swap"))
    assert found.traces == ()
    assert {t.considered for t in found.targets} == {Coverage("blocks", 2, 3, 1)}
    assert facts(found)["Search"].startswith(
        "swap search, blocks, by perplexity: 6 masks scored on all rows and 2 on the first rows only, in 4 steps of 2 "
        "searches, one for each budget; the last"
    )
    text = to_markdown(page_of(found))
    assert "not considered" not in text and "removals in order" not in text
    plot = drawn(found)
    assert {name for name in plot if name.endswith(("map", "heat"))} == {"a-map", "b-map"}
    assert "have no order" in plot["a-map"]
    assert ">calibration<" in plot["perplexity"]
    nlls = (2.5, 2.5 + 0.03 + 0.035 + 0.04, 2.5 + 0.03 + 0.035 + 0.04 + 0.05 + 0.06 + 0.07)
    assert curve(found) == [str(math.exp(nll)) for nll in nlls]
    path = tmp_path / "plans" / "swap-a" / "plan.json"
    write_json(path, _json(path) | {"order": ["mha.1"]})
    with pytest.raises(InputError, match=r"swap-a/iterations\.parquet removes .* the plan beside it removes mha\.1"):
        read_studies(["swap-a"], LABELS, tmp_path)


def test_merged_layers_have_no_tables_and_no_trials(tmp_path: Path) -> None:
    found = study(tmp_path, others("laco", "laco"))
    assert set(drawn(found)) == {"perplexity", "differences"}
    assert "| 3 layers by merging |" in to_markdown(page_of(found))
    assert facts(found)["Method"].startswith("LaCo (repo), layers merged, by cosine similarity; ")
    method = facts(found)["Method"]
    assert "laco-a: merges 9+1, 8+1, 7+1, in order" in method and "above a similarity of 0.65" in method
    assert "Search" not in facts(found)
    target = found.targets[1]
    assert target.calibration_rise == pytest.approx(sum(World().costs))
    worse = replace(target.dense, texts={"heldout": replace(target.dense.heldout, perplexity=1.0)})
    assert is_mismatch(replace(target, dense=worse)) and not is_mismatch(target)


def test_an_unknown_calibration_perplexity_is_a_dash_and_in_no_curve(tmp_path: Path) -> None:
    """Held-out perplexity is 2.5 times what the calibration would allow, were it known."""
    found = study(tmp_path, others("slicegpt", "slicegpt", heldout_factor=2.5))
    assert [option.calibration_perplexity for option in found.options] == [None] * 3
    assert found.targets[0].calibration_rise is None and warned(found) == []
    plot = drawn(found)["perplexity"]
    assert ">held-out<" in plot and ">calibration<" not in plot
    assert curve(found) == ["", "", ""]
    taken = list(rows(headline(found))["Taken out"].values())
    assert taken[2:] == ["nothing", "width 576 → 480", "width 576 → 384"]
    slow = study(tmp_path / "slow", others("slicegpt", "slicegpt", speedups=(1.0, 1.01)))
    text = finding(slow, "slow")
    assert "no whole block is gone" in text and "MLP" not in text


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


SEVERAL = (
    replace(World(), speedups=(1.05, 1.12)),
    replace(SHORTGPT, removals=(("shortgpt-a", 2), ("shortgpt-b", 5)), speedups=(1.13, 1.3), accuracy_loss=0.2),
    others("random", "random", speedups=(1.05, 1.14), costs=(0.1, 0.12, 0.14, 0.16, 0.18, 0.2)),
    others("swap", "swap", speedups=(1.05, 1.1), heldout_factor=1.0),
    others("laco", "laco", speedups=(1.1, 1.26), heldout_factor=2.2),
    others("slicegpt", "slicegpt", speedups=(0.97, 1.02), heldout_factor=1.7),
)
NAMES = [name for world in SEVERAL for name, _ in world.removals]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs of one model."""
    data = tmp_path_factory.mktemp("several")
    for world in SEVERAL:
        build(data, world)
    write_report(data / "report", "Several", NAMES, LABELS, data, False)
    return data


def test_pareto_csv_holds_every_model_and_the_fronts(several: Path) -> None:
    table = _csv(several / "report" / "pareto.csv")
    assert [row["target"] for row in table].count("dense") == 1
    assert {row["target"] for row in table} == {"dense", *NAMES} and len(table) == 13
    speeds = [float(row["speedup_generation"]) for row in table]
    assert speeds == sorted(speeds)
    points = {
        row["target"]: {
            "speed": float(row["speedup_generation"]),
            "kv_cache": -float(row["kv_cache_bytes"]),
            "parameters": float(row["ratio"]),
            "loss": float(row["perplexity_heldout"]),
        }
        for row in table
    }
    for name in NAMES:
        plan, result = (_json(several / p) for p in (f"plans/{name}/plan.json", f"results/{name}/results.json"))
        assert points[name]["speed"] == result["speed"]["speedup_generation"]
        assert points[name]["loss"] == result["perplexity"]["perplexity"]
        assert points[name]["parameters"] == plan["ratio"]
    for gain in ("speed", "kv_cache", "parameters"):
        worse = {
            name
            for name, point in points.items()
            for other in points.values()
            if other[gain] >= point[gain]
            and other["loss"] <= point["loss"]
            and (other[gain], other["loss"]) != (point[gain], point["loss"])
        }
        assert {row["target"] for row in table if row[f"front_{gain}"] == "1"} == points.keys() - worse, gain


def test_runs_of_one_model_are_compared_by_size(several: Path) -> None:
    page = page_of(*read_studies(NAMES, LABELS, several))
    assert page.sections[0].title == "Tiny"
    targets, table = page.grids[0], rows(page.grids[0])
    best = {row["target"] for row in _csv(several / "report" / "pareto.csv") if row["front_speed"] == "1"}
    assert next(iter(table)) == "tiny-a" and set(table) == set(NAMES)
    assert {name for name, row in table.items() if row["front"]} == best - {"dense"}
    assert [f"Take {list(table)[i]}" for i in targets.strong] == [page.sections[0].blocks[0].of[0].title]
    assert table["shortgpt-a"]["method"] == "one-shot, whole layers, by Block Influence"
    ratios = {name: _json(several / "plans" / name / "plan.json")["ratio"] for name in NAMES}
    reference = ""
    for name, row in table.items():
        if row["against ref"] == "ref":
            assert not reference or ratios[name] > ratios[reference]
            reference = name
            continue
        assert abs(ratios[name] - ratios[reference]) <= 0.015
        left, right = (pq.read_table(several / "results" / n / "items.parquet").to_pylist() for n in (reference, name))
        d = np.array([b["acc"] - a["acc"] for a, b in zip(left, right, strict=True)]).reshape(3, 50)
        error = math.sqrt(float((d.var(axis=1, ddof=1) / 50).sum())) / 3
        value, low, high = (f"{100 * (d.mean() + k * error):+.1f}" for k in (0, -2, 2))
        text = f"{value} [{low}, {high}]".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")
        assert row["against ref"] == text
    assert table["shortgpt-b"]["against ref"] == "ref"


def test_runs_that_cannot_be_compared_are_kept_apart(several: Path) -> None:
    names, other = NAMES[:2] + NAMES[4:6], LABELS | {"random": replace(LABEL, heldout="another text")}
    for chosen, labels, overviews in ((names, LABELS, 1), (names, other, 2), (names[:1], other, 1)):
        titles = [section.title for section in page_of(*read_studies(chosen, labels, several)).sections]
        assert titles.count("Tiny") == overviews


def test_the_page_of_several_methods_is_sound(several: Path, tmp_path: Path) -> None:
    text = (several / "report" / "index.html").read_text()
    assert not re.search(r"\b(nan|None|inf)\b", text)
    write_report(tmp_path / "two", "Two", ["swap-a", "shortgpt-a", "slicegpt-a"], LABELS, several, True)
    text = (tmp_path / "two" / "index.html").read_text()
    page = _Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg ") == len(list((tmp_path / "two" / "plots").glob("*.svg"))) == 1 + 3 * 2 + 3


@pytest.mark.parametrize(
    ("method", "changes", "unit"),
    [
        ("greedy", {"acceleration": "lazy+race"}, "blocks"),
        ("greedy", {"metric": "block_influence", "candidates": "mlp"}, "MLP blocks"),
        ("one_shot", {"metric": "kl", "unit": "layer"}, "whole layers"),
        ("random", {}, "blocks"),
        ("given", {"options": {"order": ("mha.1,mlp.1", "mha.2,mlp.2", "mha.0,mlp.0")}}, "whole layers"),
        ("beam", {"candidates": "mha"}, "MHA blocks"),
        ("contiguous", {"unit": "layer", "metric": "angular_distance"}, "whole layers"),
        ("evopress", {"options": {"generations": 3, "offspring": 4, "tokens": (3, 5)}}, "blocks"),
        ("swap", {"options": {"tries": 4}}, "blocks"),
    ],
)
def test_the_tables_of_every_search_are_read(tmp_path: Path, method: str, changes: dict[str, Any], unit: str) -> None:
    """From the search itself, by way of the files that score and commit write."""
    config = small_config(5)
    scorer = FakeScorer(lambda *asked: by_text(*asked) + by_text(*asked) * asked[-1] % 0.37)  # rows differ
    run = scored(tmp_path, scorer, config, ["4blocks"], short_rows(4), method=method, **changes)
    plan, tables = commit_run(tmp_path / "scores", config, "4blocks", "t", "r")
    assert plan.nested == SEARCHES[method].nested
    trace = read_trace(trace_directory(tmp_path / "scores", run.current, "4blocks"), run.current.search)
    order, perplexities = iteration.removals(trace, plan.nested)
    path = tmp_path / "iterations.parquet"
    save_iterations(tables, path)
    table = read_iterations(path)
    found = considered(table)
    assert found.unit == unit
    asked = [score for step in trace[: len(tables)] for score in step.scores if score.mask and score.row_loss]
    complete = {score.mask for score in asked if score.is_complete}
    assert (found.complete, found.partial) == (len(complete), len({score.mask for score in asked} - complete))
    if plan.nested:
        steps = removals(table, plan, path)
        assert [removal.added for removal in steps] == order[: len(plan.order)]
        assert [steps[0].before, *(removal.perplexity for removal in steps)] == pytest.approx(
            perplexities[: len(plan.order) + 1]
        )
        assert not any(math.isnan(cost) for removal in steps for cost in removal.costs.values())
        assert steps[0].candidates == (len(trace[0].scores) - 1 if asked else 0)
        assert tuple(step.stability for step in steps) == iteration.stabilities(trace)[: len(steps)]
        assert all(step.stability for step in steps) == bool(asked)
    else:
        assert sum(row["chosen"] for row in table) == len(trace)
