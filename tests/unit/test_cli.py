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
def workdir(tmp_path, monkeypatch):
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


def ended(result):
    """The object that a command with --json ends with."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def answer(say):
    return lambda *args: ended(say(*args, "--json"))


@pytest.fixture
def refused(say):
    def run(message, *args):
        """Standard error of a command that ends with a refusal."""
        code, _, err = say(*args)
        assert code == 2, err
        assert message in err, err
        return err

    return run


def write_texts(folder, count):
    """Give the model more rows than TEXTS has."""
    texts = (f"{i} little words and {i * i} more of them" for i in range(count))
    (folder / "texts.txt").write_text("\n".join(texts))


def pruned_and_trained(model, *extra):
    """The recommended method and the training of all weights, on short rows."""
    options = ("--seq-len", 16, "--train", "all", *extra)
    return prune(model, *options, method="recommended", budget=0.2)


@pytest.fixture
def fit_is_other_weights(monkeypatch):
    """Compensation that yields other weights than the pruned model's, accepted though they do not help."""
    compensate = choice.compensate

    def other_fit(model, *args, **_):
        weights = {"model.norm.weight": 3 * model.model.norm.weight.detach()}
        fitted = compensate(model, *args)
        return {name: (weights, facts | {"share": 1.0}) for name, (_, facts) in fitted.items()}

    monkeypatch.setattr(choice, "accepted", lambda fitted, row_nll, *_: (fitted, row_nll))
    monkeypatch.setattr(choice, "compensate", other_fit)
    return compensate


def fresh(code, *args):
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False
    )


