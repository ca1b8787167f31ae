"""What flows decide without a server: stages to start, tables, names, params.yaml, the form's run
file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prefect.states import Completed, Failed

from blockpruner.core.errors import InputError
from blockpruner.core.settings import source_of
from blockpruner.inputs.sources import named_sources
from flows import dvc, paper
from flows import prune as prune_module
from flows.dvc import require_remotes
from flows.new_model import NewModel, add
from flows.prune import LEFT_OUT, main, outcome, results, run_here, run_stages
from flows.selection import Chosen, Selection, choose, choose_study
from tests.errors import refused

ROOT = Path(__file__).parents[2]
PARAMS = """# What is run.
runs: [smollm2]            # names of runs/<name>.yaml
targets:                   # pruned models to build
  smollm2-b2: {run: smollm2, budget: "0.02"}   # the first
  smollm2-b5: {run: smollm2, budget: "0.05"}
report:
  title: SmolLM2-135M, block by block   # shown on top
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The files of settings, as the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "runs", "runs", ignore=shutil.ignore_patterns("dvc.*"))
    Path("params.yaml").write_text(PARAMS)


def test_one_table_of_a_study_asks_for_its_targets_alone(project, capsys):
    for folder in ("studies", "data/paper"):
        shutil.copytree(ROOT / folder, folder)
    name, run = "llama2-7b", "llama2-7b"
    chosen = choose_study(name, ["table2"])
    names = [
        f"{run}-{of}"
        for of in ("blockpruner-b21-99", "one-shot-perplexity-b20-95", "greedy-layers-b21-02")
    ]
    assert chosen.targets == {run: names}
    assert chosen.study == name
    assert len(choose_study(name).targets) == 13
    with refused("unknown-item") as caught:
        choose_study(name, ["table3"])
    assert "valid: table1, table2, table4, " in str(caught.value)
    assert paper.main(["--study", name, "--table", "2", "--figure", "8", "--dry-run"]) == 0
    *lines, model, _ = capsys.readouterr().out.splitlines()
    assert model == "model meta-llama/Llama-2-7b-hf: not fetched, on the hub, perhaps gated"
    assert [line.partition(":")[0] for line in lines] == ["table2", "figure8"]
    assert lines[1].endswith("; 1 trained")
    assert paper.main(["--study", name, "--figure", "2", "--dry-run"]) == 2
    assert Path("params.yaml").read_text() == PARAMS


NEEDS = {
    "fetch@a": (),
    "score@a": ("fetch@a",),
    "commit@x": ("score@a",),
    "build@x": ("score@a", "commit@x"),
    "commit@y": ("score@a", "elsewhere"),
    "report": ("build@x", "commit@y", "score@a"),
}
ARROWS = {
    **NEEDS,
    "build@x": ("commit@x",),
    "commit@y": ("score@a",),
    "report": ("build@x", "commit@y"),
}
"""Without those that lead past a stage on the way."""


@pytest.mark.parametrize(
    ("stale", "fails", "keep_going", "expected"),
    [
        ("", "", False, "cached cached cached cached cached cached"),
        ("score@a", "", False, "cached Completed Completed Completed Completed Completed"),
        ("commit@y", "", False, "cached cached cached cached Completed Completed"),
        ("fetch@a", "commit@x", False, "Completed Completed Failed"),
        ("commit@x commit@y", "commit@x", True, "cached cached Failed out Completed Completed"),
        ("fetch@a", "score@a", True, "Completed Failed out out out out"),
    ],
)
def test_stages_start_behind_what_changed_and_are_left_out_behind_what_failed(
    monkeypatch, stale, fails, keep_going, expected
):
    words = {"cached": "Cached", "out": LEFT_OUT}

    def run(stage, lock, start, wait_for, return_state):
        assert all(state.is_completed() for state in wait_for)
        assert return_state
        assert fails or [state.message for state in wait_for] == [*ARROWS[stage]]
        if not start:
            return Completed(name="Cached", message=stage)
        return Failed() if stage == fails else Completed(message=stage)

    run.with_options = lambda name, task_run_name: run
    monkeypatch.setattr(prune_module, "run_stage", run)
    states = run_stages(NEEDS, ["report"], stale.split(), 0, keep_going)
    assert [state.name for state in states.values()] == [
        words.get(word, word) for word in expected.split()
    ]
    assert outcome(states).is_completed() == (not fails)


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("Running stage 'train@a':", True),
        ("Stage 'train@a' is cached - skipping run, checking out outputs", True),
        ("Stage 'train@a' didn't change, skipping", False),
        ("Running stage 'train@ab':", False),
    ],
)
def test_a_stage_that_has_earlier_outputs_back_has_changed(monkeypatch, line, changed):
    """Settings that come back bring outputs of the cache; what depends on them must be looked
    at."""
    monkeypatch.setattr(dvc, "_follow", lambda *args: (0, [line]))
    assert dvc.repro("train@a", 0, print) is changed


