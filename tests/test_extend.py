"""The examples of docs/extend.md and docs/notebook.ipynb run, and do what the pages claim."""

import json
import math
import re
from itertools import product
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

import blockpruner
from blockpruner.core.blocks import parse_mask
from blockpruner.core.families import FAMILIES
from blockpruner.core.plan import Plan
from blockpruner.store.files import write_table
from study.answers import curves
from study.points import POINTS
from study.studies import load_study, write_tables
from tests.tiny import VOCABULARY, save_tiny, tiny_model, tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"
EXAMPLES = dict(
    re.findall(
        r"\n## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```",
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
)
TEXTS = [f"sentence {number} of a small calibration set, with some words" for number in range(6)]


def run(title, **given):
    """Run the page's first example, which imports the package, and one more; returns its names."""
    names = {"tokenizer": tiny_tokenizer(), "texts": TEXTS, "model": tiny_model(layers=3)} | given
    exec(compile("import blockpruner\n" + EXAMPLES[title], str(PAGE), "exec"), names)
    return names


def test_a_metric():
    names = run("A metric")
    logits, targets = torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1])
    assert names["wrong"](logits, targets, None).tolist() == [0.0, 1.0]
    plan = names["pruned"].plan
    assert len(plan.removed) == 2 and plan.metric == "wrong_tokens"
    bare = blockpruner.prune(
        tiny_model(layers=3), tiny_tokenizer(), TEXTS, "2blocks", seq_len=32, metric=names["wrong"]
    )
    assert bare.plan.order == plan.order and bare.plan.metric == "wrong"


def test_a_search():
    plan = run("A search")["pruned"].plan
    assert [unit.partition(".")[0] for unit in plan.order] == ["mlp", "mha", "mlp"]


def test_a_study_has_every_method_at_the_sizes_that_it_measured_in_one_table_and_figure(
    tmp_path, monkeypatch
):
    """The page's study, with made-up points: rises are known, and so is each cell."""
    text = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/mine.yaml").write_text(text)
    (tmp_path / "runs").symlink_to(PAGE.parents[1] / "runs")
    monkeypatch.chdir(tmp_path)
    (asked,) = load_study("mine").experiments.values()
    texts = ["a", "a", "b", "b"]
    factors = {
        ("blockpruner", "plain"): 1.5,
        ("blockpruner", "refit"): 1.2,
        ("turns", "plain"): 1.4,
        ("turns", "refit"): 1.3,
    }
    base = {"plan": "mha.0", "mha": 1, "mlp": 0, "items": "{}", "calibration": ""}
    rows = [
        {
            **base,
            "method": "dense",
            "heal": "",
            "seed": 0,
            "budget": "",
            "ratio": 0.0,
            "nll": [2.0] * 4,
        }
    ]
    for seed, method, budget, heal in product(
        asked.seeds, asked.methods, asked.budgets, asked.heal
    ):
        rise = math.log(factors[method, heal]) * float(budget) / 0.04
        own = {
            "method": method,
            "heal": heal,
            "seed": seed,
            "budget": budget,
            "ratio": float(budget) + 0.003,
        }
        rows.append({**base, **own, "nll": [2.0 + rise] * 4})
    about = {"kinds": json.dumps(texts), "digest": "d"}
    write_table(
        tmp_path / "data/evidence/mine-one/points.parquet",
        pa.Table.from_pylist(rows, schema=POINTS),
        about,
    )
    render, labels = curves.plots.render, dict[str, set[str]]()

    def rendered(name, caption, size, fill):
        fill(figure := Figure())
        labels[name] = {line.get_label() for axes in figure.axes for line in axes.get_lines()}
        return render(name, caption, size, fill)

    monkeypatch.setattr(curves.plots, "render", rendered)
    write_tables("mine", tmp_path / "data")
    (table,) = (tmp_path / "data/tables/mine/tables").glob("*sizes.csv")
    found = pd.read_csv(table)
    assert (
        len(found) == 8
        and set(found["removed_pct"].round(6)) == {4.3, 8.3}
        and set(found["draws"]) == {3}
    )
    cells = found.set_index(["method", "healing", "removed_pct"])["heldout_x"]
    titles = {"blockpruner": "BlockPruner", "turns": "turns"}
    for (method, heal), factor in factors.items():
        own = [cells[titles[method], heal, removed] for removed in (4.3, 8.3)]
        assert own == [pytest.approx(factor, rel=1e-3), pytest.approx(factor**2, rel=1e-3)]
    assert not list((tmp_path / "data/tables/mine/tables").glob("*variants.csv"))
    assert labels["quality"] == {"BlockPruner", "turns"}


def test_a_family(tmp_path, monkeypatch):
    monkeypatch.setattr(FAMILIES, "_rows", dict(FAMILIES))
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    gemma = GemmaForCausalLM(config).eval().requires_grad_(False)
    pruned = run("A model family", gemma=gemma, folder=tmp_path)["pruned"]
    assert len(parse_mask(",".join(pruned.plan.removed))) == 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(ids).logits, pruned.model(ids).logits)
    assert sum(p.numel() for p in loaded.parameters()) == pruned.plan.parameters["pruned"]


def test_a_method_that_changes_weights():
    """Its neurons are those that brute force would keep."""
    names, dense = run("A method that changes weights"), tiny_model(layers=2)
    details = {"width": 40}
    said = ("uniform", "t", "r", "0.1", "uniform", "perplexity", "", 2, (), (), 0.1, (), {}, {}, {})
    plan = Plan(*said, details=details)
    config = dense.config.to_dict()
    before = dense.model.layers[1].mlp.down_proj.weight.clone()
    names["UNIFORM"].apply_(dense, plan, ())
    norms = before.norm(dim=0).tolist()
    kept = sorted(sorted(range(48), key=norms.__getitem__)[-40:])
    torch.testing.assert_close(dense.model.layers[1].mlp.down_proj.weight, before[:, kept])
    assert (
        sum(p.numel() for p in dense.parameters())
        == names["UNIFORM"].removed(details, config).pruned
    )
    assert dense(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_notebook(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    data = tmp_path / "data"
    save_tiny(data / "models/smollm2", layers=6)
    for name in ("calibration", "perplexity"):
        write_table(data / f"sources/smollm2/{name}.parquet", pa.table({"text": TEXTS * 40}))
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names = {}
    for cell in json.loads(PAGE.with_name("notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    said = capsys.readouterr().out
    assert (
        f"{names['pruned'].plan.ratio:.2%} removed" in said
        and "95 % interval" in said
        and "rivals" in said
    )
    assert said.endswith("True True\n")
    drawn = [dot for line in names["axes"].get_lines() for dot in line.get_xdata()]
    assert sorted(drawn) == sorted([*range(6)] * 2)