@pytest.mark.usefixtures("in_process")
def test_a_killed_run_goes_on_and_transformers_loads_the_result(model, workdir, say):
    killed = fresh(KILLED, *prune(model, "--out", "out"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (workdir / "out").exists()
    logs = (path.read_text() for path in (workdir / "cache/blockpruner").glob("*/*.jsonl"))
    saved = {trial for log in logs for trial in re.findall(r'"trial": ?"([^"]*)"', log)}
    resumed = say(*prune(model, "--out", "out", "--json"))
    undisturbed = say(*prune(model, "--out", "whole", "--cache", "elsewhere", "--json"))
    report, complete = ended(resumed), ended(undisturbed)
    cache = workdir / "cache/blockpruner"
    assert saved
    assert f"found {len(saved)} scores of before in {cache}" in resumed[2].splitlines()
    assert "scores of before" not in undisturbed[2]
    assert report["plan"] == complete["plan"] | {"target": "out"}
    assert report["plan"]["method"] == "greedy"
    computed, all_units = (run["search"]["greedy"]["units_computed"] for run in (report, complete))
    assert computed <= all_units - 12
    assert [checkpoint["verified"] for checkpoint in report["written"]] == [True]
    loaded = fresh(LOAD, "out", "logits.pt")
    assert loaded.returncode == 0, loaded.stderr
    removed = parse_mask(",".join(report["plan"]["removed"]))
    with masked(load_model(model, "float32"), removed) as reduced:
        assert torch.allclose(reduced(PROMPT).logits, torch.load("logits.pt"), atol=1e-4)


@pytest.mark.usefixtures("in_process")
def test_a_folder_is_kept_and_never_replaced_by_another_plan(model, workdir, refused, answer):
    first = answer(*prune(model, "--out", "out"))
    written = (workdir / "out/model.safetensors").stat().st_mtime_ns
    repeated = answer(*prune(model, "--out", "out"))
    assert repeated["search"]["greedy"]["trials_computed"] == 0
    assert repeated["plan"] == first["plan"]
    assert (workdir / "out/model.safetensors").stat().st_mtime_ns == written
    (workdir / "mine").mkdir()
    (workdir / "mine/notes").touch()
    for args in (prune(model, "--out", "out", budget=0.5), prune(model, "--out", "mine")):
        err = refused("--out", *args)
        assert "holds something else; choose another folder" in err.splitlines()[-1]
    assert (workdir / "out/model.safetensors").stat().st_mtime_ns == written
    assert [*(workdir / "mine").iterdir()] == [workdir / "mine/notes"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("in_process")
def test_a_command_that_is_told_to_end_leaves_no_half_checkpoint(
    model, workdir, say, monkeypatch, number
):
    def stop(path):
        if ".out." in str(path):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(files, "sync", stop)
    # the test fails, and does not end, without a handler
    handler = signal.signal(number, signal.default_int_handler)
    try:
        code, _, err = say(*prune(model, "--out", "new/out"))
    finally:
        signal.signal(number, handler)
    assert code == 128 + number
    assert not [*(workdir / "new").iterdir()]
    assert err.splitlines()[-1] == "interrupted; scores are kept: run the same command again"


def test_a_command_goes_on_behind_nohup(workdir, say):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert say("--version")[0] == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.usefixtures("in_process")
def test_the_next_start_removes_what_a_killed_one_left(model, workdir, say, monkeypatch):
    def die(path):
        if ".out." in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", die)
        if not (child := os.fork()):
            command.main([str(arg) for arg in prune(model, "--out", "new/out")])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    remaining = [path for path in (workdir / "new").rglob("*") if path.is_file()]
    assert {"model.safetensors", "reference.safetensors"} <= {path.name for path in remaining}
    assert say(*prune(model, "--out", "new/out"))[0] == 0
    assert [path.name for path in (workdir / "new").iterdir()] == ["out"]


@pytest.mark.usefixtures("in_process")
def test_a_place_goes_by_its_plain_path_and_a_name_of_two_lines_is_refused(model, workdir, say):
    assert say(*prune(model, "--out", "absent/../out"))[0] == 0
    assert (workdir / "out/config.json").exists()
    assert not (workdir / "absent").exists()
    for name in ("a\nb", "a\x1bb", "a\udcffb"):
        code, _, err = say(*prune("no-model", "--out", name))
        assert code == 2, err
        assert len(err.splitlines()) == 1, err
        assert repr(name) in err, err


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
    workdir, say, monkeypatch, error, code, words
):
    (workdir / "cache/blockpruner").mkdir(parents=True)
    monkeypatch.setattr(Command, "read_run", failing(error))
    result, _, err = say(*prune("model"))
    assert result == code, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"error: {words}"), err
    if code == 1:
        log = Path(re.search(r"is in (.*\.log);", err)[1])
        assert log.parent == workdir / "cache/blockpruner"
        assert "in fail" in log.read_text()


def test_a_log_goes_elsewhere_where_the_cache_cannot_be_written(workdir, say, monkeypatch):
    (workdir / "cache").touch()
    monkeypatch.setattr(Command, "read_run", failing(KeyError("words")))
    log = Path(re.search(r"is in (.*\.log);", say(*prune("model"))[2])[1])
    assert "in fail" in log.read_text()
    log.unlink()


def test_only_a_command_that_keeps_scores_promises_them(workdir, say, monkeypatch):
    monkeypatch.setattr(talking, "Talker", failing(KeyboardInterrupt()))
    assert say("chat", workdir, "--prompt", "x")[::2] == (130, "interrupted\n")


def test_formats_go_by_the_names_of_engines_too(workdir):
    args = Command(workdir, "cpu", SilentObserver(), "vLLM,llama.cpp:q4_k_m, gguf:Q5_0,nas")
    assert args.formats == {"hf": (), "gguf": ("Q4_K_M", "Q5_0"), "nas": ()}


@pytest.mark.usefixtures("in_process")
def test_a_quantization_may_be_asked_for_later(model, workdir, say, refused, answer, monkeypatch):
    monkeypatch.setattr(verify_llama_cpp, "ENGINE", "no_such_engine")
    tool = workdir / "bin/llama-quantize"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\nfor name; do last=$name; done\ncp model-Q8_0.gguf "model-$last.gguf"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    out, repeated = workdir / "out-gguf", workdir / "again-gguf"
    answer(*prune(model, "--out", "out", "--export", "gguf", budget="1blocks"))
    assert (out / "model-F16.gguf").exists()
    assert not (out / "model-Q4_K_M.gguf").exists()
    (out / "README.md").write_text((out / "README.md").read_text() + "My words.")
    later = prune(model, "--out", "out", "--export", "gguf:Q4_K_M", budget="1blocks")
    refused("out-gguf was written without model-Q4_K_M.gguf, and nothing is replaced", *later)
    assert (out / "README.md").read_text().endswith("My words.")
    shutil.rmtree(out)
    assert say(*later)[0] == 0
    assert (out / "model-Q4_K_M.gguf").exists()
    code, _, _ = say("apply", model, "out", "--out", "again", "--export", "gguf:Q4_K_M")
    assert code == 0
    assert (repeated / "model-Q4_K_M.gguf").exists()


@pytest.mark.usefixtures("in_process")
def test_a_finished_checkpoint_gets_other_formats(model, workdir, refused, answer, monkeypatch):
    """The oracle is the export in one go, of the healed model."""
    monkeypatch.setattr(verify_llama_cpp, "ENGINE", "no_such_engine")
    write_texts(workdir, 60)
    order = ("--set", "score.options={order: [mlp.0]}", "--compensate", "refit")
    args = prune(model, "--seq-len", 16, *order, budget="1blocks", method="given")
    answer(*args, "--out", "whole/small", "--export", "nas,gguf")
    answer(*args, "--out", "small")
    result = answer("export", "small", "mlx-lm", "llama.cpp")
    assert [Path(item["path"]).name for item in result["written"]] == ["small-nas", "small-gguf"]
    written = (
        "nas/model.safetensors",
        "nas/config.json",
        "nas/README.md",
        "gguf/model-F16.gguf",
        "gguf/README.md",
    )
    for name in written:
        assert (workdir / f"small-{name}").read_bytes() == (
            workdir / f"whole/small-{name}"
        ).read_bytes(), name
    assert load_plan(workdir / "small-nas/blockpruner_plan.json").removed
    assert "| rows held out from refit |" in (workdir / "small-nas/README.md").read_text()
    for args, message in (
        (("small", "nas"), "is not empty; choose another folder"),
        (("small", "hf"), "is the hf checkpoint itself"),
        (("small-nas/..", "nas"), "there is no plan at"),
        (("small", "onnx"), "onnx"),
        (("small-gguf", "gguf"), "is no hf checkpoint; give the one that it was made of"),
    ):
        refused(message, "export", *args)


def test_llama_cpp_takes_the_layers_of_a_plan_out_of_any_file(workdir, say, refused):
    dense = save_tiny(workdir / "dense")
    for name, blocks in (
        ("layers", ["mha.1", "mlp.1", "mha.3", "mlp.3"]),
        ("blocks", ["mha.1", "mlp.2"]),
    ):
        save_plan(plan_of(dense, blocks), workdir / name)
    code, out, err = say("apply", "dense", "layers", "--prune-layers")
    assert (code, out) == (
        0,
        "--prune-layers 1,3\n",
    )
    assert "llama.cpp counts the layers of Gemma" in err
    code, out, err = say("apply", "dense", "blocks", "--prune-layers")
    assert code == 2
    assert not out
    assert "does not remove whole layers alone" in err
    refused("--out does not say where", "apply", "dense", "layers")


@pytest.mark.usefixtures("in_process")
def test_apply_makes_the_same_checkpoint_from_the_same_base_alone(
    model, workdir, say, refused, answer
):
    answer(*prune(model, "--out", "out"))
    assert answer("apply", model, "out", "--out", "again")["written"][0]["verified"]
    for path in (workdir / "out").iterdir():
        # they name the folder
        if path.name not in (
            "README.md",
            "blockpruner_plan.json",
            "verification.json",
        ):
            assert path.read_bytes() == (workdir / "again" / path.name).read_bytes()
    save_tiny(workdir / "other", rms_norm_eps=1e-5)
    refused(
        "is of another model: its base is",
        "apply",
        "./other",
        "out/blockpruner_plan.json",
        "--out",
        "third",
    )
    assert not (workdir / "third").exists()
    code, _, err = say("apply", model, "absent", "--out", "third")
    assert code == 2
    assert err.startswith("error: there is no plan at 'absent'")


@pytest.mark.usefixtures("in_process")
def test_a_plan_of_channels_says_all(model, workdir, say, refused, answer):
    """Applied to its model it makes the same weights, and to no other model; nor is it taken where
    it was changed."""
    args = prune(
        model, "--set", "compensate.method=none", "--out", "out", "--json", method="narrow"
    )
    pruned = answer(*args)["plan"]
    assert pruned["details"]["channels"]
    assert not pruned["removed"]
    assert say("apply", model, "out", "--out", "again")[0] == 0
    assert (workdir / "again/model.safetensors").read_bytes() == (
        workdir / "out/model.safetensors"
    ).read_bytes()
    refused(
        "the plan is of another model",
        "apply",
        save_tiny(workdir / "wide", intermediate_size=96),
        "out",
        "--out",
        "other",
    )
    code, out, err = say("export", "out", "mlx")
    assert code == 0, err
    assert "of the parameters: channels of " in out, err
    page = Path(say("report", "out-mlx")[1].strip()).read_text()
    assert "mlx_lm.server --model" in page and "vllm serve" not in page, (
        "the commands of its own format alone"
    )
    plan = load_plan(workdir / "out/blockpruner_plan.json")
    fewer = dict([*plan.details["channels"].items()][1:])
    save_plan(replace(plan, details={**plan.details, "channels": fewer}), workdir / "changed.json")
    refused("an unchanged plan", "apply", model, "changed.json", "--out", "other")
    assert not (workdir / "other").exists()


@pytest.mark.usefixtures("in_process")
def test_compensated_weights_are_kept_and_no_plan_promises_them(model, workdir, say, answer):
    args = prune(
        model, "--seq-len", 16, "--out", "out", "--json", budget="1blocks", method="recommended"
    )
    plan = answer(*args)["plan"]
    assert (plan["method"], plan["compensate"]) == ("floating", "refit")
    (report,) = (workdir / "cache/blockpruner/compensated").glob("*/compensate.json")
    written_at = report.stat().st_mtime_ns
    assert json.loads(report.read_text())["method"] == "refit"
    assert ("compensated without training" in (workdir / "out/README.md").read_text()) is (
        report.with_name("weights.safetensors").exists()
    )
    answer(*args)
    assert report.stat().st_mtime_ns == written_at
    code, _, err = say("apply", model, "out", "--out", "again")
    assert code == 0
    assert "loses the same parts, but is not healed (refit)" in err
    plain = load_plan(workdir / "again/blockpruner_plan.json")
    assert plain.compensate == "none"
    assert list(plain.removed) == plan["removed"]
    assert "compensated" not in (workdir / "again/README.md").read_text()


@pytest.mark.usefixtures("in_process")
def test_heal_trains_the_better_model_and_goes_on_after_a_kill(
    model, workdir, say, refused, answer, monkeypatch
):
    write_texts(workdir, 300)
    args = pruned_and_trained(model, "--out", "out", "--json")
    refit = answer(
        *prune(model, "--seq-len", 16, "--out", "refit", method="recommended", budget=0.2)
    )

    def die(*arguments):  # states were saved
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_healed", die)
        assert say(*args)[0] == 130
        assert not (workdir / "out").exists()
    result = say(*args)
    report = ended(result)
    assert "training goes on after step" in result[2]
    assert report["plan"]["removed"] == refit["plan"]["removed"]
    assert report["plan"]["train"]
    assert report["perplexity"]["compensated"] == refit["perplexity"]["compensated"]
    perplexities = report["perplexity"]["trained"]
    assert perplexities["after"] < perplexities["before"]
    assert perplexities["dense"] > 1
    page = Path(say("report", "out")[1].strip()).read_text()
    shown = re.search(r"rows held out from training</th>\s*(.*?)</tr>", page, re.DOTALL)[1]
    assert [number(perplexities[key]) for key in ("dense", "before", "after")] == re.findall(
        r">([^<>]+)</td>", shown
    )
    assert f"vllm serve {workdir / 'out'} " in page
    (file,) = (workdir / "cache/blockpruner/trained").glob("*/weights.safetensors")
    trained, written_at = load_file(file), file.stat().st_mtime_ns
    models = [
        AutoModelForCausalLM.from_pretrained(workdir / name, trust_remote_code=True)
        for name in ("refit", "out")
    ]
    refit_weights, trained_weights = (dict(item.named_parameters()) for item in models)
    changed = {
        name
        for name, weight in refit_weights.items()
        if not torch.equal(weight, trained_weights[name])
    }
    assert changed
    assert len(changed) == len(trained)
    assert "then trained (all weights, distilled" in (workdir / "out/README.md").read_text()
    answer(*args)
    assert file.stat().st_mtime_ns == written_at
    assert say(*("lora" if arg == "all" else arg for arg in args))[0] == 2, (
        "the folder holds another model"
    )
    write_texts(workdir, 20)
    refused(
        "of which 8 are held out; give more texts",
        *prune(model, "--out", "other", "--seq-len", 16, "--train", "all"),
    )


def test_a_format_that_cannot_hold_the_family_is_refused_before_a_search(workdir, refused):
    other = save_tiny(workdir / "qwen3", "qwen3")
    for form in ("gguf", "mlx-lm"):
        refused(
            "has no qwen3 models that lack blocks", *prune(other, "--out", "out", "--export", form)
        )
        assert not (workdir / "cache").exists()
    # its window is not what is wrong
    refused(
        "for mlx-lm name mlx",
        *prune(save_tiny(workdir / "gemma", "gemma3_text"), "--out", "out", "--export", "nas"),
    )
    windowed = save_tiny(workdir / "windowed", "mistral", sliding_window=6)
    refused(
        "has no models with a sliding window (here 6)",
        *prune(windowed, "--out", "out", "--export", "nas"),
    )
    assert not (workdir / "cache").exists()
    (workdir / "file").touch()
    for extra in ((), ("--dry-run",)):
        refused(
            f"nothing can be written in {workdir / 'file'}",
            *prune(other, "--out", "file/out", *extra),
        )
        assert not (workdir / "cache/blockpruner/searches").exists()


@pytest.mark.usefixtures("in_process")
def test_training_begins_at_the_compensated_weights(
    model, workdir, answer, monkeypatch, fit_is_other_weights
):
    write_texts(workdir, 300)
    fits = {"own": fit_is_other_weights, "other": choice.compensate}
    starts = []
    for name, fit in fits.items():
        monkeypatch.setattr(choice, "compensate", fit)
        monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / name))
        report = answer(*pruned_and_trained(model, "--out", f"out-{name}"))
        starts.append(report["perplexity"]["trained"]["before"])
    assert starts[0] != pytest.approx(starts[1], rel=1e-3)
    card = (workdir / "out-other/README.md").read_text()
    assert card.index("compensated without training") < card.index("then trained")