def test_a_table_has_a_row_for_each_model_that_is_measured_or_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/metrics").mkdir(parents=True)
    Path("data/metrics/a-dense.json").write_text(json.dumps({"perplexity": 2.0}))
    Path("data/metrics/x.json").write_text(json.dumps({"perplexity": 3.0, "average": 0.5}))
    states = {"score@a": Completed(), "commit@x": Completed(), "commit@y": Failed(message="no")}
    assert results(Chosen({"a": ["x", "y", "z"]}, "", ()), states) == [
        {"model": "a-dense", "perplexity": 2.0, "average": None, "why": ""},
        {"model": "x", "perplexity": 3.0, "average": 0.5, "why": ""},
        {"model": "y", "perplexity": None, "average": None, "why": "no"},
    ]


def test_a_flow_run_is_named_by_what_it_makes():
    assert Selection().words == "all runs"
    selection = Selection(
        runs=("a", "b"), budgets=("0.1", "7layers"), compensate="none", train=True
    )
    assert selection.words == "a b 0.1 7layers none train"
    assert Selection(budgets=("0.2",)).words == "all runs 0.2"


def test_added_run_and_target_keep_comments(project):
    shutil.copy("runs/smollm2.yaml", "runs/other.yaml")
    chosen = choose(
        Selection(runs=("other",), budgets=("0.125", ".1250", "17blocks", "0.10kv", ".1kv"))
    )
    chosen.write()
    names = {"b12-5": "0.125", "17blocks": "17blocks", "b10kv": "0.10kv"}
    assert chosen.additions == ("run other", *(f"target other-{name}" for name in names))
    assert chosen.targets == {"other": [f"other-{name}" for name in names]}
    new = [f'  other-{name}: {{run: other, budget: "{budget}"}}' for name, budget in names.items()]
    lines, before = Path("params.yaml").read_text().splitlines(), PARAMS.splitlines()
    assert all(line in lines for line in new)
    assert [line for line in lines if line not in new and line != lines[1]] == [
        before[0],
        *before[2:],
    ]
    assert lines[1].split("#")[0].split() == ["runs:", "[smollm2,", "other]"]
    assert lines[1].split("#")[1] == before[1].split("#")[1]


def test_healed_targets_are_added_beside_the_plain_ones(project):
    run = Path("runs/smollm2.yaml")
    run.write_text(f"{run.read_text()}\ntrain: {{data: {{source: path, path: texts.parquet}}}}\n")
    options = [{}, {"compensate": "refit"}, {"train": True}, {"compensate": "none", "train": True}]
    names = ["", "-refit", "-train", "-none-train"]
    for option, name in zip(options, names, strict=True):
        chosen = choose(Selection(budgets=("0.1",), **option))
        assert chosen.additions == (f"target smollm2-b10{name}",)
        chosen.write()
    for option, name in zip(options, names, strict=True):
        again = choose(Selection(budgets=(".10",), **option))
        assert again.targets == {"smollm2": [f"smollm2-b10{name}"]}
        assert not again.additions


def test_a_target_of_another_method_is_not_what_a_flow_asks_for(project):
    own = "  own: {run: smollm2, budget: '0.1', method: blockpruner, compensate: none}\n"
    Path("params.yaml").write_text(PARAMS.replace("report:\n", f"{own}report:\n"))
    assert choose(Selection(budgets=("0.1",), compensate="none")).targets == {
        "smollm2": ["smollm2-b10-none"]
    }


