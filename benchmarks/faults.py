"""What is lost when something breaks, and whether a second run ends in the same tables: a matrix, measured.

    python -m benchmarks.faults [word ...]     only the cells whose names hold all these words

The pipeline of the integration tests (a tiny random model, one target that is recovered) is run once undisturbed and
kept as it was before each stage. A cell copies that, breaks one thing in the middle of the stage, lets everything end,
runs the stage again as a flow does, and compares its outputs with the undisturbed ones. All of it is kept in
data/benchmarks/faults/<digest of the code>, and a cell that was good is skipped. Prints a Markdown table; exits with 1
if a cell is not good.

Cells named "every write" break a stage before each of its writes in turn, by a kill or by a cut of power
(`tests.power`). They run the stage in forks of this process, which has loaded what stages load, and keep each write's
result, too.

Signals go to the flow (`flows.prune` with a Prefect server), to its dvc or to its stage, at the stage's middle write.
A stage stops there, between a file's content and its name, until the signal has had its effect. The cells of disks
mount small file systems in a namespace of their own; for that they need root.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import stages
from blockpruner.checkpoints import verification
from blockpruner.store.files import read_json, write_json
from blockpruner.store.journal import Journal
from blockpruner.store.provenance import file_sha256, fingerprint
from tests.integration.project import environment, make_project, set_targets
from tests.ports import free_port
from tests.power import MODES, forked
from tests.processes import processes_in

CODE = [path for folder in ("blockpruner", "stages", "flows") for path in Path(folder).rglob("*.py")]
CODE += [Path("tests/power.py")]  # which numbers the writes
WORK = Path("data/benchmarks/faults").resolve() / fingerprint({str(path): file_sha256(path) for path in CODE})
FOUND = WORK / "faults.json"
TARGETS = {"lora-2": "2blocks"}
STAGES = {
    "fetch@tiny": ("models", "sources"),
    "calibrate@tiny": ("calibration",),
    "score@tiny": ("scores",),
    "baseline@tiny": ("results/tiny-dense",),
    "commit@lora-2": ("plans",),
    "compensate@lora-2": ("compensated",),
    "recover@lora-2": ("recovered",),
    "materialize@lora-2": ("checkpoints",),
    "benchmark@lora-2": ("results/lora-2",),
    "report": ("report",),
}
"""The outputs of each stage, under data/."""

STORES = {"score": "trials", "baseline": "evaluations", "benchmark": "evaluations", "recover": "adapters"}
"""Where a stage keeps its finished units; any other stage is one unit."""

PAUSE = """
import os, sys, time
from pathlib import Path

if sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("stages.") and "FAULT_AT" in os.environ:
    count, at = 0, int(os.environ["FAULT_AT"])  # at: the write to stop at; 0: none, they are only counted
    def counted(original):
        def wrapper(*arguments, **options):
            global count
            count += 1
            if count == at:
                Path("paused").write_text(str(os.getpid()))
                while not Path("go").exists():
                    time.sleep(0.01)
            if not at:
                Path("writes").write_text(str(count))
            return original(*arguments, **options)
        return wrapper
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
"""
"""A sitecustomize that stops a stage at one of its writes."""

FLOW = """
import sys
from flows import prune, selection

stage = sys.argv.pop()
selection.Chosen.stages = lambda chosen: (stage,)
sys.exit(prune.main([]))
"""
REPRO = """
import sys
from flows import dvc

with dvc.workspace("the run after it") as lock:
    try:
        dvc.repro(sys.argv[1], lock, print)
    except dvc.StageError as error:
        sys.exit(str(error))
"""


def before(stage: str) -> Path:
    return WORK / "before" / stage / "project"


def undisturbed() -> None:
    """Run the project undisturbed and keep it before and after each stage; `writes.json` counts each stage's writes."""
    done = after("report")
    if (done / "writes.json").exists():
        return
    for folder in ("hook", "before", "undisturbed"):
        shutil.rmtree(WORK / folder, ignore_errors=True)
    hook = WORK / "hook"
    hook.mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(PAUSE)
    project = make_project(WORK / "undisturbed", TARGETS, num_samples=14)
    set_targets(project, TARGETS, batch_tokens=96)
    writes = {}
    for stage in STAGES:
        shutil.copytree(project, before(stage))
        writes[stage] = run(project, stage, at=0) and int((project / "writes").read_text())
    write_json(done / "writes.json", writes)


