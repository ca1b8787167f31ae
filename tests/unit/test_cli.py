"""The command `blockpruner`, on tiny models."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from html import unescape
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from statistics import mean

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import ttest_rel
from transformers import AutoModelForCausalLM
from typer import Abort

import blockpruner
from blockpruner import pipeline, splits
from blockpruner.checkpoints import verify_llama_cpp
from blockpruner.cli import doctor, talking
from blockpruner.cli import main as command
from blockpruner.cli.pruning import Command
from blockpruner.cli.pruning import summary as last_words
from blockpruner.core import errors
from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.evaluation import kinds, zero_shot
from blockpruner.healing import choice, train
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model import rates
from blockpruner.model.models import load_model, masked, prune_
from blockpruner.reporting.formats import number
from blockpruner.splits import Rows
from blockpruner.store import files
from blockpruner.store.files import read_json, write_sealed_json
from blockpruner.store.manifest import manifest
from blockpruner.store.plans import load_plan, save_plan
from tests.fakes import Hub, PushHub
from tests.plans import plan_of
from tests.tiny import bos_tokenizer, full_nll, save_tiny, tiny_tokenizer
from tests.unit.zero_shot_items import tables_of, write_tasks

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


def prune(model, *more, budget=0.3, method="blockpruner"):
    return (
        "prune",
        model,
        "--budget",
        budget,
        "--texts",
        "texts.txt",
        "--seq-len",
        32,
        "--method",
        method,
        *more,
    )


def done(result):
    """The object that a command with --json ends with."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def fresh(code, *args):
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False
    )


@pytest.mark.usefixtures("in_process")
def test_a_killed_run_goes_on_and_transformers_loads_the_result(model, place, say):
    killed = fresh(KILLED, *prune(model, "--out", "out"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (place / "out").exists()
    logs = (path.read_text() for path in (place / "cache/blockpruner").glob("*/*.jsonl"))
    kept = {trial for log in logs for trial in re.findall(r'"trial": ?"([^"]*)"', log)}
    resumed, undisturbed = (
        say(*prune(model, "--out", "out", "--json")),
        say(*prune(model, "--out", "whole", "--cache", "elsewhere", "--json")),
    )
    found, whole = done(resumed), done(undisturbed)
    assert (
        f"found {len(kept)} scores of before in {place / 'cache/blockpruner'}"
        in resumed[2].splitlines()
    )
    assert kept and "scores of before" not in undisturbed[2]
    assert (
        found["plan"] == whole["plan"] | {"target": "out"} and found["plan"]["method"] == "greedy"
    )
    assert (
        found["search"]["greedy"]["units_computed"]
        <= whole["search"]["greedy"]["units_computed"] - 12
    )
    assert [each["verified"] for each in found["written"]] == [True]
    loaded = fresh(LOAD, "out", "logits.pt")
    assert loaded.returncode == 0, loaded.stderr
    with masked(
        load_model(model, "float32"), parse_mask(",".join(found["plan"]["removed"]))
    ) as reduced:
        assert torch.allclose(reduced(PROMPT).logits, torch.load("logits.pt"), atol=1e-4)


@pytest.mark.usefixtures("in_process")
def test_a_folder_is_kept_and_never_replaced_by_another_plan(model, place, say):
    first = done(say(*prune(model, "--out", "out", "--json")))
    written = (place / "out/model.safetensors").stat().st_mtime_ns
    again = done(say(*prune(model, "--out", "out", "--json")))
    assert again["search"]["greedy"]["trials_computed"] == 0 and again["plan"] == first["plan"]
    assert (place / "out/model.safetensors").stat().st_mtime_ns == written
    (place / "mine").mkdir()
    (place / "mine/notes").touch()
    for args in (prune(model, "--out", "out", budget=0.5), prune(model, "--out", "mine")):
        code, _, err = say(*args)
        assert (
            code == 2
            and "--out" in err
            and "holds something else; choose another folder" in err.splitlines()[-1]
        )
    assert (place / "out/model.safetensors").stat().st_mtime_ns == written and [
        *(place / "mine").iterdir()
    ] == [place / "mine/notes"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("in_process")
def test_a_command_that_is_told_to_end_leaves_no_half_checkpoint(
    model, place, say, monkeypatch, number
):
    def stop(path):
        if ".out." in str(path):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(files, "sync", stop)
    # the test fails, and does not end, without a handler
    before = signal.signal(number, signal.default_int_handler)
    try:
        code, _, err = say(*prune(model, "--out", "new/out"))
    finally:
        signal.signal(number, before)
    assert code == 128 + number and not [*(place / "new").iterdir()]
    assert err.splitlines()[-1] == "interrupted; scores are kept: run the same command again"


def test_a_command_goes_on_behind_nohup(place, say):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert say("--version")[0] == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("in_process")
def test_the_next_start_removes_what_a_killed_one_left(model, place, say, monkeypatch):
    def die(path):
        if ".out." in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", die)
        if not (child := os.fork()):
            command.main([str(arg) for arg in prune(model, "--out", "new/out")])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = [path for path in (place / "new").rglob("*") if path.is_file()]
    assert {"model.safetensors", "reference.safetensors"} <= {path.name for path in left}
    assert say(*prune(model, "--out", "new/out"))[0] == 0
    assert [path.name for path in (place / "new").iterdir()] == ["out"]


@pytest.mark.usefixtures("in_process")
def test_a_place_goes_by_its_plain_path_and_a_name_of_two_lines_is_refused(model, place, say):
    assert say(*prune(model, "--out", "absent/../out"))[0] == 0
    assert (place / "out/config.json").exists() and not (place / "absent").exists()
    for name in ("a\nb", "a\x1bb", "a\udcffb"):
        code, _, err = say(*prune("no-model", "--out", name))
        assert code == 2 and len(err.splitlines()) == 1 and repr(name) in err, err


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            EOFError("Ran out of input"),
            2,
            "a file is cut short; if it is in the folder of --cache, delete its own",
        ),
        (KeyError("words"), 1, "KeyError: 'words'; the traceback is in "),
        (OSError("odd"), 1, "OSError: odd; the traceback is in "),
        (
            PermissionError(errno.EACCES, "no", "t.txt"),
            2,
            "cannot use t.txt: permission denied; give this user",
        ),
        (
            ImportError(
                "the Trainer requires accelerate>=1.1.0:\nPlease run `pip install"
                " 'accelerate>=1.1.0'`"
            ),
            2,
            "the Trainer requires accelerate>=1.1.0: Please run `pip install 'accelerate>=1.1.0'`",
        ),
        (
            ImportError("cannot import name 'a' from 'b'"),
            1,
            "ImportError: cannot import name 'a' from 'b'; the traceb",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            ),
            2,
            (
                "the memory is used up (DefaultCPUAllocator: can't allocate memory: you tried to"
                " allocate 8 bytes)"
            ),
        ),
        (MemoryError(), 2, "the memory is used up (MemoryError)"),
    ],
)
def test_whatever_fails_ends_in_one_line_and_the_path_of_a_log(
    place, say, monkeypatch, error, code, words
):
    (place / "cache/blockpruner").mkdir(parents=True)
    monkeypatch.setattr(Command, "read_run", failing(error))
    found, _, err = say(*prune("model"))
    assert found == code and len(err.splitlines()) == 1 and err.startswith(f"error: {words}"), err
    if code == 1:
        log = Path(re.search(r"is in (.*\.log);", err)[1])
        assert log.parent == place / "cache/blockpruner" and "in fail" in log.read_text()


