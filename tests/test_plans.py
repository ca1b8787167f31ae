"""The plans of plans/: each is whole, is as its table says, and makes a model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from blockpruner.cli.page import write_page_of
from blockpruner.cli.pruning import Command
from blockpruner.core.blocks import BlockKind, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.inputs.sources import named_sources
from blockpruner.model.models import decoder_layers, load_model
from blockpruner.store.files import read_json, write_sealed_json
from blockpruner.store.manifest import manifest
from blockpruner.store.plans import load_plan, save_plan
from tests.errors import refused
from tests.fakes import SHA, Hub, unverified
from tests.plans import narrow_plan, plan_of
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "plans").glob("*.json"))
ROW = r"^\| \[(.*?)\]\((.*?)\) \| (\S+) \| ([\d.]+) %: (.*?) \|"
TABLE = re.findall(ROW, (ROOT / "plans/README.md").read_text(), re.M)


class Heard(SilentObserver):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture
def place(tmp_path):
    return Command(tmp_path / "cache", "cpu", Heard())


def read(place, model):
    return place.read_run(str(model), {})


def tiny_of(plan, folder):
    """A tiny model of a plan's depth, and the plan as it would be for that model's shape."""
    model = save_tiny(folder / "tiny", layers=plan.layers)
    if plan.cut.channels:
        return model, narrow_plan(model, dict.fromkeys(plan.details["channels"], range(20)))
    return model, plan_of(
        model, plan.order, base=plan.base, calibration=plan.calibration, nested=plan.nested
    )


def test_the_table_lists_every_plan_as_it_is():
    assert [file for _, file, *_ in TABLE] and {file for _, file, *_ in TABLE} == {
        path.name for path in FILES
    }
    for name, file, base, percent, what in TABLE:
        plan = load_plan(ROOT / "plans" / file)
        assert name == Path(file).stem == plan.target
        assert plan.base.partition("@")[0] == base if "@" in plan.base else base in named_sources()
        assert percent == f"{plan.ratio:.2%}".rstrip("%")
        kinds = [block.kind for block in parse_mask(",".join(plan.order))] if plan.order else []
        counts = f"{kinds.count(BlockKind.MHA)} MHA, {kinds.count(BlockKind.MLP)} MLP"
        assert what == (counts if plan.order else f"channels of {len(plan.cut.channels)} MLPs")


def test_the_channels_of_qwen_are_as_many_as_its_published_sizes_say():
    """Of 4,864 channels of 3 x 896 parameters in each MLP; the conversion from GGUF unties the
    head."""
    for name in ("0.10", "0.20"):
        plan = load_plan(ROOT / f"plans/qwen25-coder-0.5b-{name}.json")
        gone = sum(4864 - len(kept) for kept in plan.cut.channels.values())
        dense = 494_032_768 + 151_936 * 896
        assert plan.parameters == {"dense": dense, "pruned": dense - 3 * 896 * gone}


def test_the_published_sequence_is_that_of_the_run_file():
    run = yaml.safe_load((ROOT / "runs/llama2-7b-official.yaml").read_text())
    order = tuple(run["score"]["options"]["order"])
    for name, steps in (("llama2-7b-0.22", 17), ("llama2-7b-0.27", 20)):
        plan = load_plan(ROOT / "plans" / f"{name}.json")
        assert plan.order == order[:steps]
        # Llama2-7B's published sizes: an MHA block is 4 x 4096^2, an MLP 3 x 4096 x 11008, each
        # with a norm of 4096
        mha, mlp = 4 * 4096**2 + 4096, 3 * 4096 * 11008 + 4096
        gone = sum({"mha": mha, "mlp": mlp}[unit.partition(".")[0]] for unit in order[:steps])
        assert plan.parameters == {"dense": 6738415616, "pruned": 6738415616 - gone}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("in_process")
def test_apply_takes_it(file, place, tmp_path):
    assert file.stat().st_size < 30_000 and "/home" not in file.read_text()
    plan = load_plan(file)
    model, fitting = tiny_of(plan, tmp_path)
    save_plan(replace(fitting, base=f"a/tiny@{SHA}"), tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"is of another model: its base is .*; give the model"):
        place.apply(read(place, model), file, tmp_path / "refused")
    assert place.apply(read(place, model), tmp_path / "plan.json", tmp_path / "out")["written"][0][
        "verified"
    ]
    assert place.observer.lines[-1].endswith("only the shape was compared")
    loaded = load_model(tmp_path / "out", "float32", trust_remote_code=True)
    left = [
        sum(
            hasattr(layer, name) and any(True for _ in getattr(layer, name).parameters())
            for layer in decoder_layers(loaded)
        )
        for name in ("self_attn", "mlp")
    ]
    assert left == [plan.layers - plan.blocks["mha"], plan.layers - plan.blocks["mlp"]]
    assert sum(width == 20 for width in getattr(loaded.config, "mlp_widths", None) or ()) == len(
        plan.cut.channels
    )


@pytest.mark.usefixtures("in_process")
def test_a_plan_of_a_hub_repository_takes_its_commit(place, tmp_path, monkeypatch):
    model, plan = tiny_of(load_plan(FILES[0]), tmp_path)
    Hub(model, monkeypatch)
    save_plan(replace(plan, base=f"a/tiny@{SHA}"), tmp_path / "plan.json")
    assert place.apply(read(place, "a/tiny"), tmp_path / "plan.json", tmp_path / "out")["written"][
        0
    ]["verified"]
    assert place.observer.lines == [
        f"weights of commit {SHA}, because {tmp_path}/plan.json names it"
    ]
    save_plan(replace(plan, base=f"a/tiny@{'0' * 40}"), tmp_path / "plan.json")
    with pytest.raises(InputError, match="'00000"):  # what was asked for; the stand-in knows one
        place.apply(read(place, "a/tiny"), tmp_path / "plan.json", tmp_path / "other")


@pytest.fixture
def mine(tmp_path):
    """A tiny model, and a function that writes its plan with some fields of the file changed."""
    model = save_tiny(tmp_path / "tiny")

    def write(**changes):
        plan = plan_of(model, ["mha.1", "mlp.2"], base=f"good/model@{SHA}")
        save_plan(plan, tmp_path / "plan.json")
        fields = read_json(tmp_path / "plan.json") | changes
        write_sealed_json(
            tmp_path / "plan.json",
            {name: value for name, value in fields.items() if value is not ...},
        )
        return tmp_path / "plan.json"

    return model, write


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": "4"},
        {"removed": "mha.1"},
        {"nested": 1},
        {"own": 1},
        {"ratio": ...},
        {"blocks": {"mha": 1}},
        {"calibration": {"rows": "<b>", "tokens": 1, "dense_perplexity": 1, "perplexity": 1}},
        {"parameters": [1, 2]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_plan_with_another_type_or_field_is_refused(mine, changes):
    with refused("settings") as error:
        load_plan(mine[1](**changes))
    assert "plan.json is not a plan: " in str(error.value) and next(iter(changes)) in str(
        error.value
    )


def test_a_plan_of_another_format_is_refused_and_one_without_a_number_is_of_the_first(mine):
    assert read_json(mine[1]())["format"] == 1 and load_plan(mine[1](format=...)) == load_plan(
        mine[1]()
    )
    with refused("plan-format") as error:
        load_plan(mine[1](format=2))
    assert "is a plan of format 2, and this version reads 1; take the version" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 0.01},
        {"parameters": {"pruned": 10}},
        {"blocks": {"mha": 0, "mlp": 0}},
        {"removed": ["mha.1"]},
        {"order": ["mha.1", "mlp.02"]},
        {"order": ["mha.1", "mlp.9"]},
        {"removes": {"parameters": 0.0}},
        {"ratios": []},
    ],
    ids=str,
)
def test_a_plan_that_does_not_follow_from_what_it_removes_is_refused(
    place, mine, tmp_path, changes
):
    model, write = mine
    known = read_json(write())
    given = {k: known[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    with refused("plan-differs"):
        place.apply(read(place, model), write(**given), tmp_path / "out")
    assert not (place.root / "models").exists(), "weights were fetched for it"


@pytest.mark.parametrize(
    "base", ["good/model@refs/pr/7", "good/model@main", f"good/model@{SHA[1:]}"]
)
def test_a_revision_that_is_no_commit_is_refused(place, mine, tmp_path, monkeypatch, base):
    hub = Hub(mine[0], monkeypatch)
    with refused("plan-revision"):
        place.apply(read(place, "good/model"), mine[1](base=base), tmp_path / "out")
    assert {revision for _, revision in hub.asked} == {None}


def test_no_plan_chooses_whose_code_runs(place, mine, tmp_path, monkeypatch):
    """Without trust the plan's commit would be taken, as above."""
    Hub(mine[0], monkeypatch)
    run = place.read_run("good/model", {"model": {"trust_remote_code": True}})
    with refused("plan-revision") as error:
        place.apply(run, mine[1](base=f"good/model@{'0' * 40}"), tmp_path / "out")
    assert f"for commit {'0' * 40} of good/model, and yours is {SHA}" in str(error.value)
    with unverified():
        assert place.apply(run, mine[1](), tmp_path / "out")["written"]


