"""What is made of points: comparisons at one size, and every table of answers, against made-up
points."""

import json
import math
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from blockpruner.reporting import plots
from blockpruner.reporting.plots import Plot
from study import publish
from study.answers import calibration, claims, curves, masks, page, searches, tasks
from study.points import Points
from study.studies import write_tables
from tests.errors import refused

ROOT = Path(__file__).parents[2]


def point(**own):
    """A point of the plain model without tasks, at 10 %."""
    base = {
        "calibration": "",
        "method": "m",
        "budget": "0.1",
        "heal": "plain",
        "plan": "",
        "seed": 42,
        "ratio": 0.1,
        "mha": 0,
        "mlp": 0,
        "items": "{}",
        "trials_asked": 10.0,
        "search_ppl": 20.0,
    }
    return base | own


def curve(
    method, sizes, seeds=(42, 43, 44), rows=24, rise=lambda size, row, draw: 0.0, kinds=("a", "b")
):
    """Points of a made-up method; `rise` gives the NLL over dense."""
    result = [
        point(
            method=method,
            budget=str(size),
            seed=seed,
            ratio=size,
            nll=np.array([2.0 + rise(size, row, seed) for row in range(rows)]),
        )
        for seed in seeds
        for size in sizes
    ]
    dense = pd.Series({"nll": np.full(rows, 2.0)})
    return result, dense, np.repeat(kinds, rows // len(kinds))


def points_of(*methods):
    frames, dense, kinds = zip(*methods, strict=True)
    return Points(pd.DataFrame([row for frame in frames for row in frame]), dense[0], kinds[0], "")


def bent(size, row, draw):
    return (1 + 0.3 * math.sin(row)) * (3 * size**1.5 + size) * (1 + (draw - 43) / 20)


def test_a_method_is_level_with_itself_at_other_sizes():
    sizes, others = (
        (0.05, 0.09, 0.12, 0.19, 0.22, 0.29, 0.32),
        (0.06, 0.1, 0.135, 0.18, 0.21, 0.27, 0.33),
    )
    result = points_of(curve("one", sizes, rise=bent), curve("other", others, rise=bent))
    for size in (0.1, 0.2, 0.3):
        effect = result.against(
            result.curve(size, method="one"), result.curve(size, method="other")
        )
        assert effect.value == pytest.approx(1.0, abs=0.003)
        assert effect.interval.low == pytest.approx(1, abs=0.005)
        rises = [bent(size, row, draw) for row in range(24) for draw in (42, 43, 44)]
        over = result.against(result.curve(size, method="one"))
        assert over.value == pytest.approx(math.exp(np.mean(rises)), rel=0.004)
    assert np.isnan(result.curve(0.4, method="one")).all(), (
        "nothing is said of sizes that were not measured"
    )


@pytest.mark.parametrize(("draws", "document_sd"), [(3, 0.05), (3, 0.5), (5, 0.15)])
def test_intervals_hold_the_truth_in_93_of_100_studies(draws, document_sd):
    """Made-up studies of normal draws and documents, where the truth is no difference."""
    studies, kinds, rows = 2000, 4, 20
    chance = np.random.default_rng(draws)
    points = Points(pd.DataFrame(), pd.Series(dtype=float), np.repeat(np.arange(kinds), rows), "")
    of_draws = chance.normal(0, 0.05, (studies, draws, 1))
    of_documents = chance.normal(0, document_sd, (studies, 1, kinds * rows))
    noise = chance.normal(0, 0.05, (studies, draws, kinds * rows))
    effects = [points.against(rises) for rises in of_draws + of_documents + noise]
    covered = [effect.interval.low <= 1 <= effect.interval.high for effect in effects]
    assert np.mean(covered) >= 0.93
    assert covered == [effect.p >= 0.05 for effect in effects], "p and interval decide alike"


def test_an_interval_over_draws_is_that_of_their_means_where_documents_do_not_vary():
    """scipy's t interval of the draws; of one draw, that of the documents."""
    shift = {42: 0.05, 43: 0.15, 44: -0.01}
    result = points_of(
        curve("one", (0.1,)),
        curve("other", (0.1,), rise=lambda size, row, draw: shift[draw] + 1e-9 * row),
    )
    a, b = result.curve(0.1, method="one"), result.curve(0.1, method="other")
    expected = stats.ttest_1samp([*shift.values()], 0)
    effect = result.against(a, b)
    assert effect.value == pytest.approx(math.exp(np.mean([*shift.values()])))
    assert effect.p == pytest.approx(expected.pvalue, rel=1e-4)
    low, high = np.exp(expected.confidence_interval())
    assert (effect.interval.low, effect.interval.high) == pytest.approx((low, high), rel=1e-4)
    one_kind = np.random.default_rng(0).normal(0.1, 0.1, (1, 24))
    expected = stats.ttest_1samp(one_kind[0, 12:], 0)
    assert result.against(one_kind, kind="b").p == pytest.approx(expected.pvalue)
    assert result.against(a, a).p == 1


def test_other_rows_are_not_compared(tmp_path):
    result, dense, kinds = curve("one", (0.1,))
    with refused("other-rows"):
        Points.joined([Points(pd.DataFrame(result), dense, kinds, digest) for digest in "ab"])


def test_a_claim_holds_where_it_holds(tmp_path):
    """Blocks lose less on one kind of text and more on the other; what is level stays open."""
    sizes = (0.05, 0.09, 0.12, 0.19, 0.22)
    noise = np.random.default_rng(0).normal(0, 0.01, (24, 60))

    def rise(kind_a, kind_b):
        return lambda size, row, draw: size * (kind_a if row < 12 else kind_b) + noise[row, draw]

    result = points_of(
        curve("blockpruner", sizes, rise=rise(1.0, 2.0)),
        curve("greedy-layers", sizes, rise=rise(2.0, 1.0)),
        curve("greedy-shifted", sizes, rise=rise(1.0, 2.0)),
        curve("one-shot-perplexity", sizes, seeds=(43, 44, 45), rise=rise(3.0, 3.0)),
    )
    made = claims.claims(result).frame.set_index("claim")
    assert made["draws"].to_dict() == {
        **dict.fromkeys(made.index, 3),
        "Step by step loses less than one shot": 2,
    }
    made = made["verdict"]
    assert (
        made["Blocks lose less than layers"]
        == "Holds at 10% on a; 20% on a. The opposite at 10% on b; 20% on b"
    )
    assert made["Blocks lose less than shifted layers"] == "Undecided"
    assert made["Step by step loses less than one shot"] == "Holds"
    assert "MHA alone loses less than MLP alone" not in made, "nothing was measured of it"
    result = replace(result, compared=("blockpruner", "greedy-layers", "greedy-shifted"))
    compared, variants = (table.frame.set_index("method") for table in curves.sizes(result))
    line = compared.loc["BlockPruner"]
    assert line["plain_20_pct_x"] == pytest.approx(math.exp(0.2 * 1.5), rel=0.01)
    assert "plain_30_pct_x" not in line
    assert list(compared.index) == ["BlockPruner", "greedy layers", "greedy shifted layers"]
    assert list(variants.index) == ["one-shot perplexity"]
    page.write_answers(tmp_path / "out", "T", {"tiny-seed": ("Tiny", ["a machine"], result)})
    names = {path.stem for path in (tmp_path / "out/tables").glob("*.csv")}
    assert names == {
        f"tiny-{name}" for name in ("claims", "sizes", "variants", "texts-10", "texts-20")
    }
    assert (tmp_path / "out/plots/tiny-quality.png").exists()
    complete = (tmp_path / "out/index.html").read_text()
    assert "BlockPruner" in complete
    assert "a machine" in complete
    (tmp_path / "data/tables").mkdir(parents=True)
    (tmp_path / "out").rename(tmp_path / "data/tables/mine")
    kept = tmp_path / "docs/results/published.json"
    for change, count in (("", 1), ("", 1), ("# other\n", 2)):
        with (tmp_path / "data/tables/mine/tables/tiny-sizes.csv").open("a") as file:
            file.write(change)
        publish.publish("mine", tmp_path)
        assert json.loads(kept.read_text()) == {
            "mine": {"count": count, "rows": {"tiny-seed": result.digest}}
        }


def test_of_one_draw_a_small_difference_decides_nothing():
    """It is judged on all kinds of text together, and undecided is the word even where the
    documents alone are sure."""
    none, parts = "Undecided", "Holds at 10% on b"
    cases = (
        (1, 1.15, none),
        (1, 1 / 1.15, none),
        (1, 1.25, "Holds"),
        (1, 1 / 1.25, "The opposite holds"),
        (2, 1.15, parts),
    )
    for draws, factor, said in cases:
        far = 2 * math.log(factor)
        blocks = curve("blockpruner", (0.09, 0.12), seeds=range(draws))
        layers = curve(
            "greedy-layers",
            (0.09, 0.12),
            seeds=range(draws),
            rise=lambda size, row, draw, far=far: far * (row >= 12),
        )
        assert claims.claims(points_of(blocks, layers)).frame["verdict"].tolist() == [said]


def test_what_training_adds_is_told_over_the_draws_that_have_both():
    """Refitted models of more sizes and draws change nothing."""
    noise = np.random.default_rng(0).normal(0, 0.1, (24, 60))
    result = points_of(
        curve("narrow", (0.09, 0.12, 0.2), rise=lambda size, row, draw: 5 * size + noise[row, draw])
    )
    refit = result.frame.assign(heal="refit")
    same = refit[(refit["ratio"] < 0.2) & (refit["seed"] < 44)].assign(heal="trained")
    better = [
        nll - 0.1 * (size > 0.1) for nll, size in zip(same["nll"], same["ratio"], strict=True)
    ]

    def of(*frames):
        return curves.trained(replace(result, frame=pd.concat(frames)))

    (line,) = of(refit, same.assign(nll=better)).frame.to_dict("records")
    assert line["draws"] == 2
    assert math.exp(-0.1) < line["at_10"] < 1
    assert "at_20" not in line
    assert of(refit, same).frame["at_10"].tolist() == [1]
    assert of(refit) is None
    assert of(same) is None


def test_the_results_in_docs_are_made_of_the_evidence(tmp_path, monkeypatch):
    """`python -m flows.paper --study seed --tables` changes nothing; plots are not drawn here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        plots, "render", lambda name, text, size, fill: Plot(name, text, "", b"", 0)
    )
    for folder in Path("data/evidence").glob("seed-*"):
        shutil.copytree(folder, tmp_path / "data/evidence" / folder.name)
    write_tables("seed", tmp_path / "data")
    made = {
        path.name: path.read_text() for path in (tmp_path / "data/tables/seed/tables").glob("*.csv")
    }
    assert {*made} == {path.name for path in Path("docs/results").glob("*-*.csv")}
    for name, text in made.items():
        own, published = (
            pd.read_csv(StringIO(item)) for item in (text, Path("docs/results", name).read_text())
        )
        pd.testing.assert_frame_equal(own, published, rtol=1e-4, obj=name)
    digests = json.loads(Path("docs/results/published.json").read_text())["seed"]["rows"]
    assert digests == json.loads((tmp_path / "data/tables/seed/rows.json").read_text())


def of(*found):
    """Points of 8 rows of two kinds; `rise` is over dense, on every row."""
    frame = pd.DataFrame(
        [{**item, "nll": np.full(8, 2.0 + item.get("rise", 0.0))} for item in found]
    )
    return Points(frame, pd.Series({"nll": np.full(8, 2.0)}), np.repeat(("a", "b"), 4), "")


def test_searches_are_told_by_the_best_mask_of_their_rows():
    ppl = {("greedy", 42): 22.0, ("beam", 42): 20.0, ("greedy", 43): 30.0, ("beam", 43): 33.0}
    result = of(
        *(
            point(
                calibration="12 samples",
                method=name,
                seed=seed,
                search_ppl=value,
                trials_asked=5.0 + seed,
                rise=0.5 if name == "beam" else 0.7,
            )
            for (name, seed), value in ppl.items()
        )
    )
    made = searches.searched(result).frame.set_index("search")
    assert made["over_best_10"].to_dict() == pytest.approx(
        {"greedy": math.sqrt(1.1), "beam": math.sqrt(1.1)}
    )
    assert made["at_10_x"].to_dict() == pytest.approx(
        {"greedy": math.exp(0.7), "beam": math.exp(0.5)}
    )
    assert made.loc["greedy", "trials_10"] == 47.5


def test_the_signal_of_masks_is_a_line_of_logs():
    before = np.linspace(1, 4, 20)
    result = [
        point(calibration="masks", method=f"m{n}", heal=heal, rise=rise)
        for n, x in enumerate(before)
        for heal, rise in (("plain", x), ("refit", 0.5 + 0.25 * x), ("25k", n % 2 / 50))
    ]
    made = masks.masks(of(*result)).frame.set_index("healing")
    trained = "refit, then 25 thousand tokens"
    assert list(made.index) == ["refit", trained]
    assert made.loc["refit", "masks"] == 20
    assert made.loc["refit", ["slope", "slope_low", "rank_correlation"]].tolist() == pytest.approx(
        [0.25, 0.25, 1.0]
    )
    assert made.loc[trained, "slope_low"] < 0 < made.loc[trained, "slope_high"]
    assert made.loc["refit", "highest_x"] == pytest.approx(math.exp(1.5))
    refitted, trained_rises = [0.5 + 0.25 * x for x in before], [n % 2 / 50 for n in range(20)]
    assert made.loc[trained, "rank_with_refit"] == pytest.approx(
        stats.spearmanr(refitted, trained_rises).statistic
    )
    assert made.loc["refit", "rank_with_refit"] is None
    assert masks.healed_masks(of(*result)).png
    assert masks.masks(of(point())) is None


def test_what_calibration_decides_is_told_apart_from_chance():
    """Values of the number of samples differ by 0.2 in log perplexity, draws by 0.01."""
    shift = {"16 samples": 0.4, "64 samples": 0.2, "256 samples": 0.0}
    result = [
        point(calibration=name, method="blockpruner", seed=42 + draw, rise=1 + level + 0.01 * draw)
        for name, level in shift.items()
        for draw in range(3)
    ]
    (line,) = calibration.variation(of(*result)).frame.to_dict("records")
    assert line["what varies"] == "number of samples"
    assert line["draws_pct"] == pytest.approx(1.0)
    assert line["between_pct"] == pytest.approx(20.0, rel=0.01)
    assert line["share_pct"] == pytest.approx(100 * 0.04 / 0.0401, rel=0.01)
    lines = calibration.calibrations(of(*result)).frame.set_index("calibration")
    assert lines.loc["16 samples", ["highest_x", "a_x"]].tolist() == pytest.approx(
        [math.exp(1.42), math.exp(1.41)]
    )


def test_tasks_are_compared_item_by_item():
    chance = np.random.default_rng(0)
    right = {task: chance.random(200) < 0.5 for task in ("piqa", "arc_easy")}
    worse = {"piqa": right["piqa"] & (np.arange(200) % 2 == 0), "arc_easy": right["arc_easy"]}

    def items(scores):
        own = {
            t: {"score": [float(v) for v in item], "p_gold": [0.5 + 0.1 * float(v) for v in item]}
            for t, item in scores.items()
        }
        return json.dumps(own)

    result = of(
        point(method="blockpruner", items=items(right)),
        point(method="laco", items=items(worse)),
        point(),
    )
    result.dense["items"] = items({task: np.ones(200) for task in right})
    result.dense["method"], result.dense["ratio"] = "dense", 0.0
    dense, base, line = tasks.tasks(result).frame.to_dict("records")
    assert (dense["method"], dense["avg_pct"]) == ("dense", 100)
    assert tasks.tasks(of(point())) is None
    lost = np.mean([right[t].mean() - worse[t].mean() for t in right])
    assert line["avg_pct"] == pytest.approx(base["avg_pct"] - 100 * lost)
    assert line["avg_vs_blockpruner"] == pytest.approx(-100 * lost)
    assert line["avg_vs_blockpruner_high"] < 0
    assert line["avg_vs_dense"] == pytest.approx(line["avg_pct"] - 100)
    assert line["avg_vs_dense_high"] < 0
    assert line["tasks"] == "piqa -", "the task that differs, and only that"
    d = worse["piqa"].astype(float) - right["piqa"]
    assert line["detectable"] == pytest.approx(100 * 2.8 * d.std(ddof=1) / math.sqrt(200) / 2)