def test_a_log_goes_elsewhere_where_the_cache_cannot_be_written(place, say, monkeypatch):
    (place / "cache").touch()
    monkeypatch.setattr(Command, "read_run", failing(KeyError("words")))
    log = Path(re.search(r"is in (.*\.log);", say(*prune("model"))[2])[1])
    assert "in fail" in log.read_text()
    log.unlink()


def test_only_a_command_that_keeps_scores_promises_them(place, say, monkeypatch):
    monkeypatch.setattr(talking, "Talker", failing(KeyboardInterrupt()))
    assert say("chat", place, "--prompt", "x")[::2] == (130, "interrupted\n")


def test_formats_go_by_the_names_of_engines_too(place):
    given = Command(place, "cpu", SilentObserver(), "vLLM,llama.cpp:q4_k_m, gguf:Q5_0,nas")
    assert given.formats == {"hf": (), "gguf": ("Q4_K_M", "Q5_0"), "nas": ()}


@pytest.mark.usefixtures("in_process")
def test_a_quantization_may_be_asked_for_later(model, place, say, monkeypatch):
    monkeypatch.setattr(verify_llama_cpp, "ENGINE", "no_such_engine")
    tool = place / "bin/llama-quantize"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\nfor name; do last=$name; done\ncp model-Q8_0.gguf "model-$last.gguf"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    out, again = place / "out-gguf", place / "again-gguf"
    done(say(*prune(model, "--out", "out", "--export", "gguf", "--json", budget="1blocks")))
    assert (out / "model-F16.gguf").exists() and not (out / "model-Q4_K_M.gguf").exists()
    (out / "README.md").write_text((out / "README.md").read_text() + "My words.")
    later = prune(model, "--out", "out", "--export", "gguf:Q4_K_M", budget="1blocks")
    code, _, err = say(*later)
    assert (
        code == 2
        and "out-gguf was written without model-Q4_K_M.gguf, and nothing is replaced" in err
    )
    assert (out / "README.md").read_text().endswith("My words.")
    shutil.rmtree(out)
    assert say(*later)[0] == 0 and (out / "model-Q4_K_M.gguf").exists()
    code, _, _ = say("apply", model, "out", "--out", "again", "--export", "gguf:Q4_K_M")
    assert code == 0 and (again / "model-Q4_K_M.gguf").exists()


@pytest.mark.usefixtures("in_process")
def test_a_finished_checkpoint_gets_other_formats(model, place, say, monkeypatch):
    """The oracle is the export in one go, of the healed model."""
    monkeypatch.setattr(verify_llama_cpp, "ENGINE", "no_such_engine")
    (place / "texts.txt").write_text(
        "\n".join(f"{i} little words and {i * i} more of them" for i in range(60))
    )
    order = ("--set", "score.options={order: [mlp.0]}", "--compensate", "refit")
    args = prune(model, "--seq-len", 16, *order, budget="1blocks", method="given")
    done(say(*args, "--out", "whole/small", "--export", "nas,gguf", "--json"))
    done(say(*args, "--out", "small", "--json"))
    found = done(say("export", "small", "mlx-lm", "llama.cpp", "--json"))
    assert [Path(each["path"]).name for each in found["written"]] == ["small-nas", "small-gguf"]
    written = (
        "nas/model.safetensors",
        "nas/config.json",
        "nas/README.md",
        "gguf/model-F16.gguf",
        "gguf/README.md",
    )
    for name in written:
        assert (place / f"small-{name}").read_bytes() == (
            place / f"whole/small-{name}"
        ).read_bytes(), name
    assert load_plan(place / "small-nas/blockpruner_plan.json").removed
    assert "| rows held out from refit |" in (place / "small-nas/README.md").read_text()
    for words, message in (
        (("small", "nas"), "is not empty; choose another folder"),
        (("small", "hf"), "is the hf checkpoint itself"),
        (("small-nas/..", "nas"), "there is no plan at"),
        (("small", "onnx"), "onnx"),
        (("small-gguf", "gguf"), "is no hf checkpoint; give the one that it was made of"),
    ):
        code, _, err = say("export", *words)
        assert code == 2 and message in err, err


def test_llama_cpp_takes_the_layers_of_a_plan_out_of_any_file(place, say):
    dense = save_tiny(place / "dense")
    for name, blocks in (
        ("layers", ["mha.1", "mlp.1", "mha.3", "mlp.3"]),
        ("blocks", ["mha.1", "mlp.2"]),
    ):
        save_plan(plan_of(dense, blocks), place / name)
    code, out, err = say("apply", "dense", "layers", "--prune-layers")
    assert (code, out) == (
        0,
        "--prune-layers 1,3\n",
    ) and "llama.cpp counts the layers of Gemma" in err
    code, out, err = say("apply", "dense", "blocks", "--prune-layers")
    assert code == 2 and not out and "does not remove whole layers alone" in err
    code, _, err = say("apply", "dense", "layers")
    assert code == 2 and "--out does not say where" in err


@pytest.mark.usefixtures("in_process")
def test_apply_makes_the_same_checkpoint_from_the_same_base_alone(model, place, say):
    done(say(*prune(model, "--out", "out", "--json")))
    assert done(say("apply", model, "out", "--out", "again", "--json"))["written"][0]["verified"]
    for path in (place / "out").iterdir():
        # they name the folder
        if path.name not in (
            "README.md",
            "blockpruner_plan.json",
            "verification.json",
        ):
            assert path.read_bytes() == (place / "again" / path.name).read_bytes()
    save_tiny(place / "other", rms_norm_eps=1e-5)
    code, _, err = say("apply", "./other", "out/blockpruner_plan.json", "--out", "third")
    assert (
        code == 2 and "is of another model: its base is" in err and not (place / "third").exists()
    )
    code, _, err = say("apply", model, "absent", "--out", "third")
    assert code == 2 and err.startswith("error: there is no plan at 'absent'")


@pytest.mark.usefixtures("in_process")
def test_a_plan_of_channels_says_all(model, place, say):
    """Applied to its model it makes the same weights, and to no other model; nor is it taken where
    it was changed."""
    args = prune(
        model, "--set", "compensate.method=none", "--out", "out", "--json", method="narrow"
    )
    made = done(say(*args))["plan"]
    assert made["details"]["channels"] and not made["removed"]
    assert say("apply", model, "out", "--out", "again")[0] == 0
    assert (place / "again/model.safetensors").read_bytes() == (
        place / "out/model.safetensors"
    ).read_bytes()
    code, _, err = say(
        "apply", save_tiny(place / "wide", intermediate_size=96), "out", "--out", "other"
    )
    assert code == 2 and "the plan is of another model" in err
    code, out, err = say("export", "out", "mlx")
    assert code == 0 and "of the parameters: channels of " in out, err
    page = Path(say("report", "out-mlx")[1].strip()).read_text()
    assert "mlx_lm.server --model" in page and "vllm serve" not in page, (
        "the commands of its own format alone"
    )
    plan = load_plan(place / "out/blockpruner_plan.json")
    fewer = dict([*plan.details["channels"].items()][1:])
    save_plan(replace(plan, details={**plan.details, "channels": fewer}), place / "changed.json")
    code, _, err = say("apply", model, "changed.json", "--out", "other")
    assert code == 2 and "an unchanged plan" in err and not (place / "other").exists()


