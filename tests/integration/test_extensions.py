"""The rows of tests/toys.py, added by an entry point, go from a run file through the DAG to the
report."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from tests.integration.project import counts, dvc, make_project, module, set_targets
from tests.tiny import VOCABULARY, tiny_tokenizer

METADATA = {
    "entry_points.txt": "[blockpruner.extensions]\ntoys = toys:ROWS\n",
    "METADATA": "Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("toys"), {"toy-3": "3blocks"})
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.5,
    }
    model = folder.parent / "inputs/model"
    shutil.rmtree(model)
    GemmaForCausalLM(GemmaConfig(**sizes, **heads, max_position_embeddings=128)).save_pretrained(
        model
    )
    tiny_tokenizer().save_pretrained(model)
    shutil.copy(Path(__file__).parents[1] / "toys.py", folder)
    (folder / "toys-1.0.dist-info").mkdir()
    for name, text in METADATA.items():
        (folder / "toys-1.0.dist-info" / name).write_text(text)
    set_targets(folder, {"toy-3": "3blocks"})
    run = yaml.safe_load((folder / "runs/tiny.yaml").read_text())
    blocks = {"method": "behind", "metric": "bits", "options": {"step": 2}}
    (folder / "runs/tiny.yaml").write_text(
        yaml.safe_dump(run | {"score": blocks, "export": ["hf", "shapes"]})
    )
    (folder / "runs/soft.yaml").write_text(yaml.safe_dump(run | {"score": {"method": "quiet"}}))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params |= {
        "runs": ["tiny", "soft"],
        "targets": params["targets"] | {"soft-1": {"run": "soft", "budget": "0.1"}},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    assert module(folder, "blockpruner.dag").returncode == 0  # this process has no toys
    dvc(folder, "repro")
    return folder


def test_search_and_metric(project):
    plan = json.loads((project / "data/evidence/toy-3/plan.json").read_text())
    assert plan["order"] == ["mha.3", "mha.2", "mha.1"] and plan["metric"] == "bits"
    # bits, and the perplexity of the same masks
    assert counts(project, "behind")["trials_computed"] == 4 + 4


def test_family_and_export(project):
    folder = project / "data/checkpoints/toy-3"
    config = json.loads((folder / "hf/config.json").read_text())
    assert config["model_type"] == "gemma_blockpruned" and config["layers_without_mha"] == [1, 2, 3]
    assert json.loads((folder / "hf/verification.json").read_text())["ok"]
    plan = json.loads((project / "data/evidence/toy-3/plan.json").read_text())
    assert (
        json.loads((folder / "shapes/shapes.json").read_text())["parameters"]
        == plan["parameters"]["pruned"]
    )


def test_weights(project):
    """Its checkpoint is plain, and has the zeros."""
    model = AutoModelForCausalLM.from_pretrained(project / "data/checkpoints/soft-1/hf")
    assert [bool(layer.mlp.down_proj.weight.any()) for layer in model.model.layers] == [
        True,
        True,
        False,
        False,
    ]


def test_report_uses_the_rows_own_words(project):
    report = (project / "data/report/report.md").read_text(encoding="utf-8")
    for words in (
        "from behind",
        "bits of surprise: -log2 p(token)",
        "quiet MLPs at the top",
        "3 MHA + 0 MLP",
    ):
        assert words in report
    assert "nothing but sound" in report