@pytest.mark.usefixtures("in_process", "fit_is_other_weights")
def test_healed_weights_that_are_gone_are_made_again(model, workdir, say, answer):
    """A purge of scratch space takes old files one by one."""
    write_texts(workdir, 300)
    args = pruned_and_trained(model, "--json", "--out", "out")
    answer(*args)
    undamaged = load_file(workdir / "out/model.safetensors")
    for lost in (
        "compensated/*/weights.safetensors",
        "trained/*/weights.safetensors",
        "compensated/*/plan.json",
        "flipped",
    ):
        name = lost if "/" in lost else "trained/*/weights.safetensors"
        (file,) = (
            path for path in (workdir / "cache/blockpruner").glob(name) if ".bad" not in str(path)
        )
        content = file.read_bytes()
        file.unlink()
        if lost == "flipped":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        shutil.rmtree(workdir / "out")
        result = say(*args)
        ended(result)
        remade = load_file(workdir / "out/model.safetensors")
        assert file.exists()
        assert all(torch.equal(remade[name], weight) for name, weight in undamaged.items())
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


def test_a_dry_run_counts_from_the_shape_and_leaves_nothing(model, workdir, say, refused, answer):
    found = answer(*prune(model, "--dry-run"))
    assert [path.name for path in workdir.iterdir()] == ["texts.txt"]
    weights = load_file(model / "model.safetensors").values()
    assert found["parameters"] == sum(tensor.numel() for tensor in weights)
    assert found["first_step_masks"] == {"greedy": 8}
    assert found["weights_bytes"] == found["disk_bytes"] == sum(tensor.nbytes for tensor in weights)
    assert found["parameters_to_remove"] == round(0.3 * found["parameters"])
    assert found["memory_bytes"].keys() == {"search"}
    assert found["memory_bytes"]["search"] > found["weights_bytes"]
    both = answer(*prune(model, "--dry-run", "--dtype", "bfloat16", method="recommended"))
    assert both["memory_bytes"].keys() == {"search", "refit"}
    assert both["first_step_masks"] == {}
    assert 2 * both["weights_bytes"] == both["disk_bytes"]
    assert say(*prune(model, "--dry-run", "--texts", "absent.txt"))[0] == 2
    refused("is not empty and holds something else", *prune(model, "--dry-run", "--out", model))
    remaining = f"{0.7 * found['parameters'] / 1e6:.6f}M"
    named = answer(*prune(model, "--dry-run", budget=remaining))
    assert named["parameters_to_remove"] == found["parameters_to_remove"]