@pytest.mark.usefixtures("in_process")
def test_compensated_weights_are_kept_and_no_plan_promises_them(model, place, say):
    args = prune(
        model, "--seq-len", 16, "--out", "out", "--json", budget="1blocks", method="recommended"
    )
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
    assert code == 0 and "loses the same parts, but is not healed (refit)" in err
    plain = load_plan(place / "again/blockpruner_plan.json")
    assert plain.compensate == "none" and list(plain.removed) == made["removed"]
    assert "compensated" not in (place / "again/README.md").read_text()


@pytest.mark.usefixtures("in_process")
def test_heal_trains_the_better_model_and_goes_on_after_a_kill(model, place, say, monkeypatch):
    (place / "texts.txt").write_text(
        "\n".join(f"{i} little words and {i * i} more of them" for i in range(300))
    )
    heal = ("--seq-len", 16, "--train", "all", "--out", "out", "--json")
    args = prune(model, *heal, method="recommended", budget=0.2)
    refit = done(
        say(
            *prune(
                model, "--seq-len", 16, "--out", "refit", "--json", method="recommended", budget=0.2
            )
        )
    )

    def die(*given):  # states were saved
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_healed", die)
        assert say(*args)[0] == 130 and not (place / "out").exists()
    result = say(*args)
    made = done(result)
    assert "training goes on after step" in result[2]
    assert made["plan"]["removed"] == refit["plan"]["removed"] and made["plan"]["train"]
    assert made["perplexity"]["compensated"] == refit["perplexity"]["compensated"]
    told = made["perplexity"]["trained"]
    assert told["after"] < told["before"] and told["dense"] > 1
    page = Path(say("report", "out")[1].strip()).read_text()
    shown = re.search(r"rows held out from training</th>\s*(.*?)</tr>", page, re.DOTALL)[1]
    assert [number(told[key]) for key in ("dense", "before", "after")] == re.findall(
        r">([^<>]+)</td>", shown
    )
    assert f"vllm serve {place / 'out'} " in page
    (file,) = (place / "cache/blockpruner/trained").glob("*/weights.safetensors")
    trained, before = load_file(file), file.stat().st_mtime_ns
    models = [
        AutoModelForCausalLM.from_pretrained(place / name, trust_remote_code=True)
        for name in ("refit", "out")
    ]
    first, last = (dict(each.named_parameters()) for each in models)
    changed = {name for name, weight in first.items() if not torch.equal(weight, last[name])}
    assert changed and len(changed) == len(trained)
    assert "then trained (all weights, distilled" in (place / "out/README.md").read_text()
    done(say(*args))
    assert file.stat().st_mtime_ns == before
    assert say(*("lora" if arg == "all" else arg for arg in args))[0] == 2, (
        "the folder holds another model"
    )
    (place / "texts.txt").write_text(
        "\n".join(f"{i} little words and {i * i} more of them" for i in range(20))
    )
    code, _, err = say(*prune(model, "--out", "other", "--seq-len", 16, "--train", "all"))
    assert code == 2 and "of which 8 are held out; give more texts" in err


def test_a_format_that_cannot_hold_the_family_is_refused_before_a_search(place, say):
    other = save_tiny(place / "qwen3", "qwen3")
    for form in ("gguf", "mlx-lm"):
        code, _, err = say(*prune(other, "--out", "out", "--export", form))
        assert (
            code == 2
            and "has no qwen3 models that lack blocks" in err
            and not (place / "cache").exists()
        )
    code, _, err = say(
        *prune(save_tiny(place / "gemma", "gemma3_text"), "--out", "out", "--export", "nas")
    )
    assert code == 2 and "for mlx-lm name mlx" in err, "its window is not what is wrong"
    windowed = save_tiny(place / "windowed", "mistral", sliding_window=6)
    code, _, err = say(*prune(windowed, "--out", "out", "--export", "nas"))
    assert (
        code == 2
        and "has no models with a sliding window (here 6)" in err
        and not (place / "cache").exists()
    )
    (place / "file").touch()
    for more in ((), ("--dry-run",)):
        code, _, err = say(*prune(other, "--out", "file/out", *more))
        assert code == 2 and f"nothing can be written in {place / 'file'}" in err
        assert not (place / "cache/blockpruner/searches").exists()


@pytest.mark.usefixtures("in_process")
def test_training_begins_at_the_compensated_weights(model, place, say, monkeypatch):
    (place / "texts.txt").write_text(
        "\n".join(f"{i} little words and {i * i} more of them" for i in range(300))
    )
    args = prune(
        model, "--seq-len", 16, "--train", "all", "--json", method="recommended", budget=0.2
    )
    fit = choice.compensate

    def another(model, *given, **_):
        """Other weights than the pruned model's, whether or not they help this one."""
        other = {"model.norm.weight": 3 * model.model.norm.weight.detach()}
        return {name: (other, facts) for name, (_, facts) in fit(model, *given).items()}

    before = []
    monkeypatch.setattr(choice, "accepted", lambda found, row_nll, *_: (found, row_nll))
    for wanted in (fit, another):
        monkeypatch.setattr(choice, "compensate", wanted)
        monkeypatch.setenv("XDG_CACHE_HOME", str(place / wanted.__name__))
        before.append(
            done(say(*args, "--out", f"out-{wanted.__name__}"))["perplexity"]["trained"]["before"]
        )
    assert before[0] != pytest.approx(before[1], rel=1e-3)
    card = (place / "out-another/README.md").read_text()
    assert card.index("compensated without training") < card.index("then trained")


@pytest.mark.usefixtures("in_process")
def test_healed_weights_that_are_gone_are_made_again(model, place, say, monkeypatch):
    """A purge of scratch space takes old files one by one."""
    (place / "texts.txt").write_text(
        "\n".join(f"{i} little words and {i * i} more of them" for i in range(300))
    )
    args = prune(
        model,
        "--seq-len",
        16,
        "--train",
        "all",
        "--json",
        "--out",
        "out",
        method="recommended",
        budget=0.2,
    )
    fit = choice.compensate

    def helping(model, *given, **_):
        other = {"model.norm.weight": 3 * model.model.norm.weight.detach()}
        return {
            name: (other, facts | {"share": 1.0}) for name, (_, facts) in fit(model, *given).items()
        }

    monkeypatch.setattr(choice, "compensate", helping)
    monkeypatch.setattr(choice, "accepted", lambda found, row_nll, *_: (found, row_nll))
    done(say(*args))
    whole = load_file(place / "out/model.safetensors")
    for lost in (
        "compensated/*/weights.safetensors",
        "trained/*/weights.safetensors",
        "compensated/*/plan.json",
        "flipped",
    ):
        name = lost if "/" in lost else "trained/*/weights.safetensors"
        (file,) = (
            path for path in (place / "cache/blockpruner").glob(name) if ".bad" not in str(path)
        )
        content = file.read_bytes()
        file.unlink()
        if lost == "flipped":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        shutil.rmtree(place / "out")
        result = say(*args)
        done(result)
        found = load_file(place / "out/model.safetensors")
        assert file.exists() and all(
            torch.equal(found[name], weight) for name, weight in whole.items()
        )
        assert "it is made again" in result[2]


