"""`benchmarks.gpu`: its nine parts rehearsed at tiny shapes on the CPU; and what a part that fails, hangs or dies, or a
run that is killed, leaves behind."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import PARTS, Part
from blockpruner.core.errors import InputError
from blockpruner.scoring.engine import Engine
from blockpruner.store.files import read_json

CHECKS = {"numbers": 4, "iteration": 1, "ways": 6, "memory": 3, "streaming": 1, "around": 5}
"""How many things must hold in a part of the rehearsal, at least."""

STAND_IN = """
import json, os, subprocess, sys, time
from benchmarks.gpu import lines_in

def tell(**message):
    print(json.dumps(message), flush=True)

tell(where={"shape": "none", "device": sys.argv[1]}, ended="whole")
for name in lines_in(sys.stdin):
    tell(found={"worker": os.getpid(), "first": name})
    if name == "hang":
        child = subprocess.Popen(["sleep", "60"])
        tell(found={"child": child.pid})
        time.sleep(60)
    elif name == "chatter":
        until = time.monotonic() + 60
        while time.monotonic() < until:
            tell(found={"said": time.monotonic()})
            time.sleep(0.05)
    elif name == "die":
        os._exit(3)
    elif name == "fail":
        tell(ended="failed: of itself")
        os._exit(1)
    elif name == "wrong":
        tell(found={"checks": [{"what": "one is none", "found": 1.0, "at most": 0, "holds": False}]})
    tell(ended="whole")