@pytest.mark.usefixtures("in_process")
def test_a_cpu_that_is_slow_in_16_bits_computes_in_float32_and_writes_the_models_own(
    workdir, say, answer, monkeypatch
):
    narrow, slow = save_tiny(workdir / "narrow"), {"float32": 50.0, "bfloat16": 1.0}
    load_model(narrow, "bfloat16").save_pretrained(narrow)
    monkeypatch.setattr(rates, "product_rate", slow.__getitem__)
    code, _, said = say(*prune(narrow, "--out", "out"))
    assert code == 0
    assert (
        "bfloat16 is slow on this CPU: float32 is computed in (with --dtype bfloat16 not)" in said
    )
    (facts,) = (workdir / "cache/blockpruner").glob("*/fingerprint.json")
    assert read_json(facts)["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(workdir / "out/model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((workdir / "out/config.json").read_text())["dtype"] == "bfloat16"
    slow["bfloat16"] = 50.0  # another measurement: the search that was begun goes on in its dtype
    assert answer(*prune(narrow, "--out", "again"))["search"]["greedy"]["units_computed"] == 0
    own = answer(*prune(narrow, "--out", "own", "--dtype", "bfloat16"))
    assert own["search"]["greedy"]["units_computed"] > 0
    assert "bfloat16" in say(*prune(narrow, "--dry-run", "--cache", "fast"))[1]


@pytest.mark.usefixtures("in_process")
def test_a_model_of_the_hub_is_asked_for_its_shape_alone_before_it_is_fetched(
    model, workdir, say, answer, monkeypatch
):
    hub = Hub(model, monkeypatch)
    assert "model: a/tiny, llama, float32" in say(*prune("a/tiny", "--dry-run"))[1]
    assert not [*workdir.rglob("*.safetensors")]
    assert answer(*prune("a/tiny"))["written"][0]["path"] == str(workdir / "tiny-0.3")
    assert "base_model: a/tiny" in (workdir / "tiny-0.3/README.md").read_text()
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
def test_a_bad_value_is_named_in_the_last_line(model, workdir, say, option, value, named):
    code, out, err = say(*prune(model), option, value)
    last = err.splitlines()[-1]
    assert code == 2, err
    assert not out, err
    assert last.startswith("error: "), err
    assert value.partition(":")[2] in last, err
    assert not named or last.endswith(f"(here: {option})"), err


@pytest.fixture
def asked(monkeypatch):
    """The session and the run of each command, which ends there."""
    result = []

    def read(session, *args, **extra):
        result.append((session, read_run(session, *args, **extra)))
        raise KeyboardInterrupt

    read_run = Command.read_run
    monkeypatch.setattr(Command, "read_run", read)
    return result


@pytest.mark.usefixtures("workdir")
def test_every_setting_has_a_way_in(model, say, asked):
    def run(*extra):
        code, _, err = say(*prune(model), *extra)
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
    session, result = run(*(word for text in sets for word in ("--set", text)))
    assert (result.calibration.num_rows, result.score.options, result.evaluate.speed) == (
        3,
        {"per": "kv"},
        None,
    )
    assert (result.model.dtype, result.compensate.seed, result.export) == (
        "bfloat16",
        7,
        ("hf", "nas"),
    )
    assert result.calibration.data.path == "texts.txt"
    assert session.runtime_settings.batch_tokens == 64
    session, _ = run("--workers", 3)
    assert (session.runtime_settings.executor, session.runtime_settings.workers) == ("ray", 3)
    assert run("--streaming")[0].runtime_settings.streaming
    args = ("prune", model, "--budget", 0.3, "--dataset")
    assert say(*args, "someone/texts:test")[0] == say(*args, "someone/texts")[0] == 130
    for (_, item), split in zip(asked[-2:], ("test", "train"), strict=True):
        own = item.calibration.data.of[0]
        assert (own.repo, own.split) == ("someone/texts", split)
        assert item.calibration.split == "all"
    Path("mine.yaml").write_text(
        f"model: {{source: path, path: {model}}}\ncalibration: {{data: {{source: path, path:"
        " t.txt}, num_samples: 5}"
    )
    code, _, err = say(
        "prune", "--config", "mine.yaml", "--budget", 0.3, "--seq-len", 16, "--method", "random"
    )
    assert code == 130, err
    expected = asked[-1][1]
    assert (
        expected.calibration.num_samples,
        expected.calibration.seq_len,
        expected.score.method,
    ) == (
        5,
        16,
        "random",
    )
    assert (expected.calibration.split, expected.calibration.data.path, expected.model.dtype) == (
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
def test_what_is_refused_is_named_as_the_command_calls_it(model, workdir, say, more, words, here):
    (workdir / "empty.txt").write_text(" \n")
    code, out, err = say(*prune(model, "--set", "calibration.split=all"), *more)
    assert code == 2, err
    assert not out, err
    assert words in err, err
    assert not here or here in err.splitlines()[-1], err
    assert not (workdir / "0.3").exists()
    assert "(here: )" not in err


@pytest.mark.usefixtures("in_process")
def test_no_command_uses_a_damaged_checkpoint_of_ours(model, workdir, say, answer):
    """One bit of a weight is changed after the export was verified."""
    answer(*prune(model, "--out", "out"))
    uses = (
        ("chat", "out", "--prompt", "a"),
        ("compare", model, "out", "--prompt", "a"),
        ("compare", model, "out", "--texts", "texts.txt", "--seq-len", 16),
        ("eval", "out", "--tasks", "piqa", "--items", "."),
    )
    assert say(*uses[0], "--max-new-tokens", 1)[0] == 0
    content = bytearray((workdir / "out/model.safetensors").read_bytes())
    content[-1] ^= 1
    (workdir / "out/model.safetensors").write_bytes(content)
    for use in uses:
        code, out, err = say(*use)
        assert (code, out) == (
            2,
            "",
        ), use
        assert "out is not what was verified: model.safetensors changed" in err, use


def test_the_end_of_a_file_is_not_taken_for_the_end_of_typing(model, workdir, say, monkeypatch):
    """As torch and gzip report a file that is cut short."""

    def load(*_):
        raise EOFError("Ran out of input")

    monkeypatch.setattr(talking, "load_model", load)
    code, _, err = say("eval", model, "--tasks", "piqa", "--items", items(workdir))
    assert code == 2
    assert "Aborted" not in err
    start = "error: a file is cut short; if it is in the folder of --cache, delete"
    assert err.splitlines()[-1].startswith(start)


@pytest.mark.usefixtures("workdir")
def test_a_revision_and_an_address_of_the_hub(model, say, asked, monkeypatch):
    hub = Hub(model, monkeypatch)
    for args in (
        ("a/tiny@v1",),
        ("a/tiny", "--revision", "v1"),
        ("hf://a/tiny@v1",),
        ("https://huggingface.co/a/tiny@v1",),
    ):
        code, _, err = say("prune", *args, "--budget", 0.3)
        assert code == 130, err
        assert (asked[-1][1].model.repo, asked[-1][1].model.revision) == ("a/tiny", "v1")
    assert {*hub.asked} == {("a/tiny", "v1")}
    assert say("prune", "a/tiny@refs/pr/1", "--budget", 0.3)[0] == 130
    assert asked[-1][1].model.revision == "refs/pr/1"


def test_a_quantized_base_is_refused_from_its_config(workdir, refused):
    path = save_tiny(workdir / "packed") / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))
    err = refused("quantized (fp8)", "prune", "packed", "--budget", 0.3, "--dry-run")
    assert "quantize the result" in err