@pytest.mark.parametrize("part", ["search", "fit", "tuning", "judge"])
def test_a_kept_refit_is_of_the_rows_it_was_fitted_to_and_judged_by(model, tmp_path, part):
    command = Command(tmp_path, "cpu", SilentObserver())
    run = command.read_run(str(model), {})
    rows = Rows(CalibrationSet(((1, 2, 3),)))
    other_rows = replace(rows, **{part: CalibrationSet(((1, 2, 4),))})
    dense = command.dense(run)
    key = pipeline.work_key(run, rows, dense, "0.2")
    assert key != pipeline.work_key(run, other_rows, dense, "0.2")


def test_a_dry_run_counts_from_the_shape_and_leaves_nothing(model, place, say):
    found = done(say(*prune(model, "--dry-run", "--json")))
    assert [path.name for path in place.iterdir()] == ["texts.txt"]
    weights = load_file(model / "model.safetensors").values()
    assert found["parameters"] == sum(tensor.numel() for tensor in weights)
    assert found["first_step_masks"] == {"greedy": 8}
    assert found["weights_bytes"] == found["disk_bytes"] == sum(tensor.nbytes for tensor in weights)
    assert found["parameters_to_remove"] == round(0.3 * found["parameters"])
    assert (
        found["memory_bytes"].keys() == {"search"}
        and found["memory_bytes"]["search"] > found["weights_bytes"]
    )
    both = done(
        say(*prune(model, "--dry-run", "--json", "--dtype", "bfloat16", method="recommended"))
    )
    assert both["memory_bytes"].keys() == {"search", "refit"}
    assert both["first_step_masks"] == {}
    assert 2 * both["weights_bytes"] == both["disk_bytes"]
    assert say(*prune(model, "--dry-run", "--texts", "absent.txt"))[0] == 2
    code, _, err = say(*prune(model, "--dry-run", "--out", model))
    assert code == 2 and "is not empty and holds something else" in err
    left = f"{0.7 * found['parameters'] / 1e6:.6f}M"
    named = done(say(*prune(model, "--dry-run", "--json", budget=left)))
    assert named["parameters_to_remove"] == found["parameters_to_remove"]


@pytest.mark.usefixtures("in_process")
def test_a_cpu_that_is_slow_in_16_bits_computes_in_float32_and_writes_the_models_own(
    place, say, monkeypatch
):
    narrow, slow = save_tiny(place / "narrow"), {"float32": 50.0, "bfloat16": 1.0}
    load_model(narrow, "bfloat16").save_pretrained(narrow)
    monkeypatch.setattr(rates, "product_rate", slow.__getitem__)
    code, _, said = say(*prune(narrow, "--out", "out"))
    assert (
        code == 0
        and "bfloat16 is slow on this CPU: float32 is computed in (with --dtype bfloat16 not)"
        in said
    )
    (facts,) = (place / "cache/blockpruner").glob("*/fingerprint.json")
    assert read_json(facts)["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(place / "out/model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((place / "out/config.json").read_text())["dtype"] == "bfloat16"
    slow["bfloat16"] = 50.0  # another measurement: the search that was begun goes on in its dtype
    assert (
        done(say(*prune(narrow, "--out", "again", "--json")))["search"]["greedy"]["units_computed"]
        == 0
    )
    own = done(say(*prune(narrow, "--out", "own", "--dtype", "bfloat16", "--json")))
    assert own["search"]["greedy"]["units_computed"] > 0
    assert "bfloat16" in say(*prune(narrow, "--dry-run", "--cache", "fast"))[1]


@pytest.mark.usefixtures("in_process")
def test_a_model_of_the_hub_is_asked_for_its_shape_alone_before_it_is_fetched(
    model, place, say, monkeypatch
):
    hub = Hub(model, monkeypatch)
    assert "model: a/tiny, llama, float32" in say(*prune("a/tiny", "--dry-run"))[1]
    assert not [*place.rglob("*.safetensors")]
    assert done(say(*prune("a/tiny", "--json")))["written"][0]["path"] == str(place / "tiny-0.3")
    assert "base_model: a/tiny" in (place / "tiny-0.3/README.md").read_text()
    assert say("chat", "a/tiny", "--prompt", "a", "--max-new-tokens", 1)[0] == 0
    assert hub.asked == [("a/tiny", None)]


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--budget", "1.5", False),
        ("--unit", "head", True),
        ("--method", "magic", True),
        ("--metric", "magic", True),
        ("--compensate", "magic", True),
        ("--train", "some", True),
        ("--dtype", "int3", True),
        ("--device", "abacus", True),
        ("--export", "onnx", True),
        ("--export", "vllm:Q4_K_M", False),
        ("--export", "gguf:Q9", False),
        ("--texts", "absent.txt", False),
        ("--seq-len", "4096", True),
    ],
)
def test_a_bad_value_is_named_in_the_last_line(model, place, say, option, value, named):
    code, out, err = say(*prune(model), option, value)
    last = err.splitlines()[-1]
    assert (
        code == 2 and not out and last.startswith("error: ") and value.partition(":")[2] in last
    ), err
    assert not named or last.endswith(f"(here: {option})"), err


@pytest.fixture
def asked(monkeypatch):
    """The place and the run of each command, which ends there."""
    found = []

    def read(place, *given, **more):
        found.append((place, read_run(place, *given, **more)))
        raise KeyboardInterrupt

    read_run = Command.read_run
    monkeypatch.setattr(Command, "read_run", read)
    return found


@pytest.mark.usefixtures("place")
def test_every_setting_has_a_way_in(model, say, asked):
    def run(*more):
        code, _, err = say(*prune(model), *more)
        assert code == 130, err
        return asked[-1]

    sets = (
        "calibration.split=all",
        "calibration.num_rows=3",
        "score.options={per: kv}",
        "evaluate.speed=null",
        "model.dtype=bfloat16",
        "compensate.seed=7",
        "runtime.batch_tokens=64",
        "export=[hf, nas]",
    )
    place, found = run(*(word for text in sets for word in ("--set", text)))
    assert (found.calibration.num_rows, found.score.options, found.evaluate.speed) == (
        3,
        {"per": "kv"},
        None,
    )
    assert (found.model.dtype, found.compensate.seed, found.export) == (
        "bfloat16",
        7,
        ("hf", "nas"),
    )
    assert found.calibration.data.path == "texts.txt" and place.runtime_settings.batch_tokens == 64
    place, _ = run("--workers", 3)
    assert (place.runtime_settings.executor, place.runtime_settings.workers) == ("ray", 3)
    assert run("--streaming")[0].runtime_settings.streaming
    given = ("prune", model, "--budget", 0.3, "--dataset")
    assert say(*given, "someone/texts:test")[0] == say(*given, "someone/texts")[0] == 130
    for (_, one), split in zip(asked[-2:], ("test", "train"), strict=True):
        own = one.calibration.data.of[0]
        assert (own.repo, own.split) == ("someone/texts", split)
        assert one.calibration.split == "all"
    Path("mine.yaml").write_text(
        f"model: {{source: path, path: {model}}}\ncalibration: {{data: {{source: path, path:"
        " t.txt}, num_samples: 5}"
    )
    code, _, err = say(
        "prune", "--config", "mine.yaml", "--budget", 0.3, "--seq-len", 16, "--method", "random"
    )
    assert code == 130, err
    wanted = asked[-1][1]
    assert (wanted.calibration.num_samples, wanted.calibration.seq_len, wanted.score.method) == (
        5,
        16,
        "random",
    )
    assert (wanted.calibration.split, wanted.calibration.data.path, wanted.model.dtype) == (
        "paper",
        "t.txt",
        "float32",
    )
    code, _, err = say(
        "prune",
        "--config",
        "mine.yaml",
        "--budget",
        0.3,
        "--train",
        "all",
        "--set",
        "export=nas,gguf",
    )
    assert code == 130, err
    assert (asked[-1][1].train.data.path, asked[-1][1].export) == ("t.txt", ("hf", "nas", "gguf"))


