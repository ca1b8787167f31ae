"""`python -m flows.paper --check`, end to end on a tiny model, with stand-ins for the published numbers."""

import math
import shutil
from statistics import fmean

import pyarrow.parquet as pq
import yaml

from blockpruner.core.blocks import parse_mask
from blockpruner.model.models import load_model, masked
from flows.paper import main
from tests.integration.project import ROOT, environment, make_project, run_of
from tests.tiny import full_nll, save_tiny, tiny_tokenizer

SEQUENCE = [f"{kind}.{layer}" for layer in range(8, -1, -1) for kind in ("mha", "mlp")][:17]


def test_published_answers_are_held_against_this_machine_from_fetch_to_verdict(tmp_path, monkeypatch, capfd):
    """Perplexities are those of plain forwards. The average and ShortGPT's order are not what the paper has."""
    project, inputs = make_project(tmp_path, {}), tmp_path / "inputs"
    save_tiny(inputs / "model", layers=12, tie_word_embeddings=True)
    shutil.copy(ROOT / "runs" / "dvc.yaml", project / "runs")
    study = {"main": {"block": "17blocks", "layer": "7layers"}, "tasks": [], "calibrations": {}}
    given = {"method": "given", "options": {"order": SEQUENCE}}
    for name, change in (("llama2-7b", {"study": study}), ("llama2-7b-official", {"score": given})):
        (project / "runs" / f"{name}.yaml").write_text(yaml.safe_dump(run_of(inputs) | change))
    (project / "runs" / "sets.yaml").write_text("llama2-7b: [llama2-7b]\n")

    ids = tiny_tokenizer()("\n\n".join(pq.read_table(inputs / "texts.parquet").column("text").to_pylist()))["input_ids"]
    rows, dense, numbers = [ids[:64], ids[64:128]], load_model(inputs / "model", "float32", "cpu"), {}
    for key, mask in (("dense", ""), ("blockpruner", ",".join(SEQUENCE))):
        with masked(dense, parse_mask(mask) if mask else frozenset()) as model:
            numbers[key] = math.exp(fmean(full_nll(model, row) for row in rows))
    (project / "data" / "paper").mkdir(parents=True)
    lines = (f"Llama2-7B,{key},0,{value},200" for key, value in numbers.items())
    (project / "data" / "paper" / "table1_main.csv").write_text(
        "\n".join(["model,method,ratio_pct,wikitext2_ppl,avg", *lines, ""])
    )

    monkeypatch.chdir(project)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    assert main(["--check", "llama2-7b"]) == 1
    found = (project / "data" / "studies" / "llama2-7b" / "check" / "check.md").read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in found[:5]] == ["agrees", "DIFFERS"] * 2 + ["DIFFERS"], found
    assert "search: exact; calibration: " in found[5]
    assert "published answers are not reproduced: dense model: average" in capfd.readouterr().err
    assert "llama2-7b" in yaml.safe_load((project / "params.yaml").read_text())["paper"]["studies"]