def test_chat_records_go_through_the_template(workdir, say, refused, monkeypatch):
    save_tiny(workdir / "chatty")
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    )
    tokenizer.save_pretrained(workdir / "chatty")
    turns = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * 9}]
        for i in range(40)
    ]
    (workdir / "chat.jsonl").write_text(
        "".join(json.dumps({"messages": item}) + "\n" for item in turns)
    )
    result = []
    monkeypatch.setattr(splits, "calibrate", lambda *args, **_: result.append(args[3]) or 1 / 0)
    with pytest.raises(SystemExit):
        command.main(["prune", "chatty", "--budget", "0.3", "--texts", "chat.jsonl"])
    own = [text for text in result[0].search if text.kind.name == "chat.jsonl"]
    assert own == [f"[user] say {i} [assistant] {f'{i} ' * 9} " for i in range(40)], (
        "and one BOS in a row"
    )
    tiny_tokenizer().save_pretrained(workdir / "chatty")
    (workdir / "chatty/chat_template.jinja").unlink(missing_ok=True)
    refused(
        "no chat template",
        "prune",
        "chatty",
        "--budget",
        0.3,
        "--texts",
        "chat.jsonl",
        "--cache",
        "other",
    )


def test_a_bad_model_an_absent_package_and_an_interrupt(workdir, say, refused, monkeypatch):
    for args in (prune("./absent"), prune("absent.gguf"), ("chat", "texts.txt")):
        assert say(*args)[0] == 2
    missing = (
        "there is no folder 'modles/tiny' here, and hub repository 'modles/tiny' cannot be used:"
        " HF_HUB_OFFLINE"
    )
    for args in (
        prune("modles/tiny"),
        ("chat", "modles/tiny"),
        ("apply", "modles/tiny", "p", "--out", "o"),
    ):
        refused(missing, *args)
    (save_tiny(workdir / "odd") / "config.json").write_text('{"model_type": "rnn"}')
    refused("'rnn' is unknown; valid: ", *prune("odd"))
    for raised, code, message in (
        (ModuleNotFoundError("", name="gguf"), 2, "error: this needs the package gguf"),
        (KeyboardInterrupt(), 130, "interrupted; scores are kept"),
    ):
        monkeypatch.setattr(
            Command, "read_run", lambda *args, raised=raised, **_: (x for x in ()).throw(raised)
        )
        assert (result := say(*prune("odd")))[0] == code
        assert result[2].startswith(message)


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
def test_a_strangers_folder_is_refused_in_one_line(model, workdir, refused, name, content, words):
    shutil.copytree(model, workdir / "odd")
    if content is None:  # a shard without an index
        (workdir / "odd" / name).rename(workdir / "odd/model-00001-of-00002.safetensors")
    else:
        (workdir / "odd" / name).write_text(content)
    err = refused(words, "chat", "odd", "--prompt", "hi", "--max-new-tokens", 1)
    assert len(err.strip().splitlines()) == 1