@pytest.mark.parametrize(
    ("more", "words", "here"),
    [
        (("--set", "calibration.sed=3"), "calibration.sed: Extra inputs", "--set calibration.sed="),
        (("--set", "train.batch=x", "--train", "all"), "valid integer", "--set train.batch="),
        (("--set", "runtime.workers=2"), "executor", ""),
        (("--set", "calibration"), "KEY=VALUE", ""),
        (("--set", "runtime=ray"), "runtime.NAME=VALUE", ""),
        (("--config", "."), "cannot be read: Is a directory", ""),
        (("--set", "score.options=[a"), "not valid YAML", ""),
        (("--set", "targets.x=1"), "targets: Extra inputs", ""),
        (("--revision", "v1"), "model.path.revision: Extra", "--revision"),
        (("--dataset", "a/b"), "--texts and --dataset", ""),
        (("--texts", "."), "text file '.' is no file", ""),
        (("--texts", "empty.txt"), "text file 'empty.txt' holds no text", ""),
        (
            ("--budget", "0.0000001M"),
            "'0.0000001M' is what is left; give less than the model's",
            "",
        ),
        (("--config", "absent.yaml"), "absent.yaml does not exist", ""),
        (
            ("--set", "calibration.score=response"),
            "calibration.score: response",
            "--set calibration.score=",
        ),
        (
            ("--method", "recommended", "--unit", "block"),
            "method: recommended, whose units are block, layer",
            "--unit",
        ),
        (
            ("--method", "shortgpt", "--unit", "block"),
            "method: shortgpt, whose units are layer",
            "--unit",
        ),
    ],
)
def test_what_is_refused_is_named_as_the_command_calls_it(model, place, say, more, words, here):
    (place / "empty.txt").write_text(" \n")
    code, out, err = say(*prune(model, "--set", "calibration.split=all"), *more)
    assert code == 2 and not out and words in err and (not here or here in err.splitlines()[-1]), (
        err
    )
    assert not (place / "0.3").exists() and "(here: )" not in err


@pytest.mark.usefixtures("in_process")
def test_no_command_uses_a_damaged_checkpoint_of_ours(model, place, say):
    """One bit of a weight is changed after the export was verified."""
    done(say(*prune(model, "--out", "out", "--json")))
    uses = (
        ("chat", "out", "--prompt", "a"),
        ("compare", model, "out", "--prompt", "a"),
        ("compare", model, "out", "--texts", "texts.txt", "--seq-len", 16),
        ("eval", "out", "--tasks", "piqa", "--items", "."),
    )
    assert say(*uses[0], "--max-new-tokens", 1)[0] == 0
    content = bytearray((place / "out/model.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "out/model.safetensors").write_bytes(content)
    for use in uses:
        code, out, err = say(*use)
        assert (code, out) == (
            2,
            "",
        ) and "out is not what was verified: model.safetensors changed" in err, use


def test_the_end_of_a_file_is_not_taken_for_the_end_of_typing(model, place, say, monkeypatch):
    """As torch and gzip report a file that is cut short."""

    def load(*_):
        raise EOFError("Ran out of input")

    monkeypatch.setattr(talking, "load_model", load)
    code, _, err = say("eval", model, "--tasks", "piqa", "--items", items(place))
    assert code == 2 and "Aborted" not in err
    assert err.splitlines()[-1].startswith(
        "error: a file is cut short; if it is in the folder of --cache, delete"
    )


@pytest.mark.usefixtures("place")
def test_a_revision_and_an_address_of_the_hub(model, say, asked, monkeypatch):
    hub = Hub(model, monkeypatch)
    for words in (
        ("a/tiny@v1",),
        ("a/tiny", "--revision", "v1"),
        ("hf://a/tiny@v1",),
        ("https://huggingface.co/a/tiny@v1",),
    ):
        code, _, err = say("prune", *words, "--budget", 0.3)
        assert code == 130, err
        assert (asked[-1][1].model.repo, asked[-1][1].model.revision) == ("a/tiny", "v1")
    assert {*hub.asked} == {("a/tiny", "v1")}
    assert (
        say("prune", "a/tiny@refs/pr/1", "--budget", 0.3)[0] == 130
        and asked[-1][1].model.revision == "refs/pr/1"
    )


def test_a_quantized_base_is_refused_from_its_config(place, say):
    path = save_tiny(place / "packed") / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))
    code, _, err = say("prune", "packed", "--budget", 0.3, "--dry-run")
    assert code == 2 and "quantized (fp8)" in err and "quantize the result" in err


def test_chat_records_go_through_the_template(place, say, monkeypatch):
    save_tiny(place / "chatty")
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    )
    tokenizer.save_pretrained(place / "chatty")
    turns = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * 9}]
        for i in range(40)
    ]
    (place / "chat.jsonl").write_text(
        "".join(json.dumps({"messages": one}) + "\n" for one in turns)
    )
    found = []
    monkeypatch.setattr(splits, "calibrate", lambda *given, **_: found.append(given[3]) or 1 / 0)
    with pytest.raises(SystemExit):
        command.main(["prune", "chatty", "--budget", "0.3", "--texts", "chat.jsonl"])
    own = [text for text in found[0].search if text.kind.name == "chat.jsonl"]
    assert own == [f"[user] say {i} [assistant] {f'{i} ' * 9} " for i in range(40)], (
        "and one BOS in a row"
    )
    tiny_tokenizer().save_pretrained(place / "chatty")
    (place / "chatty/chat_template.jinja").unlink(missing_ok=True)
    code, _, err = say(
        "prune", "chatty", "--budget", 0.3, "--texts", "chat.jsonl", "--cache", "other"
    )
    assert code == 2 and "no chat template" in err


def test_a_bad_model_an_absent_package_and_an_interrupt(place, say, monkeypatch):
    for words in (prune("./absent"), prune("absent.gguf"), ("chat", "texts.txt")):
        assert say(*words)[0] == 2
    missing = (
        "there is no folder 'modles/tiny' here, and hub repository 'modles/tiny' cannot be used:"
        " HF_HUB_OFFLINE"
    )
    for words in (
        prune("modles/tiny"),
        ("chat", "modles/tiny"),
        ("apply", "modles/tiny", "p", "--out", "o"),
    ):
        code, _, err = say(*words)
        assert code == 2 and missing in err
    (save_tiny(place / "odd") / "config.json").write_text('{"model_type": "rnn"}')
    code, _, err = say(*prune("odd"))
    assert code == 2 and "'rnn' is unknown; valid: " in err
    for raised, code, words in (
        (ModuleNotFoundError("", name="gguf"), 2, "error: this needs the package gguf"),
        (KeyboardInterrupt(), 130, "interrupted; scores are kept"),
    ):
        monkeypatch.setattr(
            Command, "read_run", lambda *args, raised=raised, **_: (x for x in ()).throw(raised)
        )
        assert (found := say(*prune("odd")))[0] == code and found[2].startswith(words)