def test_remotes_that_are_not_there_are_refused_before_any_work(project, monkeypatch):
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    require_remotes(None, None)
    for asked, words in (
        (("team", None), "push 'team' is no remote of DVC; existing: none"),
        ((None, "up"), "share 'up'"),
    ):
        with refused("no-remote") as caught:
            require_remotes(*asked)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("message", "again"),
    [
        (
            (
                "stage fetch@a failed: hub repository 'a/b' cannot be used: timed out; check the"
                " network, or ..."
            ),
            True,
        ),
        ("stage fetch@network-b10 failed: disk full", False),
        ("stage train@a failed: no network of experts fits", False),
    ],
)
def test_only_a_fetch_that_the_network_failed_is_tried_again(message, again):
    assert prune_module.is_of_network(None, None, Failed(message=message)) is again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--budget", "1.5"],
            "budget '1.5' is not valid; give a share of all parameters between 0 and 1",
        ),
        (["--compensate", "refit", "--train"], "for targets by budget only; name a budget"),
        (
            ["--run", "none"],
            "run 'none' is unknown: runs/none.yaml does not exist; existing runs: baichuan2-13b, ",
        ),
    ],
)
def test_bad_selection_is_refused_without_traceback(project, capsys, options, message):
    assert main(options) == 2
    assert message in (said := capsys.readouterr().err)
    assert "tmp" not in said
    assert "Traceback" not in said
    assert Path("params.yaml").read_text() == PARAMS


def new(**changes):
    """What a form sends of a new model, which lies in the workspace."""
    Path("models/mine").mkdir(parents=True, exist_ok=True)
    given = {"name": "mine", "model": "models/mine", "budgets": ["2blocks"], "texts": "texts.txt"}
    return NewModel.model_validate(given | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "../elsewhere"},
            r"path '../elsewhere' leads out of the workspace; put a copy inside",
        ),
        ({"model": "~"}, "path '~' leads out"),
        ({"texts": "link/texts.txt"}, "path 'link/texts.txt' leads out"),
        (
            {"more": {"evaluate": {"zero_shot": {"data": {"source": "path", "path": "/tmp"}}}}},
            "path '/tmp' leads out",
        ),
        (
            {"more": {"calibration": {"data": {"source": "mix", "of": [{"path": "/tmp"}]}}}},
            "path '/tmp' leads out",
        ),
        (
            {"more": {"model": {"trust_remote_code": "yes"}}},
            "trust_remote_code: a form cannot allow it",
        ),
        ({"more": {"score": {"units": "layer"}}}, "runs/mine.yaml: score.units: "),
        ({"method": "best"}, "method 'best' is unknown"),
        (
            {"name": "smollm2"},
            "runs/smollm2.yaml is there and has other settings; choose another name",
        ),
        ({"budgets": ["a lot"]}, "budget 'a lot' is not valid"),
        ({"train": True, "more": {"train": None}}, "train: true"),
    ],
)
def test_what_a_form_may_not_ask_for_is_refused_and_nothing_written(project, changes, message):
    Path("link").symlink_to("/tmp")
    files = sorted(Path("runs").iterdir())
    with pytest.raises(InputError, match=message):
        add(new(**changes))
    assert sorted(Path("runs").iterdir()) == files
    assert Path("params.yaml").read_text() == PARAMS


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("smollm2-135m", {"source": "smollm2-135m"}),
        ("meta-llama/Llama-2-7b-hf", {"source": "hub", "repo": "meta-llama/Llama-2-7b-hf"}),
        ("https://hf.co/a/b@v2", {"source": "hub", "repo": "a/b", "revision": "v2"}),
        ("hf://datasets/a/b", {"source": "hub", "repo": "a/b"}),
        ("models/a/b", {"source": "path", "path": "models/a/b"}),
        ("runs", {"source": "path", "path": "runs"}),
        ("absent.jsonl", {"source": "path", "path": "absent.jsonl"}),
    ],
)
def test_a_source_is_named_in_one_string(project, text, source):
    assert source_of(text, named_sources()) == source


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (httpx.ConnectError("gone"), 1, "the Prefect server went away"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_flow_says_that_finished_work_is_kept(
    monkeypatch, tmp_path, capsys, failure, code, words
):
    def start():
        raise failure

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune_module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        prune_module, "get_current_settings", lambda: SimpleNamespace(api=SimpleNamespace(url=None))
    )
    assert run_here(lambda: None, start) == code
    said = capsys.readouterr().err
    assert words in said
    assert "kept: run again to go on" in said


def test_a_study_that_there_is_not_is_refused_before_a_server_starts(project, capsys):
    assert paper.main(["--study", "none"]) == 2
    assert "study 'none' is unknown" in capsys.readouterr().err