@pytest.mark.usefixtures("in_process")
def test_a_strangers_checkpoint_is_refused_in_one_line(model, workdir, say, answer):
    answer(*prune(model, "--out", "out"))
    plan = read_json(workdir / "out/blockpruner_plan.json")

    def refusal(command, name, content):
        """What a command answers where everything is verified, and one file is odd."""
        shutil.rmtree(workdir / "odd", ignore_errors=True)
        shutil.copytree(workdir / "out", workdir / "odd")
        path = workdir / "odd" / name
        path.write_text(content) if isinstance(content, str) else write_sealed_json(path, content)
        report = read_json(workdir / "out/verification.json")
        write_sealed_json(
            workdir / "odd/verification.json", report | {"manifest": manifest(workdir / "odd")}
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


def test_chat_and_compare(model, workdir, say, refused, answer, monkeypatch):
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
    assert code == 0
    assert out.strip() == talking.printable(text.strip())
    refused("the prompt has no token", "chat", model, "--prompt", "")
    typed = iter([" ", "a few words"])
    monkeypatch.setattr(
        "builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError)
    )
    assert say("chat", model, "--max-new-tokens", 5)[:2] == (0, out)
    code, out, _ = say("compare", model, model, "--prompt", "a few words", "--max-new-tokens", 5)
    assert code == 0 and out.count("parameters") == 2 and "tokens/s" not in out, (
        "one timing of one answer is no speed"
    )
    both = answer("compare", model, model, "--prompt", "a few words", "--max-new-tokens", 5)
    assert [item["answer"] for item in both] == [text.strip()] * 2
    assert both[0]["parameters"] == dense.num_parameters()
    assert "tokens_per_second" not in both[0]
    assert say("compare", model, model)[0] == say("chat", workdir)[0] == 2
    shutil.copy(model / "config.json", workdir)
    refused("has no safetensors", "chat", workdir, "--prompt", "x")


def test_names_and_answers_are_shown_as_text(model, workdir, say, monkeypatch, capsys):
    """Neither as markup, in which "[/x]" ends nothing, nor as orders to the terminal."""
    said = "a \x1b]0;title\x07b\x9b31m\nc"
    monkeypatch.setattr(talking.Talker, "answer", lambda *_, **__: said)
    shutil.copytree(model, workdir / (odd := "m[/x]\x1b[31m:smile:"))
    code, out, err = say("compare", odd, odd, "--prompt", "x")
    assert code == 0, err
    assert "m[/x]" in out, err
    assert ":smile:" in out, err
    talking.Streamer(tiny_tokenizer()).on_finalized_text(f"{said} é👩‍💻\t", stream_end=True)
    out += capsys.readouterr().out
    assert "é👩‍💻\t" in out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)


def test_compare_measures_perplexity_on_the_same_rows(
    model, workdir, say, refused, answer, monkeypatch
):
    """The oracle is a full forward pass of each model."""
    (workdir / "heldout.txt").write_text(" ".join(f"other words {i}" for i in range(20)))
    answer(*prune(model, "--out", "pruned"))
    args = ("compare", model, "pruned", "--texts", "heldout.txt", "--max-rows", 3)
    first, second = answer(*args, "--seq-len", 16)
    ids = tiny_tokenizer()((workdir / "heldout.txt").read_text()).input_ids
    rows = [ids[i : i + 16] for i in (0, 16, 32)]
    dense = load_model(model, "float32")
    pruned = prune_(
        load_model(model, "float32"), load_plan(workdir / "pruned/blockpruner_plan.json").mask
    )
    a, b = ([full_nll(item, row) for row in rows] for item in (dense, pruned))
    assert [first["perplexity"], second["perplexity"]] == pytest.approx(
        [math.exp(mean(a)), math.exp(mean(b))], rel=1e-5
    )
    low, high = ttest_rel(b, a).confidence_interval(0.95)
    assert second["interval"] == pytest.approx([math.exp(low), math.exp(high)], rel=1e-4)
    assert second["relative"] == pytest.approx(second["perplexity"] / first["perplexity"])
    assert first["relative"] is first["answer"] is None
    code, out, _ = say(*args, "--seq-len", 16)
    assert code == 0
    assert out.count("held-out perplexity") == 2
    assert "of the first" in out
    records = [
        {"text": (workdir / "heldout.txt").read_text(), "kind": "a", "share": 1},
        {"text": "b " * 99, "kind": "b", "share": 1},
    ]
    (workdir / "mix.json").write_text(json.dumps(records))
    mixed = ("compare", model, "pruned", "--texts", "mix.json", "--max-rows", 3, "--seq-len", 16)
    alone, both = answer(*mixed)
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
    assert code == 0
    assert f"[{low:.2f}, {high:.2f}]" in out
    assert {*both["kinds"]} == {"a", "b"}
    short = save_tiny(workdir / "short", max_position_embeddings=64)
    both = answer("compare", model, short, "--texts", "heldout.txt")
    long = [full_nll(dense, ids[i : i + 64]) for i in range(0, len(ids) - 63, 64)]
    assert both[0]["perplexity"] == pytest.approx(math.exp(mean(long)), rel=1e-5), (
        "rows fit into both contexts"
    )
    tokenizers = iter([tiny_tokenizer(), lambda text, **_: {"input_ids": ids[::-1]}])
    monkeypatch.setattr(talking, "load_tokenizer", lambda folder: next(tokenizers))
    refused("pruned has another tokenizer than", *args)