def test_help_loads_no_torch_and_every_command_explains_itself(say):
    code = (
        "import sys; from blockpruner.cli.main import app; app(['--help'], standalone_mode=False)"
    )
    result = fresh(f"{code}; assert not {{'torch', 'transformers'}} & set(sys.modules)")
    assert result.returncode == 0 and "compare" in result.stdout, result.stderr
    for name in ("prune", "apply", "push"):
        assert "Usage" in say(name, "--help")[1]
    assert say("--version")[1].strip() == command.__version__
    assert say("prune")[0] == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "[]", "config.json is no JSON object"),
        ("config.json", '{"model_type": null}', "model_type: Input should be a valid string"),
        (
            "adapter_config.json",
            '{"peft_type": "LORA", "base_model_name_or_path": "x"}',
            "cannot be loaded",
        ),
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "chat template refuses the turns"),
        ("model.safetensors", None, "cannot be loaded"),
    ],
)
def test_a_strangers_folder_is_refused_in_one_line(model, place, say, name, content, words):
    shutil.copytree(model, place / "odd")
    if content is None:  # a shard without an index
        (place / "odd" / name).rename(place / "odd/model-00001-of-00002.safetensors")
    else:
        (place / "odd" / name).write_text(content)
    code, _, err = say("chat", "odd", "--prompt", "hi", "--max-new-tokens", 1)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1


@pytest.mark.usefixtures("in_process")
def test_a_strangers_checkpoint_is_refused_in_one_line(model, place, say):
    done(say(*prune(model, "--out", "out", "--json")))
    plan = read_json(place / "out/blockpruner_plan.json")

    def refusal(command, name, content):
        """What a command answers where everything is verified, and one file is odd."""
        shutil.rmtree(place / "odd", ignore_errors=True)
        shutil.copytree(place / "out", place / "odd")
        path = place / "odd" / name
        path.write_text(content) if isinstance(content, str) else write_sealed_json(path, content)
        report = read_json(place / "out/verification.json")
        write_sealed_json(
            place / "odd/verification.json", report | {"manifest": manifest(place / "odd")}
        )
        code, _, err = say(*command.split())
        assert code == 2
        return err.strip().splitlines()[-1]

    no_dense = plan | {"calibration": plan["calibration"] | {"dense_perplexity": 0}}
    assert "calibration.dense_perplexity is 0" in refusal(
        "report odd", "blockpruner_plan.json", no_dense
    )
    assert "words: Field required" in refusal(
        "report odd", "blockpruner_healed.json", '{"datasets": []}'
    )
    assert "no JSON object" in refusal("export odd nas", "blockpruner_healed.json", "[]")
    assert "model_type: Field required" in refusal("export odd nas", "config.json", "{}")
    assert "base_model is ['a']" in refusal(
        "export odd nas", "README.md", "---\nbase_model: [a]\n---\n"
    )
    assert "no valid YAML" in refusal(
        "export odd nas", "README.md", "---\nlicense: !!python/name:os.system\n---\n"
    )