def after(stage: str) -> Path:
    following = list(STAGES)[list(STAGES).index(stage) + 1 :]
    return before(following[0]) if following else WORK / "undisturbed" / "project"


def with_hook(at: int, **extra: str) -> dict[str, str]:
    root = os.pathsep.join([str(WORK / "hook"), "."])
    changes = {"PYTHONPATH": root, "FAULT_AT": str(at), "HF_HUB_OFFLINE": "1"}
    no_git = {"GIT_CEILING_DIRECTORIES": str(WORK)}  # else a report would name this repository's commit
    return environment() | changes | no_git | extra


def run(project: Path, stage: str, at: int = -1) -> str:
    """Run a stage through flows.dvc; its output. Raises RuntimeError with it if that fails."""
    command = [sys.executable, "-c", REPRO, stage]
    result = subprocess.run(command, cwd=project, env=with_hook(at), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    return result.stdout


def content(project: Path, stage: str) -> dict[str, Any]:
    """A stage's outputs by file."""
    files = (path for out in STAGES[stage] for path in sorted((project / "data" / out).rglob("*")) if path.is_file())
    return {str(path.relative_to(project)): path.read_bytes() for path in files}


def units(project: Path, stage: str) -> dict[str, Any]:
    """The finished units of a stage's store: a trial's log line by its place, a file by its inode and time."""
    folder = project / "data" / STORES.get(stage.partition("@")[0], "none")
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        found |= {f"{path.name}:{i}": line for i, line in enumerate(path.read_text().splitlines()[1:])}
    for path in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
        found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until the condition held; None if it did not."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            return None
        time.sleep(0.01)
    return time.monotonic() - started


def afterwards(project: Path, stage: str, said: str, finished: Iterable[str] = ()) -> dict[str, Any]:
    """Run the stage again and compare.

    Args:
        said: the output of what was broken.
        finished: the units that were finished before it was broken.
    """
    reference, earlier = after(stage), len(units(before(stage), stage))
    kept, has_store = units(project, stage), stage.partition("@")[0] in STORES
    total = len(units(reference, stage)) - earlier if has_store else 1
    here = len(kept) - earlier if has_store else int(content(project, stage) == content(reference, stage))
    run(project, stage)
    final = units(project, stage)
    again = len(final) - len(units(reference, stage)) if stage.startswith("score") else 0
    again += sum(final.get(name) != unit for name, unit in kept.items())
    return {
        "kept": f"{here} of {total}",
        "twice": again,
        "lost": len(set(finished) - kept.keys()),
        "same": content(project, stage) == content(reference, stage),
        "traceback": "Traceback" in said,
        "said": last_word(said),
    }


OURS = re.compile("error in stage|server went away|interrupted|set aside|restored|is in use by|waiting for it|was lost")


def last_word(said: str) -> str:
    """The line that tells a person what happened."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line for line in lines if OURS.search(line)]
    telling = own[:1] or [line for line in lines if re.search(r"failed|cannot|ERROR", line)] or lines or [""]
    return telling[-1].replace(str(WORK), "…").replace("|", "/")[:230]


# --- cells: every write ---------------------------------------------------------------------------------------------

PARTS = ("data", "runs", "params.yaml", "dvc.yaml")
"""What a stage reads and writes in a project."""

LOADED = (
    "lm_eval.evaluator", "lm_eval.models.huggingface", "matplotlib.pyplot", "peft",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""Modules that take a stage seconds to load."""


def every_write(name: str, stage: str, mode: str) -> dict[str, Any]:
    """Break the stage before each of its writes, run it again each time, and compare its outputs."""
    place = WORK / "writes" / f"{stage}-{mode}"
    project, log, kept = place / "project", place / "log", place / "cuts.json"
    place.mkdir(parents=True, exist_ok=True)
    work, reference = in_process(stage), content(after(stage), stage)
    found_good = (read_json(kept) if kept.exists() else {}).items()
    cuts: dict[str, Any] = {cut: facts for cut, facts in found_good if facts["good"]}
    code, writes = forked(restored(project, stage), work, log)
    if code or content(project, stage) != reference:
        raise RuntimeError(f"undisturbed, exit code {code}: {log.read_text()[-900:]}")
    total = len(units(project, stage))
    for cut in range(1, writes + 1):
        if str(cut) in cuts:
            continue
        broken, said = forked(restored(project, stage), work, log, cut, mode)[0], log.read_text()
        if not broken:  # it had fewer writes this time: how often a log is synced depends on time
            writes = cut - 1
            break
        promised, found = int((place / "promised").read_text() or 0), len(units(project, stage))
        lost = max(0, promised - found + len(units(before(stage), stage)))
        again = forked(project, work, log)[0]
        said += log.read_text()
        same, twice = content(project, stage) == reference, len(units(project, stage)) - total
        good = broken == -signal.SIGKILL and not again and same and not lost and twice <= 1
        good = good and "Traceback" not in said
        facts = {"broken": broken, "again": again, "same": same, "lost": lost, "twice": twice, "said": last_word(said)}
        cuts[str(cut)] = {"good": good, **facts}
        write_json(kept, cuts)
    bad = [cut for cut, facts in cuts.items() if not facts["good"]]
    shutil.rmtree(project)
    return {
        "flow": f"{writes} writes",
        "kept": f"{writes - len(bad)} of {writes}",
        "twice": max(facts["twice"] for facts in cuts.values()),
        "lost": sum(facts["lost"] for facts in cuts.values()),
        "same": not bad,
        "traceback": False,
        "said": f"not good before writes {', '.join(bad)}: {cuts[bad[0]]}" if bad else "",
    }


def restored(project: Path, stage: str) -> Path:
    """The project as it was before the stage, without code."""
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    for part in PARTS:
        source = before(stage) / part
        if source.is_dir():
            shutil.copytree(source, project / part)
        elif source.exists():
            shutil.copy(source, project / part)
    return project


def in_process(stage: str) -> Callable[[], object]:
    """A stage as a function for a fork; what it loads is loaded here. `promised` beside the project counts the log
    lines that a sync has put on disk."""
    os.environ.update(with_hook(-1) | {"HF_MODULES_CACHE": str(WORK / "modules"), "TOKENIZERS_PARALLELISM": "false"})
    for loaded in LOADED:
        import_module(loaded)
    module, _, item = stage.partition("@")
    main = import_module(f"stages.{module}").main

    def work() -> None:
        import_module("torch").set_num_threads(1)
        append, count = Journal.append, 0

        def promised(journal: Journal, entry: Mapping[str, Any]) -> None:
            nonlocal count
            synced = journal._synced
            append(journal, entry)
            count += 1
            if journal._synced != synced:
                Path("../promised").write_text(str(count))

        Path("../promised").write_text("0")
        Journal.append = promised  # type: ignore[method-assign]
        verification.subprocess = SimpleNamespace(run=run_script)  # type: ignore[attr-defined]
        sys.argv = [f"stages.{module}", *([item] if item else [])]
        stages.run(module, main)

    return work


def run_script(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """`python -I script arguments` in a fork instead of a fresh process, for a verification."""
    output = Path(f"../script-{os.getpid()}")
    child = os.fork()
    if child == 0:
        with open(output, "w") as stream:
            os.dup2(stream.fileno(), 1)
        sys.stdout, sys.argv = open(1, "w", closefd=False), command[2:]  # noqa: SIM115 (the fork's own)
        for name in [name for name in sys.modules if name.partition(".")[0] == "blockpruner"]:
            del sys.modules[name]  # the script makes sure that it does without
        code = 1
        try:
            runpy.run_path(command[2], run_name="__main__")
            code = 0
        except SystemExit as error:
            code = int(bool(error.code))
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = output.read_text()
    output.unlink()
    return subprocess.CompletedProcess(command, code, said, "")


# --- cells: signals -------------------------------------------------------------------------------------------------


@contextmanager
def copied(stage: str, name: str) -> Iterator[Path]:
    folder = WORK / "cells" / re.sub(r"\W+", "-", name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(before(stage), folder / "project")
    try:
        yield folder / "project"
    finally:
        for pid in processes_in(folder / "project"):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


ENDS = {
    (signal.SIGTERM, "flow"): 143,
    (signal.SIGINT, "flow"): 130,
    (signal.SIGKILL, "flow"): -signal.SIGKILL,
    (signal.SIGINT, "dvc"): 0,  # dvc leaves Ctrl-C to its stage, which did not get it
}
"""Exit codes of the flow; 1 in all other cells, in which a stage fails."""


def start(project: Path, command: list[str], at: int, **extra: str) -> tuple[subprocess.Popen[str], Path]:
    """Start a command that stops at a write; the process, and the file with its output."""
    log = project / "flow.log"
    reset = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with open(log, "w") as output:
        options: dict[str, Any] = {"stdout": output, "stderr": output, "text": True, "preexec_fn": reset}
        command = [sys.executable, *command]
        return subprocess.Popen(command, cwd=project, env=with_hook(at, **extra), **options), log


def signalled(name: str, stage: str, target: str, number: signal.Signals) -> dict[str, Any]:
    middle = read_json(after("report") / "writes.json")[stage] // 2
    with copied(stage, name) as project:
        flow, log = start(project, ["-c", FLOW, stage], max(1, middle), **server())
        stage_pid = paused(project, flow, log)
        pids, finished = {"flow": flow.pid, "dvc": dvc_of(project), "stage": stage_pid}, units(project, stage)
        os.kill(pids[target], number)
        unheard = target == "dvc" and number is not signal.SIGTERM  # the stage lives on, and the flow waits for it
        ended = wait_for(lambda: flow.poll() is not None and not processes_in(project), 1 if unheard else 60)
        (project / "go").touch()
        closed = wait_for(lambda: flow.poll() is not None, 300)
        free = wait_for(lambda: not processes_in(project), 30)
        facts = {
            "flow": f"{flow.returncode} after {ended:.1f} s" if ended is not None else f"{flow.returncode}, went on",
            "left": list(processes_in(project)) if free is None or closed is None else [],
            "expected": flow.returncode == ENDS.get((number, target), 1),
        }
        return facts | afterwards(project, stage, log.read_text(), finished)


def paused(project: Path, process: subprocess.Popen[Any], log: Path) -> int:
    """Wait until a stage, which `process` is or has started, is at its write; its process."""
    mark = project / "paused"
    wait_for(lambda: process.poll() is not None or (mark.exists() and bool(mark.read_text())), 300)
    if not mark.exists():
        raise RuntimeError(f"no stage came to its write: {log.read_text()}")
    return int(mark.read_text())


def dvc_of(project: Path) -> int:
    (pid,) = (pid for pid in processes_in(project) if b"flows.dvc" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return pid


SERVER = ExitStack()
RUNNING: list[subprocess.Popen[bytes]] = []
HOME = WORK / "prefect"
URL = f"http://127.0.0.1:{free_port()}/api"
PASSWORD = "me:secret"


def server() -> dict[str, str]:
    """Variables that name a Prefect server of this script's own, which runs until `stop_server`."""
    variables = {"PREFECT_HOME": str(HOME), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    variables["PREFECT_API_AUTH_STRING"] = PASSWORD
    os.environ.update(variables)
    if not RUNNING:
        from flows.serve import prefect_server  # takes 3 s

        RUNNING.append(SERVER.enter_context(prefect_server(URL, PASSWORD)))
    return variables | {"PREFECT_API_URL": URL}


def stop_server() -> None:
    """Kill it."""
    if RUNNING:
        os.killpg(RUNNING.pop().pid, signal.SIGKILL)
        SERVER.close()


# --- cells: disks ---------------------------------------------------------------------------------------------------


def in_namespace(name: str) -> dict[str, Any]:
    """The cell in a process with mounts of its own."""
    command = ["unshare", "--mount", sys.executable, "-m", "benchmarks.faults", "--inside", name]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if result.returncode:
        raise RuntimeError(f"{result.stderr[-600:]} (mounting needs root and mount namespaces)")
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return facts


def pages(project: Path) -> int:
    """Pages that the project takes; an output and its copy in DVC's cache are one file."""
    return sum(-(-len(content) // 4096) for content in {p.read_bytes() for p in project.rglob("*") if p.is_file()})


def full(name: str, stage: str, share: float) -> dict[str, Any]:
    """The project on a tmpfs that has room for a share of what the stage writes."""
    grows = pages(after(stage)) - pages(before(stage))
    with copied(stage, name) as origin:
        project = origin.with_name("small") / "project"
        project.parent.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", project.parent], check=True)
        shutil.copytree(origin, project)
        filler, room = project.parent / "filler", int(grows * share) * 4096
        free = shutil.disk_usage(project.parent).free
        filler.write_bytes(bytes(free - room))
        said = attempt(project, stage)
        filler.unlink()
        # dvc goes on without a copy in its cache, and prints that
        seen = UNHARMED not in said or "No space left" in said
        facts = {"flow": f"room for {room >> 10} KiB of {grows * 4} KiB", "expected": seen}
        facts |= afterwards(project, stage, said)
        subprocess.run(["umount", "--lazy", project.parent], check=True)
        return facts


def read_only(name: str, stage: str) -> dict[str, Any]:
    """data/ mounted read-only."""
    with copied(stage, name) as project:
        data = project / "data"
        data.mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", data, data], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", data], check=True)
        said = attempt(project, stage)
        subprocess.run(["umount", data], check=True)
        return {"flow": "data/ read-only", "expected": UNHARMED not in said} | afterwards(project, stage, said)


UNHARMED = "it did not fail: "


def attempt(project: Path, stage: str) -> str:
    """The output of a run that is to fail."""
    try:
        return UNHARMED + run(project, stage)
    except RuntimeError as error:
        return str(error)


# --- cells: damaged files -------------------------------------------------------------------------------------------


def damaged(name: str, stage: str, pattern: str, thirds: int) -> dict[str, Any]:
    """A file that a stage reads is cut short; the stage alone is run, then what a person would run: `dvc repro`."""
    with copied(stage, name) as project:
        if pattern.startswith("data/evaluations/"):  # it is there once the stage has run
            shutil.rmtree(project)
            shutil.copytree(after(stage), project)
        (path,) = sorted(project.glob(pattern))[:1]
        content = path.read_bytes()
        path.unlink()  # the DVC cache's copy is a hard link
        path.write_bytes(content[: len(content) * thirds // 3])
        module, _, item = stage.partition("@")
        command = [sys.executable, "-m", f"stages.{module}", *([item] if item else [])]
        alone = subprocess.run(command, cwd=project, env=with_hook(-1), capture_output=True, text=True, check=False)
        facts = {"flow": f"the stage ends with {alone.returncode}"}
        repro = [sys.executable, "-m", "dvc", "repro", "--quiet", stage]
        subprocess.run(repro, cwd=project, env=with_hook(-1), capture_output=True, check=True)
        return facts | afterwards(project, stage, alone.stdout + alone.stderr)


DAMAGED = {
    "texts": ("calibrate@tiny", "data/sources/tiny/calibration.parquet"),
    "calibration rows": ("score@tiny", "data/calibration/tiny/rows.parquet"),
    "held-out texts": ("benchmark@lora-2", "data/sources/tiny/perplexity.parquet"),
    "items": ("benchmark@lora-2", "data/sources/tiny/tasks/piqa/validation.parquet"),
    "an iteration's table": ("commit@lora-2", "data/scores/tiny/*/iteration_001.parquet"),
    "a plan's iterations": ("report", "data/plans/lora-2/iterations.parquet"),
    "a result's items": ("report", "data/results/lora-2/items.parquet"),
    "a stored result": ("benchmark@lora-2", "data/evaluations/*.parquet"),
    "weights": ("materialize@lora-2", "data/models/tiny/model.safetensors"),
}
DVC_FILES = {"dvc.lock": "dvc.lock", "DVC's rwlock": ".dvc/tmp/rwlock", "params.yaml": "params.yaml"}


def emptied(name: str, file: str) -> dict[str, Any]:
    """A file that DVC writes in place was cut to nothing; then a flow."""
    stage = "commit@lora-2"
    with copied(stage, name) as project:
        (project / file).write_bytes(b"")
        said = attempt(project, stage)
        if file == "params.yaml":
            shutil.copy(before(stage) / file, project / file)
        return {"flow": "a flow after it"} | afterwards(project, stage, said)


# --- cells: servers and workers -------------------------------------------------------------------------------------


def server_down(name: str, up_again: float | None) -> dict[str, Any]:
    """The Prefect server killed while a stage runs, and started again after some seconds (None: when all is over)."""
    stage = "score@tiny"
    with copied(stage, name) as project:
        flow, log = start(project, ["-c", FLOW, stage], 40, **server())
        paused(project, flow, log)
        stop_server()
        if up_again is not None:
            time.sleep(up_again)
            server()
        (project / "go").touch()
        ended = wait_for(lambda: flow.poll() is not None, 240)
        free = wait_for(lambda: not processes_in(project), 30)
        facts = {
            "flow": f"{flow.returncode} after {ended:.0f} s" if ended is not None else "did not end",
            "left": list(processes_in(project)) if free is None else [],
            "expected": flow.returncode == int(up_again is None),
        }
        facts |= afterwards(project, stage, log.read_text())
        return facts | ({"traceback": False} if up_again is None else {})  # Prefect logs its own before our line


def worker_lost(name: str) -> dict[str, Any]:
    """One of two Ray workers killed while it scores."""
    stage = "score@tiny"
    with copied(stage, name) as project:
        set_targets(project, TARGETS, batch_tokens=96, executor="ray", workers=2)
        code, log = start(project, ["-m", "stages.score", "tiny"], 40)
        paused(project, code, log)
        os.kill(ray_workers(code.pid)[0], signal.SIGKILL)
        (project / "go").touch()
        code.wait()
        said = log.read_text()
        facts = {"flow": str(code.returncode), "expected": code.returncode == 0 and said.count("was lost") == 1}
        return facts | afterwards(project, stage, said)


def ray_workers(root: int) -> list[int]:
    """Processes below `root` that are Ray workers of ours."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    below, grown = {root}, True
    while grown:
        more = {int(pid) for pid, ppid, *_ in rows if int(ppid) in below} - below
        below, grown = below | more, bool(more)
    return [int(pid) for pid, _, *rest in rows if int(pid) in below and "ray::Replica" in "".join(rest)]


# --- cells: several at once -----------------------------------------------------------------------------------------


def together(places: Iterable[Path], command: list[str], **extra: str) -> list[tuple[int, str]]:
    """Start a command in several places at once; the exit code and output of each."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command, environment = [sys.executable, *command], with_hook(-1, **extra)
    started = [subprocess.Popen(command, cwd=place, env=environment, **options) for place in places]
    outputs = [process.communicate()[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def ten_flows(name: str) -> dict[str, Any]:
    """Ten `python -m flows.prune` on an empty workspace at once."""
    reference = after("report")
    with copied(next(iter(STAGES)), name) as project:
        ended = together([project] * 10, ["-m", "flows.prune"], **server())
        codes = sorted(code for code, _ in ended)
        refused = [last_word(output) for code, output in ended if code == 2 and "is in use by" in output]
        same = all(content(project, s) == content(reference, s) for s in STAGES if s != "report")
        return {
            "flow": f"exit codes {codes}",
            "kept": "",
            "twice": len(units(project, "score@tiny")) - len(units(reference, "score@tiny")),
            "same": same and codes == [0] + [2] * 9 and len(refused) == 9,
            "traceback": any("Traceback" in output for _, output in ended),
            "said": refused[0] if refused else "",
            "left": list(processes_in(project)),
        }


def two_scores(name: str, workspaces: int) -> dict[str, Any]:
    """Two score stages at once: in one workspace, or in two on one trial store."""
    stage, reference = "score@tiny", after("report")
    with copied(stage, name) as project, copied(stage, name + " too") as other:
        places = [project, other][:workspaces] * (3 - workspaces)
        store = str(project / "data/trials")
        ended = together(places, ["-m", "stages.score", "tiny"], BLOCKPRUNER_TRIALS=store)
        waited = [line for _, output in ended for line in output.splitlines() if "waiting for it" in line]
        return {
            "flow": f"exit codes {[code for code, _ in ended]}",
            "expected": not any(code for code, _ in ended) and len(waited) == 1,
            "kept": "",
            "twice": len(units(project, stage)) - len(units(reference, stage)),
            "same": all(content(place, stage) == content(reference, stage) for place in places),
            "traceback": any("Traceback" in output for _, output in ended),
            "said": last_word(waited[0]) if waited else "neither had to wait",
        }


def two_repros(name: str) -> dict[str, Any]:
    """Two plain `dvc repro` of one workspace at once."""
    stage = "score@tiny"
    with copied(stage, name) as project:
        ended = together([project] * 2, ["-m", "dvc", "repro", "--single-item", stage])
        codes, refused = sorted(code for code, _ in ended), [last_word(output) for code, output in ended if code]
        facts = {"flow": f"exit codes {codes}", "expected": codes == [0, 255]}
        return facts | afterwards(project, stage, ended[0][1]) | {"said": (refused or ["both ran"])[0]}


def cells() -> dict[str, Callable[[str], dict[str, Any]]]:
    """Every cell by name: a function of its name."""
    found: dict[str, Callable[[str], dict[str, Any]]] = {}
    for stage in STAGES:  # first: a fork wants a process without threads, and the server brings some
        for mode in MODES:
            found[f"every write, {mode}, {stage}"] = partial(every_write, stage=stage, mode=mode)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        for target in ("flow", "dvc", "stage"):
            for stage in STAGES:
                cell = partial(signalled, stage=stage, target=target, number=number)
                found[f"{number.name}, {target}, {stage}"] = cell
    for stage in STAGES:
        found[f"disk full, in the stage, {stage}"] = partial(full, stage=stage, share=0.6)
        found[f"disk full, at its end, {stage}"] = partial(full, stage=stage, share=0.9)
        found[f"read-only, data/, {stage}"] = partial(read_only, stage=stage)
    for what, (stage, pattern) in DAMAGED.items():
        found[f"truncated, {what}, {stage}"] = partial(damaged, stage=stage, pattern=pattern, thirds=2)
        found[f"empty, {what}, {stage}"] = partial(damaged, stage=stage, pattern=pattern, thirds=0)
    for what, file in DVC_FILES.items():
        found[f"empty, {what}, commit@lora-2"] = partial(emptied, file=file)
    found["server, down for 5 s, score@tiny"] = partial(server_down, up_again=5.0)
    found["server, down for good, score@tiny"] = partial(server_down, up_again=None)
    found["worker lost, one of 2 of Ray, score@tiny"] = worker_lost
    found["at once, ten flows, everything"] = ten_flows
    found["at once, two stages, score@tiny"] = partial(two_scores, workspaces=1)
    found["at once, two workspaces on one store, score@tiny"] = partial(two_scores, workspaces=2)
    found["at once, two dvc repro, score@tiny"] = two_repros
    return found


def is_good(facts: dict[str, Any]) -> bool:
    unlost = not facts.get("lost") and facts["twice"] <= 1
    return facts["same"] and facts.get("expected", True) and unlost and not facts["traceback"] and not facts.get("left")


def table(found: dict[str, Any]) -> str:
    """A line for each cell: the finished units that the second run found, and what a person sees."""
    lines = ["| what | where | stage | kept | twice | the flow | what a person sees |", "|---|---|---|---|---|---|---|"]
    for name, facts in found.items():
        numbers = (facts["kept"], str(facts["twice"])) if is_good(facts) else ("**NO**", str(facts["twice"]))
        lines.append(f"| {' | '.join([*name.split(', '), *numbers, facts['flow'], facts['said']])} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    wanted = {name: cell for name, cell in cells().items() if all(word in name for word in words)}
    undisturbed()
    found: dict[str, Any] = read_json(FOUND) if FOUND.exists() else {}
    for name, cell in wanted.items():
        if name in found and is_good(found[name]):
            continue
        started = time.monotonic()
        try:
            inside = name.startswith(("disk full", "read-only"))
            facts = in_namespace(name) if inside else cell(name)
        except Exception as error:
            facts = {"flow": f"this script: {error!r}"[:1500], "kept": "", "twice": 99, "same": False}
            facts |= {"traceback": False, "said": ""}
        found[name] = facts | {"seconds": round(time.monotonic() - started, 1)}
        write_json(FOUND, found)
        print(f"{'good' if is_good(facts) else 'BAD '} {name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    print(table({name: found[name] for name in wanted}))
    return int(not all(is_good(found[name]) for name in wanted))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its server ends with it
    try:
        if sys.argv[1:2] == ["--inside"]:
            print(json.dumps(cells()[sys.argv[2]](sys.argv[2])))
        else:
            sys.exit(main(sys.argv[1:]))
    finally:
        stop_server()
