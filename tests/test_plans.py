"""The plans of plans/: each is whole, is as its table says, and makes a model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from blockpruner.cli.pruning import Place
from blockpruner.core.blocks import BlockKind, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.model.models import decoder_layers, load_model
from blockpruner.store.plans import load_plan, save_plan
from tests.fakes import SHA, Hub
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "plans").glob("*.json"))
ROW = r"^\| \[(.*?)\]\((.*?)\) \| (\S+) \| ([\d.]+) %: (\d+) MHA, (\d+) MLP \|"
TABLE = re.findall(ROW, (ROOT / "plans/README.md").read_text(), re.M)


class Heard(SilentObserver):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "cache", "cpu", Heard())


def read(place, model):
    return place.read_run(str(model), "auto", False, {})


def tiny_of(plan, folder):
    """A tiny model of a plan's depth, and the plan as it would be for that model's shape."""
    model = save_tiny(folder / "tiny", layers=plan.layers)
    total = sum(parameter.numel() for parameter in load_model(model, "float32").parameters())
    return model, replace(plan, parameters={**plan.parameters, "dense": total})


def test_the_table_lists_every_plan_as_it_is():
    assert [file for _, file, *_ in TABLE] and {file for _, file, *_ in TABLE} == {path.name for path in FILES}
    for name, file, base, percent, mha, mlp in TABLE:
        plan = load_plan(ROOT / "plans" / file)
        assert name == Path(file).stem == plan.target and plan.base.partition("@")[0] in (base, plan.base)
        assert percent == f"{plan.ratio:.2%}".rstrip("%")
        kinds = [block.kind for block in parse_mask(",".join(plan.order))]
        assert [kinds.count(BlockKind.MHA), kinds.count(BlockKind.MLP)] == [int(mha), int(mlp)]


def test_the_published_sequence_is_that_of_the_run_file():
    run = yaml.safe_load((ROOT / "runs/llama2-7b-official.yaml").read_text())
    order = tuple(run["score"]["options"]["order"])
    for name, steps in (("llama2-7b-0.22", 17), ("llama2-7b-0.27", 20)):
        plan = load_plan(ROOT / "plans" / f"{name}.json")
        assert plan.order == order[:steps]
        # Llama2-7B's published sizes: an MHA block is 4 x 4096^2, an MLP 3 x 4096 x 11008, each with a norm of 4096
        mha, mlp = 4 * 4096**2 + 4096, 3 * 4096 * 11008 + 4096
        gone = sum({"mha": mha, "mlp": mlp}[unit.partition(".")[0]] for unit in order[:steps])
        assert plan.parameters == {"dense": 6738415616, "pruned": 6738415616 - gone}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("in_process")
def test_apply_takes_it(file, place, tmp_path):
    assert file.stat().st_size < 2500 and "/home" not in file.read_text()
    plan = load_plan(file)
    model, fitting = tiny_of(plan, tmp_path)
    save_plan(fitting, tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"is of another model: its base is .*; give the model"):
        place.apply(read(place, model), file, tmp_path / "refused")
    if "@" in plan.base:
        assert place.apply(read(place, model), tmp_path / "plan.json", tmp_path / "out")["written"][0]["verified"]
        assert place.observer.lines[-1].endswith("only the shape was compared")
        loaded = load_model(tmp_path / "out", "float32", trust_remote_code=True)
        left = [sum(hasattr(layer, name) and any(True for _ in getattr(layer, name).parameters())
                    for layer in decoder_layers(loaded)) for name in ("self_attn", "mlp")]  # fmt: skip
        assert left == [plan.layers - plan.blocks["mha"], plan.layers - plan.blocks["mlp"]]


@pytest.mark.usefixtures("in_process")
def test_a_plan_of_a_hub_repository_takes_its_commit(place, tmp_path, monkeypatch):
    model, plan = tiny_of(load_plan(FILES[0]), tmp_path)
    Hub(model, monkeypatch)
    save_plan(replace(plan, base=f"a/tiny@{SHA}"), tmp_path / "plan.json")
    assert place.apply(read(place, "a/tiny"), tmp_path / "plan.json", tmp_path / "out")["written"][0]["verified"]
    assert place.observer.lines == []
    save_plan(replace(plan, base=f"a/tiny@{'0' * 40}"), tmp_path / "plan.json")
    with pytest.raises(InputError, match="'00000"):  # what was asked for; the stand-in knows one
        place.apply(read(place, "a/tiny"), tmp_path / "plan.json", tmp_path / "other")