def test_chat_and_compare(model, place, say, monkeypatch):
    """The oracle is a greedy continuation, computed without a cache."""
    dense = load_model(model, "float32")
    ids = tiny_tokenizer()("a few words", return_tensors="pt").input_ids
    expected = ids
    for _ in range(5):
        expected = torch.cat(
            [expected, dense(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
        )
    text = tiny_tokenizer().decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    code, out, _ = say("chat", model, "--prompt", "a few words", "--max-new-tokens", 5)
    assert code == 0 and out.strip() == talking.printable(text.strip())
    code, _, err = say("chat", model, "--prompt", "")
    assert code == 2 and "the prompt has no token" in err
    typed = iter([" ", "a few words"])
    monkeypatch.setattr(
        "builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError)
    )
    assert say("chat", model, "--max-new-tokens", 5)[:2] == (0, out)
    code, out, _ = say("compare", model, model, "--prompt", "a few words", "--max-new-tokens", 5)
    assert code == 0 and out.count("parameters") == 2 and "tokens/s" not in out, (
        "one timing of one answer is no speed"
    )
    both = done(
        say("compare", model, model, "--prompt", "a few words", "--max-new-tokens", 5, "--json")
    )
    assert [one["answer"] for one in both] == [text.strip()] * 2
    assert both[0]["parameters"] == dense.num_parameters() and "tokens_per_second" not in both[0]
    assert say("compare", model, model)[0] == say("chat", place)[0] == 2
    shutil.copy(model / "config.json", place)
    code, _, err = say("chat", place, "--prompt", "x")
    assert code == 2 and "has no safetensors" in err


def test_names_and_answers_are_shown_as_text(model, place, say, monkeypatch, capsys):
    """Neither as markup, in which "[/x]" ends nothing, nor as orders to the terminal."""
    said = "a \x1b]0;title\x07b\x9b31m\nc"
    monkeypatch.setattr(talking.Talker, "answer", lambda *_, **__: said)
    shutil.copytree(model, place / (odd := "m[/x]\x1b[31m:smile:"))
    code, out, err = say("compare", odd, odd, "--prompt", "x")
    assert code == 0 and "m[/x]" in out and ":smile:" in out, err
    talking.Streamer(tiny_tokenizer()).on_finalized_text(f"{said} é👩‍💻\t", stream_end=True)
    out += capsys.readouterr().out
    assert "é👩‍💻\t" in out and not {"\x1b", "\x07", "\x9b"} & set(out)


def test_compare_measures_perplexity_on_the_same_rows(model, place, say, monkeypatch):
    """The oracle is a full forward pass of each model."""
    (place / "heldout.txt").write_text(" ".join(f"other words {i}" for i in range(20)))
    done(say(*prune(model, "--out", "pruned", "--json")))
    given = ("compare", model, "pruned", "--texts", "heldout.txt", "--max-rows", 3)
    first, second = done(say(*given, "--seq-len", 16, "--json"))
    ids = tiny_tokenizer()((place / "heldout.txt").read_text()).input_ids
    rows = [ids[i : i + 16] for i in (0, 16, 32)]
    dense = load_model(model, "float32")
    pruned = prune_(
        load_model(model, "float32"), load_plan(place / "pruned/blockpruner_plan.json").mask
    )
    a, b = ([full_nll(each, row) for row in rows] for each in (dense, pruned))
    assert [first["perplexity"], second["perplexity"]] == pytest.approx(
        [math.exp(mean(a)), math.exp(mean(b))], rel=1e-5
    )
    low, high = ttest_rel(b, a).confidence_interval(0.95)
    assert second["interval"] == pytest.approx([math.exp(low), math.exp(high)], rel=1e-4)
    assert second["relative"] == pytest.approx(second["perplexity"] / first["perplexity"])
    assert first["relative"] is first["answer"] is None
    code, out, _ = say(*given, "--seq-len", 16)
    assert code == 0 and out.count("held-out perplexity") == 2 and "of the first" in out
    records = [
        {"text": (place / "heldout.txt").read_text(), "kind": "a", "share": 1},
        {"text": "b " * 99, "kind": "b", "share": 1},
    ]
    (place / "mix.json").write_text(json.dumps(records))
    mixed = ("compare", model, "pruned", "--texts", "mix.json", "--max-rows", 3, "--seq-len", 16)
    alone, both = done(say(*mixed, "--json"))
    assert alone["kinds"]["a"] == {
        "perplexity": first["perplexity"],
        "relative": 1,
        "interval": [1, 1],
    }
    assert both["kinds"]["a"] == {
        key: second[key] for key in ("perplexity", "relative", "interval")
    }
    low, high = second["interval"]
    code, out, _ = say(*mixed)
    assert code == 0 and f"[{low:.2f}, {high:.2f}]" in out and {*both["kinds"]} == {"a", "b"}
    short = save_tiny(place / "short", max_position_embeddings=64)
    both = done(say("compare", model, short, "--texts", "heldout.txt", "--json"))
    long = [full_nll(dense, ids[i : i + 64]) for i in range(0, len(ids) - 63, 64)]
    assert both[0]["perplexity"] == pytest.approx(math.exp(mean(long)), rel=1e-5), (
        "rows fit into both contexts"
    )
    others = iter([tiny_tokenizer(), lambda text, **_: {"input_ids": ids[::-1]}])
    monkeypatch.setattr(talking, "load_tokenizer", lambda folder: next(others))
    code, _, err = say(*given)
    assert code == 2 and "pruned has another tokenizer than" in err


def test_the_loss_of_each_kind_of_text_is_told_wherever_the_model_is_shown(
    model, place, say, monkeypatch
):
    """The oracle is a full forward pass over the rows that judged. Every loss is uneven here."""
    texts = [
        f"{kind}{i} little words and {i * i} {kind} more of them"
        for i in range(300)
        for kind in "ab"
    ]
    records = [{"text": text, "kind": text[0], "share": 1} for text in texts]
    (place / "mix.json").write_text(json.dumps(records))
    calibrate, found = splits.calibrate, []
    monkeypatch.setattr(kinds, "UNEVEN", 0)
    monkeypatch.setattr(
        splits,
        "calibrate",
        lambda *given, **more: found.append(calibrate(*given, **more)) or found[-1],
    )
    args = (
        "prune",
        model,
        "--budget",
        0.33,
        "--texts",
        "mix.json",
        "--seq-len",
        16,
        "--out",
        "out",
    )
    result = say(*args, "--json")
    told = done(result)["plan"]["kinds"]
    judge = found[0].judge
    pruned = AutoModelForCausalLM.from_pretrained(place / "out", trust_remote_code=True)
    models = {"dense": load_model(model, "float32"), "after": pruned}
    assert told.keys() == {*judge.kinds} == {"a", "b", "tales", "code", "Python's library"}
    for kind, facts in told.items():
        rows = [row for row, own in zip(judge.rows, judge.kinds, strict=True) if own == kind]
        expected = {
            key: math.exp(mean(full_nll(each, row) for row in rows)) for key, each in models.items()
        }
        assert facts == pytest.approx(expected, rel=1e-4)
    card, out = (place / "out/README.md").read_text(), say(*args)[1]
    page = Path(say("report", "out")[1].strip()).read_text()
    for kind, facts in told.items():
        dense, after = facts["dense"], facts["after"]
        lost = f"{kind}: {dense:,.2f} dense, {after:,.2f} after, {after / dense:.2f} times"
        assert (
            f"- {lost}" in card
            and f"texts set aside, {lost}" in out
            and lost.partition(": ")[2] in page
        )
    assert all("lost most: " in shown for shown in (card, out, page, result[2]))


def test_json_has_no_infinity(model, place, say, monkeypatch):
    """Which no parser but Python's reads."""
    one = talking.Compared("m", 1, perplexity=math.inf, relative=1.5, interval=(0.0, math.inf))
    monkeypatch.setattr(talking, "compared", lambda *_: [one])
    (found,) = done(say("compare", model, model, "--prompt", "x", "--json"))
    assert (found["perplexity"], found["relative"], found["interval"]) == (None, 1.5, [0.0, None])


def test_a_note_names_a_key_as_the_command_does(place, say, monkeypatch):
    """The rows of the paper's draw have no BOS."""
    bos_tokenizer().save_pretrained(save_tiny(place / "bos"))
    (place / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in TEXTS.split("\n"))
    )
    monkeypatch.setattr(pipeline, "score", lambda *_: (_ for _ in ()).throw(InputError("enough")))
    sets = ("calibration.split=paper", "calibration.num_rows=null", "calibration.num_samples=3")
    code, _, err = say(
        *prune(
            "bos", "--texts", "texts.jsonl", *(part for each in sets for part in ("--set", each))
        )
    )
    assert (
        code == 2
        and "set calibration.split: all" in err
        and "(here: --set calibration.split=VALUE)" in err
    )


def items(place):
    (place / "items").mkdir()
    pq.write_table(tables_of("piqa")["validation"], place / "items/piqa_validation.parquet")
    return "items"


def test_eval_prints_what_the_benchmarks_of_the_library_score(model, place, say):
    given = ("eval", model, "--tasks", "piqa", "--items", items(place))
    found = done(say(*given, "--json"))
    expected = zero_shot.evaluate(
        load_model(model, "float32"), tiny_tokenizer(), "piqa", write_tasks(place / "tasks")
    )
    assert found == {"piqa": expected.scores}
    code, out, _ = say(*given, "--limit", 1)
    assert code == 0 and out.startswith("piqa: acc")
    code, _, err = say("eval", model, "--tasks", "piqua")
    assert code == 2 and "'piqua' is unknown" in err and "(here: --tasks)" in err


def test_code_of_others_is_not_run_and_not_needed_for_a_known_family(place, say):
    """As in Phi-3's folders, whose config names a class of its own."""
    save_tiny(place / "phi", "phi3", pad_token_id=0)
    plain = say("chat", "phi", "--prompt", "a few words", "--max-new-tokens", 3)
    config = json.loads((place / "phi/config.json").read_text())
    code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (place / "phi/theirs.py").write_text("open('ran', 'w')\n")
    (place / "phi/config.json").write_text(json.dumps(config | {"auto_map": code}))
    assert (
        plain[0] == 0
        and say("chat", "phi", "--prompt", "a few words", "--max-new-tokens", 3)[:2] == plain[:2]
    )
    for other in ("rnn", "phi3_blockpruned"):
        (place / "phi/config.json").write_text(
            json.dumps(config | {"auto_map": code, "model_type": other})
        )
        end, _, err = say("chat", "phi", "--prompt", "a", "--max-new-tokens", 1)
        assert (
            end == 2
            and "code that is not the installed blockpruner's" in err
            and "it is not run" in err
        )
    assert not (place / "ran").exists()


@pytest.mark.usefixtures("in_process")
def test_the_report_is_one_file_that_tells_what_the_plan_holds(model, place, say):
    folder = place / "an out"
    done(say(*prune(model, "--out", folder, "--json")))
    code, out, err = say("report", folder)
    assert code == 0, err
    page = unescape(Path(out.strip()).read_text())
    plan = load_plan(folder / "blockpruner_plan.json")
    assert page.count("data:image/svg") == 1 and f"blockpruner compare MODEL '{folder}'" in page
    assert f"blockpruner chat '{folder}'" in page
    assert "Verified by transformers" in page
    assert f"{100 * plan.ratio:.1f} % of the parameters removed" in page
    assert f"{plan.calibration['perplexity']:,.0f}" in page
    (folder / "config.json").write_text("{}")
    code, _, err = say("report", folder)
    assert code == 2 and "is not what was verified: config.json changed" in err


@pytest.mark.usefixtures("in_process")
def test_what_the_api_saves_is_taken_by_every_command(model, place, say):
    (place / "heldout.txt").write_text(" ".join(f"other words {i}" for i in range(20)))
    (place / "plain.safetensors").touch()  # is not the model's
    loaded = AutoModelForCausalLM.from_pretrained(model)
    pruned = blockpruner.prune(
        loaded, tiny_tokenizer(), TEXTS.split("\n"), 0.3, seq_len=32, method="greedy"
    )
    loaded.generation_config.eos_token_id = [7, 8]
    pruned.save("out")
    assert read_json(place / "out/generation_config.json")["eos_token_id"] == [
        7,
        8,
    ], "not those of the dense folder"
    assert say("report", "out")[0] == 0
    assert (
        "model.safetensors" in done(say("push", "out", "me/small", "--dry-run", "--json"))["files"]
    )
    code, _, err = say("apply", model, "out", "--out", "again")
    assert code == 0 and (place / "again/model.safetensors").exists(), err
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.5)
    blockpruner.prune(
        changed, tiny_tokenizer(), TEXTS.split("\n"), "1blocks", seq_len=32, method="greedy"
    ).save("b")
    code, _, err = say("apply", model, "b", "--out", "c")
    assert code == 2 and "does not name its base model" in err


