"""The command `blockpruner`, on tiny models."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from blockpruner.cli import main as command
from blockpruner.cli.pruning import Place
from blockpruner.core.blocks import parse_mask
from blockpruner.model.models import load_model, masked
from tests.tiny import save_tiny, tiny_tokenizer
from tests.unit.test_sources import Hub

TEXTS = "\n".join(f"{i} little words and {i * i} more of them" for i in range(40))
PROMPT = torch.arange(1, 20)[None]
KILLED = """
import os, signal, sys
from blockpruner.cli.main import main
from blockpruner.store.trials import TrialStore
put, seen = TrialStore.put, []
def put_and_die(*args):
    put(*args)
    seen.append(args)
    if len(seen) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
TrialStore.put = put_and_die
main(sys.argv[1:])
"""
LOAD = """
import sys, torch
sys.modules["blockpruner"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(1, 20)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with calibration texts."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text(TEXTS)
    return tmp_path


@pytest.fixture
def say(capsys):
    def run(*args):
        """Exit code, standard output and standard error of a command."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command.main([str(arg) for arg in args])
        return end.value.code, *capsys.readouterr()

    return run


def prune(model, *more, ratio=0.3, method="blockpruner"):
    return ("prune", model, "--ratio", ratio, "--texts", "texts.txt", "--seq-len", 32, "--method", method, *more)


def done(result):
    """The object that a command with --json ends with."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def fresh(code, *args):
    """A process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("in_process")
def test_a_killed_run_goes_on_and_transformers_loads_the_result(model, place, say):
    killed = fresh(KILLED, *prune(model, "--out", "out"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (place / "out").exists()
    found, whole = (
        done(say(*prune(model, "--out", "out", "--json"))),
        done(say(*prune(model, "--out", "whole", "--trials", "elsewhere", "--json"))),
    )
    assert found["plan"] == whole["plan"] | {"target": "out"} and found["plan"]["method"] == "greedy"
    assert found["search"]["units_reused"] >= 12 > whole["search"]["units_reused"]
    assert found["search"]["units_computed"] <= whole["search"]["units_computed"] - 12
    assert [each["verified"] for each in found["written"]] == [True]
    loaded = fresh(LOAD, "out", "logits.pt")
    assert loaded.returncode == 0, loaded.stderr
    with masked(load_model(model, "float32"), parse_mask(",".join(found["plan"]["removed"]))) as reduced:
        assert torch.allclose(reduced(PROMPT).logits, torch.load("logits.pt"), atol=1e-4)


@pytest.mark.usefixtures("in_process")
def test_a_folder_is_kept_and_never_replaced_by_another_plan(model, place, say):
    first = done(say(*prune(model, "--out", "out", "--json")))
    written = (place / "out/model.safetensors").stat().st_mtime_ns
    again = done(say(*prune(model, "--out", "out", "--json")))
    assert again["search"]["trials_computed"] == 0 and again["plan"] == first["plan"]
    assert (place / "out/model.safetensors").stat().st_mtime_ns == written
    (place / "mine").mkdir()
    (place / "mine/notes").touch()
    for args in (prune(model, "--out", "out", ratio=0.5), prune(model, "--out", "mine")):
        code, _, err = say(*args)
        assert code == 2 and err.splitlines()[-1].endswith("holds something else; choose another folder, or remove it")
    assert (place / "out/model.safetensors").stat().st_mtime_ns == written and [*(place / "mine").iterdir()] == [
        place / "mine/notes"
    ]


@pytest.mark.usefixtures("in_process")
def test_apply_makes_the_same_checkpoint_from_the_same_base_alone(model, place, say):
    done(say(*prune(model, "--out", "out", "--export", "zeroed", "--json")))
    assert done(say("apply", model, "out", "--out", "again", "--json"))["written"][0]["verified"]
    for path in (place / "out").iterdir():
        if path.name not in ("README.md", "blockpruner_plan.json", "verification.json"):  # they name the folder
            assert path.read_bytes() == (place / "again" / path.name).read_bytes()
    assert load_file("out-zeroed/model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    save_tiny(place / "other", rms_norm_eps=1e-5)
    code, _, err = say("apply", "./other", "out/blockpruner_plan.json", "--out", "third")
    assert code == 2 and "is of another model: its base is" in err and not (place / "third").exists()
    code, _, err = say("apply", model, "absent", "--out", "third")
    assert code == 2 and err.startswith("error: plan 'absent' does not exist")


@pytest.mark.usefixtures("in_process")
def test_compensated_weights_are_kept_and_no_plan_promises_them(model, place, say):
    args = prune(model, "--seq-len", 16, "--out", "out", "--json", ratio="1blocks", method="recommended")
    made = done(say(*args))["plan"]
    assert (made["method"], made["compensate"]) == ("floating", "refit")
    (report,) = (place / "cache/blockpruner/compensated").glob("*/compensate.json")
    before = report.stat().st_mtime_ns
    assert json.loads(report.read_text())["method"] == "refit"
    assert ("compensated without training" in (place / "out/README.md").read_text()) is (
        report.with_name("weights.safetensors").exists()
    )
    done(say(*args))
    assert report.stat().st_mtime_ns == before
    code, _, err = say("apply", model, "out", "--out", "again")
    assert code == 2 and "compensate: refit), which a plan does not hold" in err


@pytest.mark.usefixtures("in_process")
def test_a_dry_run_counts_the_trials_and_leaves_nothing(model, place, say):
    forecast = done(say(*prune(model, "--dry-run", "--json")))
    assert [path.name for path in place.iterdir()] == ["texts.txt"]
    assert forecast["parameters"] == sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert "blocks: 4 MHA + 4 MLP" in say(*prune(model, "--dry-run"))[1]
    exact, faster = (
        done(say(*prune(model, "--dry-run", "--json", method=method)))["hours_h100"]
        for method in ("floating", "recommended")
    )
    assert exact > faster > 0
    found = done(say(*prune(model, "--json")))
    assert found["written"][0]["path"] == str(place / "tiny-0.3")
    if len(found["plan"]["order"]) == forecast["removals"]:  # which it assumes
        assert found["search"]["trials_computed"] == forecast["trials"]


@pytest.mark.usefixtures("in_process")
def test_a_model_of_the_hub_is_asked_for_its_shape_alone_before_it_is_fetched(model, place, say, monkeypatch):
    hub = Hub(model, monkeypatch)
    assert "model: a/tiny, llama, float32" in say(*prune("a/tiny", "--dry-run"))[1]
    assert not [*place.rglob("*.safetensors")]
    assert done(say(*prune("a/tiny", "--json")))["written"][0]["path"] == str(place / "tiny-0.3")
    assert "base_model: a/tiny" in (place / "tiny-0.3/README.md").read_text()
    assert say("chat", "a/tiny", "--prompt", "a", "--max-new-tokens", 1)[0] == 0
    assert hub.asked == [("a/tiny", None)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ratio", "1.5"], "budget '1.5' .* between 0 and 1"),
        (["--unit", "head"], "--unit: .*'block' or 'layer' .*'head'"),
        (["--method", "magic"], "method 'magic' is unknown; valid: recommended, blockpruner, .*greedy"),
        (["--metric", "magic"], "--metric 'magic' is unknown; valid: .*perplexity"),
        (["--compensate", "magic"], "--compensate: .*'refit' .*'magic'"),
        (["--dtype", "int3"], "--dtype: .*'bfloat16'.*'int3'"),
        (["--device", "abacus"], "--device 'abacus' is unknown; valid: auto, cpu"),
        (["--export", "onnx"], "export 'onnx' is unknown; valid: hf, nas, gguf"),
        (["--texts", "absent.txt"], "'absent.txt' does not exist; give a .parquet, .json, .jsonl or .txt file"),
        (["--seq-len", "4096"], "--seq-len 4096 is longer than the model's context of 128"),
    ],
)
def test_a_bad_value_is_named_in_one_line(model, place, say, more, message):
    code, out, err = say(*prune(model), *more)
    assert code == 2 and not out
    assert [line for line in err.splitlines() if line.startswith("error")] == [err.splitlines()[-1]]
    assert re.search(message, err), err


def test_a_bad_model_an_absent_package_and_an_interrupt(place, say, monkeypatch):
    code, _, err = say(*prune("./absent"))
    assert code == 2 and "absent' does not exist or has no config.json" in err
    save_tiny(place / "odd")
    (place / "odd/config.json").write_text('{"model_type": "rnn"}')
    code, _, err = say(*prune("odd"))
    assert code == 2 and "'rnn' is unknown; valid: " in err
    for raised, code, words in (
        (ModuleNotFoundError("", name="gguf"), 2, "error: this needs the package gguf"),
        (KeyboardInterrupt(), 130, "interrupted; scores are kept"),
    ):
        monkeypatch.setattr(Place, "read_run", lambda *args, raised=raised: (_ for _ in ()).throw(raised))
        assert (found := say(*prune("odd")))[0] == code and found[2].startswith(words)


def test_help_loads_no_torch_and_every_command_explains_itself(say):
    code = "import sys; from blockpruner.cli.main import app; app(['--help'], standalone_mode=False)"
    result = fresh(f"{code}; assert not {{'torch', 'transformers'}} & set(sys.modules)")
    assert result.returncode == 0 and "compare" in result.stdout, result.stderr
    for name in ("prune", "apply", "chat", "compare"):
        code, out, err = say(name, "--help")
        assert code == 0 and "Usage" in out and "Traceback" not in out + err
    assert say("--version")[1].strip() == command.__version__
    assert say("prune")[0] == 2


def test_chat_and_compare(model, place, say, monkeypatch):
    """The oracle is a greedy continuation, computed without a cache."""
    dense = load_model(model, "float32")
    ids = tiny_tokenizer()("a few words", return_tensors="pt").input_ids
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, dense(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    text = tiny_tokenizer().decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    code, out, _ = say("chat", model, "--prompt", "a few words", "--max-new-tokens", 5)
    assert code == 0 and out.strip() == text.strip()
    typed = iter(["a few words"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError))
    assert say("chat", model, "--max-new-tokens", 5)[:2] == (0, out)
    code, out, _ = say("compare", model, model, "--prompt", "a few words", "--max-new-tokens", 5)
    assert code == 0 and out.count("tokens/s") == 2
    code, _, err = say("chat", place)
    assert code == 2 and "has no config.json; give a checkpoint's folder" in err