def test_the_loss_of_each_kind_of_text_is_told_wherever_the_model_is_shown(
    model, workdir, say, monkeypatch
):
    """The oracle is a full forward pass over the rows that judged. Every loss is uneven here."""
    texts = [
        f"{kind}{i} little words and {i * i} {kind} more of them"
        for i in range(300)
        for kind in "ab"
    ]
    records = [{"text": text, "kind": text[0], "share": 1} for text in texts]
    (workdir / "mix.json").write_text(json.dumps(records))
    calibrate, split_calls = splits.calibrate, []
    monkeypatch.setattr(kinds, "UNEVEN", 0)
    monkeypatch.setattr(
        splits,
        "calibrate",
        lambda *arguments, **extra: (
            split_calls.append(calibrate(*arguments, **extra)) or split_calls[-1]
        ),
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
    losses = ended(result)["plan"]["kinds"]
    judge = split_calls[0].judge
    pruned = AutoModelForCausalLM.from_pretrained(workdir / "out", trust_remote_code=True)
    models = {"dense": load_model(model, "float32"), "after": pruned}
    assert losses.keys() == {*judge.kinds} == {"a", "b", "tales", "code", "Python's library"}
    for kind, facts in losses.items():
        rows = [row for row, own in zip(judge.rows, judge.kinds, strict=True) if own == kind]
        expected = {
            key: math.exp(mean(full_nll(item, row) for row in rows)) for key, item in models.items()
        }
        assert facts == pytest.approx(expected, rel=1e-4)
    card, out = (workdir / "out/README.md").read_text(), say(*args)[1]
    page = Path(say("report", "out")[1].strip()).read_text()
    for kind, facts in losses.items():
        dense, after = facts["dense"], facts["after"]
        lost = f"{kind}: {dense:,.2f} dense, {after:,.2f} after, {after / dense:.2f} times"
        assert f"- {lost}" in card
        assert f"texts set aside, {lost}" in out
        assert lost.partition(": ")[2] in page
    assert all("lost most: " in shown for shown in (card, out, page, result[2]))


def test_json_has_no_infinity(model, workdir, answer, monkeypatch):
    """Which no parser but Python's reads."""
    item = talking.Compared("m", 1, perplexity=math.inf, relative=1.5, interval=(0.0, math.inf))
    monkeypatch.setattr(talking, "compared", lambda *_: [item])
    (result,) = answer("compare", model, model, "--prompt", "x")
    assert (result["perplexity"], result["relative"], result["interval"]) == (
        None,
        1.5,
        [0.0, None],
    )


def test_a_note_names_a_key_as_the_command_does(workdir, refused, monkeypatch):
    """The rows of the paper's draw have no BOS."""
    bos_tokenizer().save_pretrained(save_tiny(workdir / "bos"))
    (workdir / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in TEXTS.split("\n"))
    )
    monkeypatch.setattr(pipeline, "score", lambda *_: (_ for _ in ()).throw(InputError("enough")))
    sets = ("calibration.split=paper", "calibration.num_rows=null", "calibration.num_samples=3")
    err = refused(
        "set calibration.split: all",
        *prune(
            "bos", "--texts", "texts.jsonl", *(part for item in sets for part in ("--set", item))
        ),
    )
    assert "(here: --set calibration.split=VALUE)" in err


def items(workdir):
    (workdir / "items").mkdir()
    pq.write_table(tables_of("piqa")["validation"], workdir / "items/piqa_validation.parquet")
    return "items"


def test_eval_prints_what_the_benchmarks_of_the_library_score(model, workdir, say, refused, answer):
    args = ("eval", model, "--tasks", "piqa", "--items", items(workdir))
    result = answer(*args)
    expected = zero_shot.evaluate(
        load_model(model, "float32"), tiny_tokenizer(), "piqa", write_tasks(workdir / "tasks")
    )
    assert result == {"piqa": expected.scores}
    code, out, _ = say(*args, "--limit", 1)
    assert code == 0
    assert out.startswith("piqa: acc")
    err = refused("'piqua' is unknown", "eval", model, "--tasks", "piqua")
    assert "(here: --tasks)" in err


def test_code_of_others_is_not_run_and_not_needed_for_a_known_family(workdir, say):
    """As in Phi-3's folders, whose config names a class of its own."""
    save_tiny(workdir / "phi", "phi3", pad_token_id=0)
    plain = say("chat", "phi", "--prompt", "a few words", "--max-new-tokens", 3)
    config = json.loads((workdir / "phi/config.json").read_text())
    code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (workdir / "phi/theirs.py").write_text("open('ran', 'w')\n")
    (workdir / "phi/config.json").write_text(json.dumps(config | {"auto_map": code}))
    assert plain[0] == 0
    assert say("chat", "phi", "--prompt", "a few words", "--max-new-tokens", 3)[:2] == plain[:2]
    for other in ("rnn", "phi3_blockpruned"):
        (workdir / "phi/config.json").write_text(
            json.dumps(config | {"auto_map": code, "model_type": other})
        )
        end, _, err = say("chat", "phi", "--prompt", "a", "--max-new-tokens", 1)
        assert end == 2
        assert "code that is not the installed blockpruner's" in err
        assert "it is not run" in err
    assert not (workdir / "ran").exists()


@pytest.mark.usefixtures("in_process")
def test_the_report_is_one_file_that_tells_what_the_plan_holds(
    model, workdir, say, refused, answer
):
    folder = workdir / "an out"
    answer(*prune(model, "--out", folder))
    code, out, err = say("report", folder)
    assert code == 0, err
    page = unescape(Path(out.strip()).read_text())
    plan = load_plan(folder / "blockpruner_plan.json")
    assert page.count("data:image/svg") == 1
    assert f"blockpruner compare MODEL '{folder}'" in page
    assert f"blockpruner chat '{folder}'" in page
    assert "Verified by transformers" in page
    assert f"{100 * plan.ratio:.1f} % of the parameters removed" in page
    assert f"{plan.calibration['perplexity']:,.0f}" in page
    (folder / "config.json").write_text("{}")
    refused("is not what was verified: config.json changed", "report", folder)