@pytest.mark.usefixtures("in_process")
def test_push_shows_and_asks_before_anything_is_uploaded(model, place, say, monkeypatch):
    """What may be uploaded is tested in test_hub."""
    done(say(*prune(model, "--out", "out", "--json")))
    hub = PushHub(monkeypatch)
    found = done(say("push", "out", "me/small", "--dry-run", "--json"))
    assert found["private"] is True and found["repo"] == "me/small"
    assert set(found["files"]) == {path.name for path in (place / "out").iterdir()}
    assert found["files"]["model.safetensors"] == (place / "out/model.safetensors").stat().st_size
    assert say("push", "out", "me/small")[0] == 2, "there is no terminal to ask on"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: (_ for _ in ()).throw(Abort))
    code, _, err = say("push", "out", "me/small")
    assert code == 1 and "to the private repository me/small" in err and "model.safetensors" in err
    assert hub.calls == []
    assert (
        done(say("push", "out", "me/small", "--yes", "--json"))["commit"]
        == "https://hub.invalid/me/small/commit/1"
    )
    (source,) = (place / "cache/blockpruner/cache/models").glob("*/blockpruner_source.json")
    facts = read_json(source) | {"licence": {"license": "llama2"}}
    write_sealed_json(source, facts)
    assert say("push", "out", "me/small", "--dry-run")[0] == 2, (
        "the card lacks the base model's licence"
    )
    (place / "cache/blockpruner/cache/models/.left.01234567.tmp").mkdir()
    (place / "cache/blockpruner/cache/models/cut").mkdir()
    (place / "cache/blockpruner/cache/models/1.bad").mkdir()
    (place / "cache/blockpruner/cache/models/1.bad/blockpruner_source.json").write_text("{")
    write_sealed_json(source, facts | {"identity": "another model's"})
    assert say("push", "out", "me/small", "--dry-run")[0] == 0
    (place / "out/README.md").unlink()
    code, _, err = say("push", "out", "me/small", "--dry-run")
    assert code == 2 and "out has no README.md" in err


@pytest.mark.parametrize(
    ("train", "package", "fix"), [("all", "accelerate", "'.'"), ("lora", "peft", "'.[train]'")]
)
def test_a_package_that_training_needs_is_asked_for_before_the_search(
    model, place, say, monkeypatch, train, package, fix
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for more in (["--dry-run"], []):
        code, _, err = say(*prune(model, "--train", train, "--out", "out", *more))
        assert (
            code == 2
            and err.count("\n") == 1
            and f"needs the package {package}" in err
            and f"pip install {fix}" in err
        )
    with pytest.raises(InputError, match=f"needs the package {package}"):
        blockpruner.prune(
            load_model(model, "float32"),
            tiny_tokenizer(),
            [TEXTS],
            0.3,
            train=train,
            cache=place / "cache",
        )
    assert not (place / "out").exists() and not list(place.rglob("*.jsonl")), "nothing was searched"


def test_doctor_names_what_is_missing_and_what_mends_it(place, say, monkeypatch):
    checks = {check["name"]: check for check in done(say("doctor", "--json"))}
    assert checks["torch"]["verdict"] == "ok" and checks["torch"]["present"] == metadata.version(
        "torch"
    )
    assert checks["cache"]["present"].startswith(str(place / "cache/blockpruner"))
    hub, disk = place / "hub", shutil.disk_usage(place)
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(
        doctor.shutil,
        "disk_usage",
        lambda path: disk._replace(free=2**20 if path == hub else disk.free),
    )
    hub.mkdir()
    code, out, _ = say("doctor", "--json")
    (downloads,) = (check for check in json.loads(out) if check["name"] == "downloads")
    assert (code, downloads["verdict"]) == (0, "optional"), "the models may be there"
    assert str(hub) in downloads["problem"] and "HF_HOME" in downloads["problem"]
    hub.rmdir()
    known, absent = doctor.version, {"ray": "", "typer": "0.1"}

    def version(name):
        if absent.get(name) == "":
            raise PackageNotFoundError
        return absent.get(name) or known(name)

    monkeypatch.setattr(doctor, "version", version)
    code, out, _ = say("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert (
        code == 1
        and checks["typer"]["verdict"] == "missing"
        and checks["ray"]["verdict"] == "optional"
    )
    advice = str(errors.missing("ray", "ray")).partition("not installed: ")[2]
    assert checks["ray"]["problem"].endswith(f": {advice}"), "the same as where it is imported"
    floor = next(line for line in metadata.requires("blockpruner") if line.startswith("typer"))
    assert (
        checks["typer"]["problem"]
        == f"0.1 is not {floor[5:]}: in a clone of blockpruner, pip install '.'"
    )
    assert say("doctor", "--cache", "texts.txt/inner")[0] == 1


def test_the_end_of_a_run_says_what_was_not_fitted(tmp_path):
    plan = {
        "ratio": 0.1,
        "order": ["mha.1"],
        "calibration": {},
        "train": False,
        "compensate": "none",
    }
    found = {"plan": plan, "taken_out": "1 MHA", "written": []}
    assert "no weight was fitted again" in last_words(found)
    fitted = last_words(
        found | {"perplexity": {"compensated": {"before": 4.0, "after": 3.0, "dense": 2.0}}}
    )
    assert "4.00 -> 3.00, dense 2.00 (1.50 times)" in fitted and "no weight" not in fitted
    (tmp_path / "config.json").write_text('{"model_type": "nemotron-nas"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="format nas, which transformers does not load"):
        talking.config_of(tmp_path)
