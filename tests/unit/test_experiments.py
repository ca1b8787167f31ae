"""Experiments: every point against full forward passes, what a kill costs, and comparisons at one
size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

import stages
from blockpruner.config import dag
from blockpruner.config.params import load_run
from blockpruner.core.blocks import parse_mask
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import Runtime
from blockpruner.evaluation.suite import Checkpoint
from blockpruner.evaluation.tasks import fetch_tasks
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.inputs.texts import MixedText, TextKind, write_texts
from blockpruner.model.models import load_model, prune_
from blockpruner.store.files import write_table
from flows import paper
from flows.selection import choose_study
from stages import experiment, settings
from study import experiments
from study import points as points_module
from study.points import Points
from study.studies import Experiment, Heal, load_study
from tests.errors import refused
from tests.integration.project import ROOT, run_of, sentence, write_inputs
from tests.tiny import full_nll, save_tiny

WANTED = Experiment(
    run="tiny",
    methods={
        "blockpruner": {},
        "few": {"method": "given", "options": {"order": ["mha.1", "mlp.2", "mha.3"]}},
    },
    budgets=("1blocks", "3blocks"),
    seeds=(42, 43),
    calibrations={"": {}, "short": {"num_samples": 5, "kind": "odd"}},
    heal={
        "plain": Heal(),
        "refit": Heal(compensate="refit"),
        "both": Heal(compensate="refit", train={"epochs": 1}),
    },
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
    texts = [
        MixedText(sentence(i) * 3, TextKind(("even", "odd")[i % 2], 1.0 + i % 2)) for i in range(90)
    ]
    Path("sources").mkdir()
    for role, own in {
        "calibration": texts[:60],
        "train": texts[:60],
        "perplexity": texts[60:],
    }.items():
        write_texts(Path("sources", f"{role}.parquet"), own)
    result = load_run("tiny")
    fetch_tasks(
        result.evaluate.zero_shot, *[Path("sources/tasks")] * 2, Path("cache"), Path("pins"), print
    )
    fetch_checkpoint(result.model, tmp_path / "dense", Path("cache"), Path("pins"), print)
    dense = Checkpoint(tmp_path / "dense", "float32", "cpu", False)

    def measure(expected: Experiment) -> Points:
        runtime = Runtime(device="cpu", threads=1)
        given = result, dense, Path("sources"), tmp_path / "data", runtime, SilentObserver()
        write_table(tmp_path / "out" / points_module.FILE, *experiments.measured(expected, *given))
        return Points.read(tmp_path / "out")

    Path("data").mkdir()
    return SimpleNamespace(measure=measure, run=result, dense=dense, folder=tmp_path)


def test_points_are_what_full_forward_passes_say(place):
    result = place.measure(WANTED)
    bench = experiments.Bench(
        place.run, place.dense, Path("sources"), place.folder / "data", SilentObserver()
    )
    rows = bench.heldout.rows
    assert list(result.kinds) == ["even"] * 2 + ["odd"] * 3, "rows by the kinds' shares"
    assert len(result.frame) == 2 * 2 * 2 * 2 * 3
    np.testing.assert_allclose(
        result.dense["nll"], [full_nll(place.dense.model, row) for row in rows], rtol=1e-5
    )
    plain = result.frame[result.frame["heal"] == "plain"]
    for _, point in plain.iterrows():
        mask = parse_mask(point["plan"].replace(" ", ","))
        pruned = prune_(load_model(place.folder / "model", "float32", "cpu"), mask)
        np.testing.assert_allclose(point["nll"], [full_nll(pruned, row) for row in rows], rtol=1e-5)
        assert (point["mha"], point["mlp"]) == tuple(
            point["plan"].count(kind) for kind in ("mha", "mlp")
        )
        items = json.loads(point["items"])["piqa"]
        assert set(items["score"]) <= {0, 1}
        assert all(0 < p < 1 for p in items["p_gold"])
        assert len(items["p_gold"]) == 6
    given = plain[(plain["method"] == "few") & (plain["budget"] == "3blocks")]
    assert set(given["plan"]) == {"mha.1 mha.3 mlp.2"}
    assert given["nll"].map(tuple).nunique() == 1
    own = ["calibration", "seed", "method", "budget"]
    wide = result.frame.assign(mean=result.frame["nll"].map(np.mean)).pivot(
        index=own, columns="heal", values="mean"
    )
    assert (wide["refit"] != wide["plain"]).any()
    assert (wide["both"] != wide["refit"]).any()
    searched = result.frame[result.frame["method"] == "blockpruner"]
    assert (
        searched.groupby("budget")["trials_asked"].min() == pd.Series({"1blocks": 9, "3blocks": 22})
    ).all()
    assert not list((place.folder / "data").glob("tmp*")), "no weights stay"


def test_a_kill_costs_one_point_and_no_loss(place, monkeypatch):
    plain = WANTED.model_copy(
        update={"heal": {"plain": Heal()}, "tasks": False, "calibrations": {"": {}}}
    )
    measure, done = experiments.measure_perplexity, []

    def counted(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        return measure(*args)

    monkeypatch.setattr(experiments, "measure_perplexity", counted)
    with pytest.raises(KeyboardInterrupt):
        place.measure(plain)
    done[:] = [None] * 4
    first = place.measure(plain)
    calls = len(done) - 4
    masks = first.frame["plan"].nunique()
    assert calls == 1 + masks - 3, "the dense model and each mask are measured once"
    assert place.measure(plain).frame["seconds"].equals(first.frame["seconds"])
    assert len(done) == calls + 4
    extra = place.measure(plain.model_copy(update={"budgets": ("1blocks", "2blocks", "3blocks")}))
    assert len(done) - calls - 4 == extra.frame["plan"].nunique() - masks


def test_a_search_sees_one_kind_alone_and_what_changes_weights_is_not_refitted(place):
    bench = experiments.Bench(
        place.run, place.dense, Path("sources"), place.folder / "data", SilentObserver()
    )
    own = [text for text in bench.texts["calibration"] if text.kind.name == "odd"]
    drawn = place.run.calibration.model_copy(
        update={"packing": "per_sample", "num_samples": 20, "seq_len": 200}
    )
    rows = bench.rows(drawn, "odd", None, False)
    decode = bench.dense.tokenizer.decode
    assert len(rows.search.rows) == 20
    assert {decode(row) for row in rows.search.rows} <= set(own)
    assert rows.fit.digest == bench.rows(drawn, None, None, False).fit.digest, (
        "a fit sees all kinds"
    )
    changes = {
        "methods": {"slicegpt": {}, "narrow": {}},
        "budgets": ("0.22",),
        "seeds": (42,),
        "tasks": False,
    }
    heal = {
        "plain": Heal(),
        "refit": Heal(compensate="refit"),
        "trained": Heal(train={"epochs": 1}),
    }
    result = place.measure(
        WANTED.model_copy(update={**changes, "heal": heal, "calibrations": {"": {}}})
    ).frame
    assert list(zip(result["method"], result["heal"], strict=True)) == [
        ("slicegpt", "plain"),
        ("slicegpt", "trained"),
        ("narrow", "plain"),
        ("narrow", "refit"),
        ("narrow", "trained"),
    ]


def test_settings_are_refused_before_anything_is_computed(place, monkeypatch):
    monkeypatch.setattr(experiments, "measure_perplexity", None)
    with refused("settings"):
        place.measure(
            WANTED.model_copy(update={"methods": {"blockpruner": {"options": {"width": 3}}}})
        )
    with refused("unknown-method"):
        place.measure(WANTED.model_copy(update={"methods": {"blokpruner": {}}}))


def test_a_study_of_experiments_asks_for_them_alone(place):
    Path("studies").mkdir()
    study = {
        "title": "T",
        "runs": ["tiny"],
        "experiments": {
            "one": {"run": "tiny", "methods": {"blockpruner": {}}, "budgets": ["0.1"]},
            "two": {"run": "tiny", "methods": {"shortgpt": {}}, "budgets": ["0.1"]},
        },
    }
    Path("studies/seed.yaml").write_text(yaml.safe_dump(study))
    Path("params.yaml").write_text("runs: [tiny]\ntargets: {}\nstudies: []\nexperiments: {}\n")
    assert set(load_study("seed").experiments) == {"one", "two"}
    chosen = choose_study("seed", ["two"])
    pipeline = {
        "settings@tiny": (),
        "fetch@tiny": ("settings@tiny",),
        "score@tiny-shortgpt": ("fetch@tiny",),
    }
    pipeline |= {
        f"experiment@seed-{name}": ("settings@tiny", "fetch@tiny") for name in ("two", "one")
    }
    assert chosen.stages(pipeline) == ["settings@tiny", "fetch@tiny", "experiment@seed-two"]
    assert yaml.safe_load(chosen.text)["experiments"] == {
        "seed-two": {"study": "seed", "name": "two", "run": "tiny"}
    }
    both = choose_study("seed")
    assert list(both.experiments) == ["seed-one", "seed-two"]
    assert yaml.safe_load(both.text)["studies"] == ["seed"]
    with refused("unknown-item"):
        choose_study("seed", ["three"])


def test_a_dry_run_of_a_study_of_experiments_prints_them(place, capsys):
    Path("studies").mkdir()
    item = {
        "run": "tiny",
        "methods": {"given": {"options": {"order": ["mha.1"]}}},
        "budgets": ["1blocks"],
    }
    grid = {
        "methods": {"blockpruner": {}, "shortgpt": {}},
        "budgets": ["0.1", "0.2"],
        "seeds": [1, 2, 3],
    }
    heal = {"plain": {}, "refit": {"compensate": "refit"}}
    experiments_ = {"one": item, "many": {"run": "tiny", **grid, "heal": heal}}
    Path("studies/mine.yaml").write_text(
        yaml.safe_dump({"title": "T", "runs": ["tiny"], "experiments": experiments_})
    )
    Path("params.yaml").write_text("runs: [tiny]\ntargets: {}\nstudies: []\nexperiments: {}\n")
    place.measure(Experiment.model_validate(item))
    shutil.copytree(place.folder / "out", "data/evidence/mine-one")
    assert paper.main(["--study", "mine", "--dry-run"]) == 0
    many, item, model, unknown = capsys.readouterr().out.splitlines()
    assert item == "one: tiny: given at 1blocks: 1 models (1 measured); 1 searches"
    assert (
        many == "many: tiny: blockpruner, shortgpt at 0.1, 0.2: 24 models (0 measured); 6 searches"
    )
    assert model == "model model: not fetched, on this machine"
    assert unknown.startswith("not known before the run: ")
    assert paper.main(["--study", "mine", "--dry-run", "--experiment", "many"]) == 0
    assert "one:" not in capsys.readouterr().out
    assert "seed" not in Path("params.yaml").read_text(), "nothing is changed"


def test_the_stage_depends_on_what_it_reads(place):
    """Its settings, its study, and nothing else; what changed while it ran is refused."""
    Path("studies").mkdir()
    own = {"run": "tiny", "methods": {"shortgpt": {}}, "budgets": ["2blocks"]}
    Path("studies/mine.yaml").write_text(
        yaml.safe_dump({"title": "T", "runs": ["tiny"], "experiments": {"one": own}})
    )
    named = {"mine-one": {"study": "mine", "name": "one", "run": "tiny"}}
    params = {
        "runs": ["tiny"],
        "targets": {},
        "experiments": named,
        "runtime": {"device": "cpu", "threads": 1},
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    dag.write()
    for source, role in ((Path("dense"), "models"), (Path("sources"), "sources")):
        Path("data", role).mkdir(parents=True)
        source.rename(Path("data", role, "tiny"))
    tasks = Path("data/sources/tiny/tasks")
    shutil.rmtree(tasks)
    fetch_tasks(place.run.evaluate.zero_shot, *[tasks] * 2, Path("cache"), Path("pins"), print)
    settings.main("tiny")
    stages._SETTINGS_READ.clear()
    experiment.main("mine-one")
    read = {where for where, _, _ in stages._SETTINGS_READ}
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["experiment"]["do"]["deps"]
    expected = {
        dep.replace("${item.run}", "tiny") for dep in deps if dep.startswith("data/settings")
    }
    assert read == expected | {"studies/mine.yaml"}
    assert Points.read(Path("data/evidence/mine-one")).frame["method"].tolist() == ["shortgpt"]