@pytest.mark.usefixtures("in_process")
def test_what_the_api_saves_is_taken_by_every_command(model, workdir, say, refused, answer):
    (workdir / "heldout.txt").write_text(" ".join(f"other words {i}" for i in range(20)))
    (workdir / "plain.safetensors").touch()  # is not the model's
    loaded = AutoModelForCausalLM.from_pretrained(model)
    pruned = blockpruner.prune(
        loaded, tiny_tokenizer(), TEXTS.split("\n"), 0.3, seq_len=32, method="greedy"
    )
    loaded.generation_config.eos_token_id = [7, 8]
    pruned.save("out")
    assert read_json(workdir / "out/generation_config.json")["eos_token_id"] == [
        7,
        8,
    ], "not those of the dense folder"
    assert say("report", "out")[0] == 0
    assert "model.safetensors" in answer("push", "out", "me/small", "--dry-run")["files"]
    code, _, err = say("apply", model, "out", "--out", "again")
    assert code == 0, err
    assert (workdir / "again/model.safetensors").exists(), err
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.5)
    blockpruner.prune(
        changed, tiny_tokenizer(), TEXTS.split("\n"), "1blocks", seq_len=32, method="greedy"
    ).save("b")
    refused("does not name its base model", "apply", model, "b", "--out", "c")


@pytest.mark.usefixtures("in_process")
def test_push_shows_and_asks_before_anything_is_uploaded(
    model, workdir, say, refused, answer, monkeypatch
):
    """What may be uploaded is tested in test_hub."""
    answer(*prune(model, "--out", "out"))
    hub = PushHub(monkeypatch)
    result = answer("push", "out", "me/small", "--dry-run")
    assert result["private"] is True
    assert result["repo"] == "me/small"
    assert set(result["files"]) == {path.name for path in (workdir / "out").iterdir()}
    assert (
        result["files"]["model.safetensors"] == (workdir / "out/model.safetensors").stat().st_size
    )
    assert say("push", "out", "me/small")[0] == 2, "there is no terminal to ask on"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: (_ for _ in ()).throw(Abort))
    code, _, err = say("push", "out", "me/small")
    assert code == 1
    assert "to the private repository me/small" in err
    assert "model.safetensors" in err
    assert hub.calls == []
    assert (
        answer("push", "out", "me/small", "--yes")["commit"]
        == "https://hub.invalid/me/small/commit/1"
    )
    (source,) = (workdir / "cache/blockpruner/cache/models").glob("*/blockpruner_source.json")
    facts = read_json(source) | {"licence": {"license": "llama2"}}
    write_sealed_json(source, facts)
    assert say("push", "out", "me/small", "--dry-run")[0] == 2, (
        "the card lacks the base model's licence"
    )
    (workdir / "cache/blockpruner/cache/models/.left.01234567.tmp").mkdir()
    (workdir / "cache/blockpruner/cache/models/cut").mkdir()
    (workdir / "cache/blockpruner/cache/models/1.bad").mkdir()
    (workdir / "cache/blockpruner/cache/models/1.bad/blockpruner_source.json").write_text("{")
    write_sealed_json(source, facts | {"identity": "another model's"})
    assert say("push", "out", "me/small", "--dry-run")[0] == 0
    (workdir / "out/README.md").unlink()
    refused("out has no README.md", "push", "out", "me/small", "--dry-run")


@pytest.mark.parametrize(
    ("train", "package", "fix"), [("all", "accelerate", "'.'"), ("lora", "peft", "'.[train]'")]
)
def test_a_package_that_training_needs_is_asked_for_before_the_search(
    model, workdir, refused, monkeypatch, train, package, fix
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for extra in (["--dry-run"], []):
        err = refused(
            f"needs the package {package}", *prune(model, "--train", train, "--out", "out", *extra)
        )
        assert f"pip install {fix}" in err
        assert err.count("\n") == 1
    with pytest.raises(InputError, match=f"needs the package {package}"):
        blockpruner.prune(
            load_model(model, "float32"),
            tiny_tokenizer(),
            [TEXTS],
            0.3,
            train=train,
            cache=workdir / "cache",
        )
    assert not (workdir / "out").exists() and not list(workdir.rglob("*.jsonl")), (
        "nothing was searched"
    )


def test_doctor_names_what_is_missing_and_what_mends_it(workdir, say, answer, monkeypatch):
    checks = {check["name"]: check for check in answer("doctor")}
    assert checks["torch"]["verdict"] == "ok"
    assert checks["torch"]["present"] == metadata.version("torch")
    assert checks["cache"]["present"].startswith(str(workdir / "cache/blockpruner"))
    hub, disk = workdir / "hub", shutil.disk_usage(workdir)
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
    assert str(hub) in downloads["problem"]
    assert "HF_HOME" in downloads["problem"]
    hub.rmdir()
    known, absent = doctor.version, {"ray": "", "typer": "0.1"}

    def version(name):
        if absent.get(name) == "":
            raise PackageNotFoundError
        return absent.get(name) or known(name)

    monkeypatch.setattr(doctor, "version", version)
    code, out, _ = say("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 1
    assert checks["typer"]["verdict"] == "missing"
    assert checks["ray"]["verdict"] == "optional"
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
    result = {"plan": plan, "taken_out": "1 MHA", "written": []}
    assert "no weight was fitted again" in last_words(result)
    fitted = last_words(
        result | {"perplexity": {"compensated": {"before": 4.0, "after": 3.0, "dense": 2.0}}}
    )
    assert "4.00 -> 3.00, dense 2.00 (1.50 times)" in fitted
    assert "no weight" not in fitted
    (tmp_path / "config.json").write_text('{"model_type": "nemotron-nas"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="format nas, which transformers does not load"):
        talking.config_of(tmp_path)
