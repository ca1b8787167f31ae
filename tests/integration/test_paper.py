"""The study llama2-7b from its run files to its tables and figures, on a tiny Llama in the model's
place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from blockpruner.config.dag import read_dag
from blockpruner.evaluation import suite
from flows.selection import choose_study
from stages import (
    baseline,
    benchmark,
    calibrate,
    commit,
    compensate,
    fetch,
    materialize,
    score,
    settings,
    tables,
    train,
)
from study.studies import load_study
from tests.integration.project import ROOT
from tests.tiny import save_tiny

DATA = Path(os.environ.get("BLOCKPRUNER_DATA", "/nowhere"))
ITEMS = ("table1", "table2", "table5", "figure4", "figure6", "figure7", "figure8")
SOME = {
    "blockpruner": ("0.2199", "0.30"),
    "one-shot-perplexity": ("0.2095",),
    "greedy-layers": ("0.2102", "0.3003"),
    "shortgpt": ("0.2102",),
    "relative-magnitude": ("0.2102",),
    "relative-magnitude-frobenius": ("0.2102",),
    "slicegpt": ("0.2145",),
    "mha-only": ("0.10",),
    "mlp-only": ("0.10",),
    "blockpruner-by-bi": ("0.10",),
    "blockpruner-by-rm": ("0.10",),
    "blockpruner-by-rm-frobenius": ("0.10",),
}
"""The budgets of the short form, by method."""
RUNS = ("", "-slicegpt", "-n64", "-wiki256")

needs_data = pytest.mark.skipif(
    not DATA.is_dir(),
    reason=(
        "BLOCKPRUNER_DATA names no folder of Alpaca, WikiText-2 and the five tasks as Parquet files"
    ),
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The shipped runs and studies with a tiny model, a few short texts and a few items."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "studies", "data/paper"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "params.yaml").write_text(
        "runs: [llama2-7b]\ntargets: {}\nruntime: {device: cpu, threads: 1}\n"
    )
    Path("items").mkdir()
    for path in (
        path for split in ("validation", "test") for path in DATA.glob(f"*_{split}.parquet")
    ):
        pq.write_table(pq.read_table(path).slice(0, 3), Path("items") / path.name)
    for path in Path("runs").glob("llama2-7b*.yaml"):
        run = yaml.safe_load(path.read_text())
        run["model"] = {"source": "path", "path": "model", "dtype": "float32"}
        drawn = run.setdefault("calibration", {})
        drawn["seq_len"] = 16
        drawn |= (
            {"num_rows": 6}
            if "num_rows" in drawn
            else {"num_samples": max(1, drawn.get("num_samples", 256) // 32)}
        )
        run["evaluate"] = {
            "zero_shot": {"data": {"source": "path", "path": "items"}, "bos": False},
            "speed": None,
        }
        if "train" in run:
            run["train"] = {"num_samples": 8, "seq_len": 16, "rank": 2, "validation": 2}
        path.write_text(yaml.safe_dump(run))

    def hub(data, cache, pins, template):
        if data.repo == "tatsu-lab/alpaca":
            return [
                text[-16:]
                for text in pq.read_table(DATA / "alpaca_subset.parquet")["text"].to_pylist()
            ]
        found = pq.read_table(
            DATA / f"wikitext2_raw_{'test' if data.split == 'test' else 'validation'}.parquet"
        )
        lines = [line for line in found["text"].to_pylist() if line]
        return lines[:7] if data.split == "test" else [line[:16] for line in lines]

    monkeypatch.setattr(fetch, "load_texts", hub)
    monkeypatch.setattr(suite, "PROMPTS", ())  # whose answers no table shows
    return tmp_path


def make(study):
    """Run the stages of a study in one process, in place of DVC."""
    chosen = choose_study(study)
    chosen.write()
    for run, targets in chosen.targets.items():
        for stage in (settings, fetch, calibrate):
            stage.main(run)
        for name, search in read_dag()["searches"].items():
            if search["run"] == run:
                score.main(name)
        baseline.main(run)
        for target in targets:
            for stage in (commit, compensate, train, materialize, benchmark):
                stage.main(target)
    tables.main(study)


def check_tables(study):
    folder = Path("data/tables") / study
    for name in ITEMS:
        found = pd.read_csv(folder / "tables" / f"{name}.csv")
        own = found[found["source"] == "here"] if "source" in found else found
        assert len(own) > 2 and own.notna().all(axis=None), f"{name}:\n{own.to_string()}"
        assert name.startswith("table") or (folder / "plots" / f"{name}.png").stat().st_size > 1000
    models = pd.read_csv(folder / "tables" / "models.csv")
    assert "reason" not in models or models["reason"].isna().all(), (
        models["reason"].dropna().to_string()
    )
    return folder


@needs_data
@pytest.mark.slow
def test_a_study_of_the_paper_runs_in_short(project, capsys):
    study = load_study("llama2-7b")
    kept = {
        name: target.model_dump(mode="json", exclude_defaults=True)
        for name, target in study.targets.items()
        if target.budget in SOME.get(target.method, ())
        and target.run.removeprefix("llama2-7b") in RUNS
    }
    runs = [run for run in study.runs if any(target["run"] == run for target in kept.values())]
    value = {"title": study.title, "runs": runs, "targets": kept}
    Path("studies/short.yaml").write_text(yaml.safe_dump(value))
    save_tiny(
        project / "model",
        layers=9,
        intermediate_size=86,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    make("short")
    check_tables("short")


@needs_data
@pytest.mark.slow
def test_a_study_of_the_paper_runs(project):
    save_tiny(
        project / "model",
        layers=32,
        intermediate_size=86,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    make("llama2-7b")
    check_tables("llama2-7b")
