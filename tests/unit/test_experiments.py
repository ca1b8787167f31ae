"""Experiments: every point against full forward passes, what a kill costs, and comparisons at one size."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

import stages
from blockpruner import experiments
from blockpruner.core.blocks import parse_mask
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import Runtime
from blockpruner.evaluation.suite import Checkpoint
from blockpruner.evaluation.tasks import fetch_tasks
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.inputs.texts import MixedText, TextKind, write_texts
from blockpruner.model.models import load_model, prune_
from blockpruner.params import load_run
from blockpruner.reporting import answers
from blockpruner.reporting import points as points_module
from blockpruner.reporting.points import Points
from blockpruner.store.files import write_table
from blockpruner.studies import Experiment, Heal, load_study
from flows.selection import choose_study
from stages import experiment, settings
from tests.errors import refused
from tests.integration.project import ROOT, run_of, sentence, write_inputs
from tests.tiny import full_nll, save_tiny

WANTED = Experiment(
    run="tiny",
    methods={"blockpruner": {}, "few": {"method": "given", "options": {"order": ["mha.1", "mlp.2", "mha.3"]}}},
    budgets=("1blocks", "3blocks"),
    seeds=(42, 43),
    calibrations={"": {}, "short": {"num_samples": 5, "kind": "odd"}},
    heal={"plain": Heal(), "refit": Heal(compensate="refit"), "both": Heal(compensate="refit", train={"epochs": 1})},
    tasks=True,
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run's file, model and sources, as `fetch` leaves them; the texts are of two kinds."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    run = run_of(tmp_path)
    run["evaluate"]["perplexity"] |= {"seq_len": 32, "packing": "documents", "max_rows": 3}
    Path("runs").mkdir()
    Path("runs/tiny.yaml").write_text(yaml.safe_dump(run))
    save_tiny(tmp_path / "model", tie_word_embeddings=True)
    texts = [MixedText(sentence(i) * 3, TextKind(("even", "odd")[i % 2], 1.0 + i % 2)) for i in range(90)]
    Path("sources").mkdir()
    for role, own in {"calibration": texts[:60], "train": texts[:60], "perplexity": texts[60:]}.items():
        write_texts(Path("sources", f"{role}.parquet"), own)
    found = load_run("tiny")
    fetch_tasks(found.evaluate.zero_shot, *[Path("sources/tasks")] * 2, Path("cache"), Path("pins"), print)
    fetch_checkpoint(found.model, tmp_path / "dense", Path("cache"), Path("pins"), print)
    dense = Checkpoint(tmp_path / "dense", "float32", "cpu", False)

    def measure(wanted: Experiment) -> Points:
        runtime = Runtime(device="cpu", threads=1)
        given = found, dense, Path("sources"), tmp_path / "data", runtime, SilentObserver()
        write_table(tmp_path / "out" / points_module.FILE, *experiments.measured(wanted, *given))
        return Points.read(tmp_path / "out")

    Path("data").mkdir()
    return SimpleNamespace(measure=measure, run=found, dense=dense, folder=tmp_path)


def test_points_are_what_full_forward_passes_say(place):
    found = place.measure(WANTED)
    bench = experiments.Bench(place.run, place.dense, Path("sources"), place.folder / "data", SilentObserver())
    rows = bench.heldout.rows
    assert list(found.kinds) == ["even"] * 2 + ["odd"] * 3, "rows by the kinds' shares"
    assert len(found.frame) == 2 * 2 * 2 * 2 * 3
    np.testing.assert_allclose(found.dense["nll"], [full_nll(place.dense.model, row) for row in rows], rtol=1e-5)
    plain = found.frame[found.frame["heal"] == "plain"]
    for _, point in plain.iterrows():
        mask = parse_mask(point["plan"].replace(" ", ","))
        pruned = prune_(load_model(place.folder / "model", "float32", "cpu"), mask)
        np.testing.assert_allclose(point["nll"], [full_nll(pruned, row) for row in rows], rtol=1e-5)
        assert (point["mha"], point["mlp"]) == tuple(point["plan"].count(kind) for kind in ("mha", "mlp"))
        items = json.loads(point["items"])["piqa"]
        assert set(items["score"]) <= {0, 1} and all(0 < p < 1 for p in items["p_gold"]) and len(items["p_gold"]) == 6
    given = plain[(plain["method"] == "few") & (plain["budget"] == "3blocks")]
    assert set(given["plan"]) == {"mha.1 mha.3 mlp.2"} and given["nll"].map(tuple).nunique() == 1
    own = ["calibration", "seed", "method", "budget"]
    wide = found.frame.assign(mean=found.frame["nll"].map(np.mean)).pivot(index=own, columns="heal", values="mean")
    assert (wide["refit"] != wide["plain"]).any() and (wide["both"] != wide["refit"]).any()
    searched = found.frame[found.frame["method"] == "blockpruner"]
    assert (searched.groupby("budget")["trials_asked"].min() == pd.Series({"1blocks": 9, "3blocks": 22})).all()
    assert not list((place.folder / "data").glob("tmp*")), "no weights stay"


def test_a_kill_costs_one_point_and_no_loss(place, monkeypatch):
    plain = WANTED.model_copy(update={"heal": {"plain": Heal()}, "tasks": False, "calibrations": {"": {}}})
    measure, done = experiments.measure_perplexity, []

    def counted(*given):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(given)
        return measure(*given)

    monkeypatch.setattr(experiments, "measure_perplexity", counted)
    with pytest.raises(KeyboardInterrupt):
        place.measure(plain)
    done[:] = [None] * 4
    first = place.measure(plain)
    calls = len(done) - 4
    masks = first.frame["plan"].nunique()
    assert calls == 1 + masks - 3, "the dense model and each mask are measured once"
    assert place.measure(plain).frame["seconds"].equals(first.frame["seconds"]) and len(done) == calls + 4
    more = place.measure(plain.model_copy(update={"budgets": ("1blocks", "2blocks", "3blocks")}))
    assert len(done) - calls - 4 == more.frame["plan"].nunique() - masks


def test_a_search_sees_one_kind_alone_and_what_changes_weights_is_not_refitted(place):
    bench = experiments.Bench(place.run, place.dense, Path("sources"), place.folder / "data", SilentObserver())
    own = [text for text in bench.texts["calibration"] if text.kind.name == "odd"]
    drawn = place.run.calibration.model_copy(update={"packing": "per_sample", "num_samples": 20, "seq_len": 200})
    rows = bench.rows(drawn, "odd", None, False)
    decode = bench.dense.tokenizer.decode
    assert len(rows.search.rows) == 20 and {decode(row) for row in rows.search.rows} <= set(own)
    assert rows.fit.digest == bench.rows(drawn, None, None, False).fit.digest, "a fit sees all kinds"
    changes = {"methods": {"slicegpt": {}, "narrow": {}}, "budgets": ("0.22",), "seeds": (42,), "tasks": False}
    heal = {"plain": Heal(), "refit": Heal(compensate="refit")}
    found = place.measure(WANTED.model_copy(update={**changes, "heal": heal, "calibrations": {"": {}}})).frame
    assert list(zip(found["method"], found["heal"], strict=True)) == [
        ("slicegpt", "plain"), ("narrow", "plain"), ("narrow", "refit"),
    ]  # fmt: skip


def test_settings_are_refused_before_anything_is_computed(place, monkeypatch):
    monkeypatch.setattr(experiments, "measure_perplexity", None)
    with refused("settings"):
        place.measure(WANTED.model_copy(update={"methods": {"blockpruner": {"options": {"width": 3}}}}))
    with refused("unknown-method"):
        place.measure(WANTED.model_copy(update={"methods": {"blokpruner": {}}}))


def curve(method, sizes, seeds=(42, 43, 44), rows=24, rise=lambda size, row, draw: 0.0, kinds=("a", "b")):
    """Points of a made-up method; `rise` gives the NLL over dense."""
    found = [
        {"calibration": "", "method": method, "budget": str(size), "heal": "plain", "plan": "", "seed": seed,
         "ratio": size, "mha": 0, "mlp": 0,
         "nll": np.array([2.0 + rise(size, row, seed) for row in range(rows)])}
        for seed in seeds for size in sizes
    ]  # fmt: skip
    dense = pd.Series({"nll": np.full(rows, 2.0)})
    return found, dense, np.repeat(kinds, rows // len(kinds))


def points_of(*methods):
    frames, dense, kinds = zip(*methods, strict=True)
    return Points(pd.DataFrame([row for frame in frames for row in frame]), dense[0], kinds[0], "")


def bent(size, row, draw):
    return (1 + 0.3 * math.sin(row)) * (3 * size**1.5 + size) * (1 + (draw - 43) / 20)


def test_a_method_is_level_with_itself_at_other_sizes():
    sizes, others = (0.05, 0.09, 0.12, 0.19, 0.22, 0.29, 0.32), (0.06, 0.1, 0.135, 0.18, 0.21, 0.27, 0.33)
    found = points_of(curve("one", sizes, rise=bent), curve("other", others, rise=bent))
    for size in (0.1, 0.2, 0.3):
        effect = found.against(found.curve(size, method="one"), found.curve(size, method="other"))
        assert effect.value == pytest.approx(1.0, abs=0.003) and effect.interval.low == pytest.approx(1, abs=0.005)
        rises = [bent(size, row, draw) for row in range(24) for draw in (42, 43, 44)]
        over = found.against(found.curve(size, method="one"))
        assert over.value == pytest.approx(math.exp(np.mean(rises)), rel=0.004)
    assert np.isnan(found.curve(0.4, method="one")).all(), "nothing is said of sizes that were not measured"


def test_intervals_hold_draws_and_documents():
    """Against a plain loop over resampled draws and rows."""
    chance = np.random.default_rng(1)
    noise = {(row, draw): chance.normal(0, 0.1) for row in range(24) for draw in (42, 43, 44)}
    shift = {42: 0.0, 43: 0.1, 44: -0.06}
    found = points_of(
        curve("one", (0.1, 0.2)),
        curve("other", (0.1, 0.2), rise=lambda size, row, draw: 0.05 + shift[draw] + noise[row, draw]),
    )
    a, b = found.curve(0.1, method="one"), found.curve(0.1, method="other")
    effect, means = found.against(a, b), []
    for _ in range(4000):
        draws = chance.integers(3, size=3)
        halves = [chance.integers(12, size=12) + start for start in (0, 12)]
        means.append(np.mean([(b - a)[draws][:, rows].mean() for rows in halves]))
    expected = np.exp(np.quantile(means, [0.025, 0.975]))
    assert effect.value == pytest.approx(math.exp((b - a).mean()))
    np.testing.assert_allclose([effect.interval.low, effect.interval.high], expected, atol=0.01)
    rows_alone = found.against(a[:1], b[:1])
    assert rows_alone.interval.high - rows_alone.interval.low < effect.interval.high - effect.interval.low
    kind = found.against(a, b, "b")
    assert kind.value == pytest.approx(math.exp((b - a)[:, 12:].mean())) != effect.value
    assert 0 < effect.p <= 1 and found.against(a, a).p == 1


def test_other_rows_are_not_compared(tmp_path):
    found, dense, kinds = curve("one", (0.1,))
    with refused("other-rows"):
        Points.joined([Points(pd.DataFrame(found), dense, kinds, digest) for digest in "ab"])


def test_a_study_of_experiments_asks_for_them_alone(place):
    Path("studies").mkdir()
    study = {"title": "T", "runs": ["tiny"], "experiments": {"one": {"run": "tiny", "methods": {"blockpruner": {}},
             "budgets": ["0.1"]}, "two": {"run": "tiny", "methods": {"shortgpt": {}}, "budgets": ["0.1"]}}}  # fmt: skip
    Path("studies/seed.yaml").write_text(yaml.safe_dump(study))
    Path("params.yaml").write_text("runs: [tiny]\ntargets: {}\nstudies: []\nexperiments: {}\n")
    assert set(load_study("seed").experiments) == {"one", "two"}
    chosen = choose_study("seed", ["two"])
    names = [f"{stage}@tiny" for stage in ("settings", "fetch", "score")] + [
        "experiment@seed-two",
        "experiment@seed-one",
    ]
    assert chosen.stages(names) == ["settings@tiny", "fetch@tiny", "experiment@seed-two"]
    assert yaml.safe_load(chosen.text)["experiments"] == {"seed-two": {"study": "seed", "name": "two", "run": "tiny"}}
    both = choose_study("seed")
    assert list(both.experiments) == ["seed-one", "seed-two"] and yaml.safe_load(both.text)["studies"] == ["seed"]
    with refused("unknown-item"):
        choose_study("seed", ["three"])


def test_the_stage_depends_on_what_it_reads(place):
    """Its settings, its study, and nothing else; what changed while it ran is refused."""
    Path("studies").mkdir()
    own = {"run": "tiny", "methods": {"shortgpt": {}}, "budgets": ["2blocks"]}
    Path("studies/mine.yaml").write_text(yaml.safe_dump({"title": "T", "runs": ["tiny"], "experiments": {"one": own}}))
    named = {"mine-one": {"study": "mine", "name": "one", "run": "tiny"}}
    params = {"runs": ["tiny"], "targets": {}, "experiments": named, "runtime": {"device": "cpu", "threads": 1}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for source, role in ((Path("dense"), "models"), (Path("sources"), "sources")):
        Path("data", role).mkdir(parents=True)
        source.rename(Path("data", role, "tiny"))
    tasks = Path("data/sources/tiny/tasks")
    shutil.rmtree(tasks)
    fetch_tasks(place.run.evaluate.zero_shot, *[tasks] * 2, Path("cache"), Path("pins"), print)
    settings.main("tiny")
    stages._GIVEN.clear()
    experiment.main("mine-one")
    read = {where for where, _, _ in stages._GIVEN}
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["experiment"]["do"]["deps"]
    wanted = {dep.replace("${item.run}", "tiny") for dep in deps if dep.startswith("data/settings")}
    assert read == wanted | {"studies/mine.yaml"}
    assert Points.read(Path("data/evidence/mine-one")).frame["method"].tolist() == ["shortgpt"]


def test_a_claim_holds_where_it_holds(tmp_path):
    """Blocks lose less on one kind of text and more on the other; what is level stays open."""
    sizes = (0.05, 0.09, 0.12, 0.19, 0.22)
    noise = np.random.default_rng(0).normal(0, 0.01, (24, 60))

    def rise(kind_a, kind_b):
        return lambda size, row, draw: size * (kind_a if row < 12 else kind_b) + noise[row, draw]

    found = points_of(
        curve("blockpruner", sizes, rise=rise(1.0, 2.0)), curve("greedy-layers", sizes, rise=rise(2.0, 1.0)),
        curve("greedy-shifted", sizes, rise=rise(1.0, 2.0)),
        curve("one-shot-perplexity", sizes, rise=rise(3.0, 3.0)),
    )  # fmt: skip
    made = answers.claims(found).frame.set_index("claim")["verdict"]
    assert made["Blocks lose less than layers"] == "holds at 10% on a; 20% on a. the opposite at 10% on b; 20% on b"
    assert made["Blocks lose less than shifted layers"] == "no difference is seen"
    assert made["Step by step loses less than one shot"] == "holds"
    assert "MHA alone loses less than MLP alone" not in made, "nothing was measured of it"
    line = answers.sizes(found).frame.set_index("method").loc["BlockPruner"]
    assert line["at_20_x"] == pytest.approx(math.exp(0.2 * 1.5), rel=0.01) and "at_30_x" not in line
    answers.write_answers(tmp_path / "out", "T", {"tiny": ("Tiny", ["a machine"], found)})
    page = (tmp_path / "out/results.md").read_text()
    assert "| BlockPruner |" in page and "a machine" in page and (tmp_path / "out/plots/tiny-quality.png").exists()
    for path in re.findall(r"results/(.*?)\)", page):
        assert (tmp_path / "out/plots" / path).exists()