def test_weights_are_compared_by_content_where_the_plan_knows_them(place, mine, tmp_path):
    model, write = mine
    with unverified():
        place.apply(read(place, model), write(), tmp_path / "out")
    known = load_plan(tmp_path / "out/blockpruner_plan.json").weights
    with unverified():
        place.apply(read(place, model), write(weights=known), tmp_path / "again")
    assert len(place.observer.lines) == 1
    with refused("plan-of-other-model"):
        place.apply(read(place, model), write(weights="0" * 64), tmp_path / "third")


def test_numbers_of_others_enter_no_card_and_no_page_of_apply_and_no_text_is_markup(
    place, mine, tmp_path
):
    measured = {
        "rows": 987654,
        "tokens": 876543,
        "dense_perplexity": 1.357,
        "perplexity": 1.468,
        "<b>": "<b>",
    }
    hostile = "`](https://x.example) <img src=x>\n# Heading"
    file = mine[1](
        calibration=measured, options={"per": hostile}, target=hostile, run=hostile, budget=hostile
    )
    with unverified():
        place.apply(read(place, mine[0]), file, out := tmp_path / "out")
    card = (out / "README.md").read_text()
    assert (
        "before, " not in card
        and "\n# Heading" not in card
        and "`per: '](https://x.example) <img src=x> #" in card
    )
    write_page_of(out, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not [
        text for text in ("1.357", "1.36", "1.47", "987,654", "<img src=x>") if text in page
    ]
    # a checkpoint of a stranger
    save_plan(replace(load_plan(file), target=hostile), out / "blockpruner_plan.json")
    write_sealed_json(
        out / "verification.json", {"ok": True, "engine": "x", "manifest": manifest(out)}
    )
    write_page_of(out, tmp_path / "page.html")
    assert "<img src=x>" not in (tmp_path / "page.html").read_text()