"""
"""A worker whose parts do what their names say."""


def parts_of(*names, seconds=60.0):
    return [Part(name, seconds, f"Does {name} end?") for name in names]


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return [sys.executable, "-c", f"import runpy, sys; sys.argv = ['', 'a card']; runpy.run_path({str(path)!r})"]


def records_in(path):
    return {record["part"]: record for record in read_json(path)["records"]}


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(") ")[2][0] != "Z"


def await_end(*processes):
    until = time.monotonic() + 60
    while any(map(is_running, processes)):
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.02)


def test_the_rehearsal_answers_every_part(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(path), "--patience", "30"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT)
    assert done.returncode == 0, done.stderr
    assert gpu_parts.NO_DEVICE in done.stderr
    found = read_json(path)
    assert [record["part"] for record in found["records"]] == [part.name for part in PARTS]
    for record in found["records"]:
        assert record["ended"] == "whole", record
        checks = record["found"].get("checks", [])
        assert len(checks) >= CHECKS.get(record["part"], 0), record
        assert all(check["holds"] for check in checks), record
        assert record["found"]["headlines"], record
    page = path.with_suffix(".md").read_text()
    assert gpu_parts.NO_DEVICE in page and "**" not in page
    for number, part in enumerate(PARTS, 1):
        assert f"\n## {number}. {part.name}\n\n{part.question}\n\nwhole, " in page
    assert gpu.run(path, (), ["false"]), "what is whole needs no worker"
    assert read_json(path) == found and path.with_suffix(".md").read_text() == page


def test_parts_and_deadlines_fit():
    assert [part.name for part in PARTS] == list(gpu_parts.PARTS)
    assert sum(part.seconds for part in (gpu.START, *PARTS)) <= 30 * 60
    docs = (gpu.ROOT / "docs" / "performance.md").read_text()
    assert "\n".join(f"| {part.name} | {part.seconds:g} s | {part.question} |" for part in PARTS) in docs


def test_a_deadline_is_kept_and_what_was_found_stays(tmp_path, stand_in):
    path, parts = tmp_path / "gpu.json", parts_of("good", "hang", "chatter", "die", "fail", "last")
    parts[1:3] = parts_of("hang", "chatter", seconds=3.0)
    assert not gpu.run(path, (), stand_in, parts)
    found = records_in(path)
    assert {name: record["ended"] for name, record in found.items()} == {
        "good": "whole", "hang": "deadline: not done in 3 s", "chatter": "deadline: not done in 3 s",
        "die": "lost: the worker ended by itself (exit status 3)", "fail": "failed: of itself", "last": "whole",
    }  # fmt: skip
    assert {name: record["found"]["first"] for name, record in found.items()} == {name: name for name in found}
    assert all(3 <= found[name]["seconds"] < 50 for name in ("hang", "chatter")), "they would go on for a minute"
    workers = [record["found"]["worker"] for record in found.values()]
    assert workers[0] == workers[1] and len(set(workers)) == 5
    await_end(*workers, found["hang"]["found"]["child"])
    page = path.with_suffix(".md").read_text()
    assert "**die is not whole: lost: the worker ended by itself (exit status 3).**" in page


def test_a_kill_loses_no_record_and_the_next_run_goes_on(tmp_path, stand_in):
    path, names = tmp_path / "gpu.json", ("good", "hang", "last")
    code = "from pathlib import Path; from benchmarks.gpu import Part, run; "
    code += f"run(Path({str(path)!r}), (), {stand_in!r}, [Part(name, 60.0, '') for name in {names!r}])"
    run = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while not path.exists() or "child" not in records_in(path).get("hang", {}).get("found", {}):
        assert time.monotonic() < until
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = records_in(path)
    assert {name: record["ended"] for name, record in before.items()} == {"good": "whole", "hang": "killed"}
    assert before["good"]["found"]["first"] == "good" and before["hang"]["found"]["first"] == "hang"
    await_end(before["hang"]["found"]["worker"], before["hang"]["found"]["child"])

    assert not gpu.run(path, (), stand_in, parts_of("good", "hang", "last", seconds=1.0))
    assert [record["part"] for record in read_json(path)["records"]] == ["good", "hang", "hang", "last"]
    assert read_json(path)["records"][:2] == list(before.values())


def test_parts_that_are_named_are_computed_anew_and_stay_beside_the_first(tmp_path, stand_in):
    path, parts = tmp_path / "gpu.json", parts_of("good", "last")
    assert gpu.run(path, (), stand_in, parts) and gpu.run(path, ["good"], stand_in, parts)
    assert [record["part"] for record in read_json(path)["records"]] == ["good", "last", "good"]


def test_what_does_not_hold_is_said_first(tmp_path, stand_in):
    path = tmp_path / "gpu.json"
    assert not gpu.run(path, (), stand_in, parts_of("wrong", "good"))
    page = path.with_suffix(".md").read_text()
    assert page.index("**wrong does not hold: one is none: 1, at most 0 is right") < page.index("## 1. wrong")


def test_records_of_two_places_are_not_mixed(tmp_path, stand_in):
    path, parts = tmp_path / "gpu.json", parts_of("good", "last")
    gpu.run(path, ["good"], stand_in, parts)
    before = path.read_bytes()
    other = [*stand_in[:2], stand_in[2].replace("a card", "another card")]
    with pytest.raises(InputError, match=r"gpu.json is of .*'a card'.* this is .*'another card'.*--out"):
        gpu.run(path, (), other, parts)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=r"the worker did not start \(lost: .*exit status 1\)"):
        gpu.run(tmp_path / "other.json", (), ["false"], parts)


def test_a_part_that_breaks_ends_the_worker(monkeypatch):
    def broken(s, say):
        say({"so far": 1})
        raise RuntimeError("a kernel is missing\nat length")

    monkeypatch.setitem(gpu_parts.PARTS, "card", broken)
    answers = io.StringIO()
    assert gpu_parts.serve("tiny", ["card", "numbers"], answers) == 1
    _, *messages = map(json.loads, answers.getvalue().splitlines())
    assert messages == [{"found": {"so far": 1}}, {"ended": "failed: RuntimeError: a kernel is missing"}]


def test_losses_of_other_masks_or_rows_are_not_near():
    s = gpu_parts.setting_of("tiny", gpu_parts.torch.device("cpu"))
    model, rows, masks = s.model(), s.data.rows, [gpu_parts.DENSE, *gpu_parts.singles(3)]
    found = gpu_parts.losses_of(Engine(model), rows, masks)
    others = {mask: found[other] for mask, other in zip(masks, [masks[0], *masks[2:], masks[1]], strict=True)}
    turned = {mask: dict(zip(losses, reversed(losses.values()), strict=True)) for mask, losses in found.items()}
    assert gpu_parts.apart(found, found) == 0
    assert min(gpu_parts.apart(others, found), gpu_parts.apart(turned, found)) > gpu_parts.APART
    fewer = {mask: losses for mask, losses in found.items() if mask}
    say = gpu_parts.Say(lambda message: None)
    say.check("all masks", gpu_parts.apart(fewer, found), gpu_parts.APART)
    assert not say._checks[0]["holds"]


def test_old_packages_are_refused_at_once(monkeypatch, capsys):
    gpu.require_packages()
    there = gpu.version
    monkeypatch.setattr(gpu, "version", lambda name: "5.17.0" if name == "transformers" else there(name))
    assert gpu.main([]) == 1
    assert "transformers<6,>=5.24 (5.17.0); pip install" in capsys.readouterr().err
