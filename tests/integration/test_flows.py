"""The flows over a miniature project: a real git and DVC repository with stub stages, and a real
Prefect server.

The stub appends "<stage> <item> <pid>" to log.txt. Its score stage goes on when there is no file
`hold`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    temporary_settings,
)

from blockpruner.config.params import load_params
from blockpruner.config.sections import Target
from blockpruner.core.errors import InputError
from blockpruner.inputs.hub import hub_error
from blockpruner.methods.recipes import training
from blockpruner.store.locks import workspace
from flows import dvc, serve
from flows import prune as prune_module
from flows.new_model import NewModel, add, new_model
from flows.paper import paper
from flows.prune import main, prune
from flows.selection import Selection, choose, choose_study
from tests import forking
from tests.errors import refused
from tests.integration.project import post
from tests.ports import free_port
from tests.processes import alive, processes_in, wait_until

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9/api"
PASSWORD = "me:secret"
PARAMS = """# What is run.
runs: [smollm2]            # names of runs/<name>.yaml
targets:                   # pruned models to build
  smollm2-b2: {run: smollm2, budget: "0.02"}   # the first
  smollm2-b5: {run: smollm2, budget: "0.05"}
report:
  title: SmolLM2-135M, block by block   # shown on top
studies: []
experiments: {}
runtime: {device: cpu}
"""
PIPELINE = """
stages:
  fetch:
    matrix: {run: "${runs}"}
    cmd: python -m stub fetch ${item.run} data/sources/${item.run}.txt
    outs: ["data/sources/${item.run}.txt"]
  score:
    matrix: {run: "${runs}"}
    cmd: python -m stub score ${item.run} data/scores/${item.run}.txt
    params: [report.title]   # something in params.yaml
    deps: ["data/sources/${item.run}.txt"]
    outs: ["data/scores/${item.run}.txt"]
  commit:
    foreach: ${targets}
    do:
      cmd: python -m stub commit ${key} data/plans/${key}.txt
      deps: ["data/scores/${item.run}.txt"]
      outs: ["data/plans/${key}.txt"]
  report:
    cmd: python -m stub report all data/report/report.md
    deps: [data/plans]
    outs: [data/report]
  tables:
    matrix: {study: "${studies}"}
    cmd: python -m stub tables ${item.study} data/tables/${item.study}/report.md
    deps: [data/plans]
    outs: ["data/tables/${item.study}"]
"""
STUB = """
import os, sys, time
from pathlib import Path
from blockpruner.core.progress import observer

stage, item, out = sys.argv[1:]
with open("log.txt", "a") as log:
    log.write(f"{stage} {item} {os.getpid()}\\n")
show = observer()
show.note(f"hello from {stage} {item}")
tries = Path("log.txt").read_text().count(f"{stage} {item} ")
if f"{stage} {item}" == os.environ.get("STUB_FAILS") and tries <= int(os.environ.get("STUB_TIMES", 9)):
    sys.exit(os.environ.get("STUB_SAYS", "out of luck"))
if stage == "score":
    for index in range(2):
        show.begin(f"iteration {index}", index / 2)
        while Path("hold").exists():
            time.sleep(0.02)
        show.end(f"removed mha.{index}", [{"added": "mha.0", "loss": 2.5, "chosen": True}], cached=index == 0)
Path(out).parent.mkdir(parents=True, exist_ok=True)
Path(out).write_text(f"# {stage} {item}")
if stage in ("tables", "report"):
    Path(out).write_text("# title\\n\\n![a](plots/a.png)")
    Path(out).with_name("index.html").write_text("the page")
    (Path(out).parent / "plots").mkdir()
    (Path(out).parent / "plots" / "a.png").write_bytes(b"not really")
"""
STAGES = ["fetch smollm2", "score smollm2", "commit smollm2-b2", "commit smollm2-b5", "report all"]
STARTED = []


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """PREFECT_HOME of these tests: one database, since making it takes 4 s."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def server(home):
    """The API URL of a Prefect server of these tests alone."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
        settings = temporary_settings({PREFECT_HOME: home, PREFECT_API_AUTH_STRING: PASSWORD})
        with settings, serve.prefect_server(port, PASSWORD):
            yield f"http://127.0.0.1:{port}/api"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The miniature project as it is before a test."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copytree(ROOT / "runs", folder / "runs", ignore=shutil.ignore_patterns("dvc.*"))
    for name, text in {
        "stub.py": STUB,
        "dvc.yaml": PIPELINE,
        "params.yaml": PARAMS,
        "log.txt": "",
    }.items():
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(template, tmp_path, home, monkeypatch):
    """A copy of the miniature project as the current folder; the environment names no server."""
    forking.ready()  # from another folder: it is no process of the project
    folder = shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(home))
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")
    monkeypatch.setenv("PYTHONPATH", f"{forking.STARTS}{os.pathsep}{ROOT}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    yield folder
    Path("hold").unlink(missing_ok=True)
    for flow in STARTED:
        flow.kill()
    STARTED.clear()


def start(*options, flow="prune", **environment):
    command, env = [sys.executable, "-m", f"flows.{flow}", *options], {**os.environ, **environment}
    STARTED.append(
        subprocess.Popen(
            command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    )
    return STARTED[-1]


def ran(since=0):
    """ "<stage> <item>" of each stage that was started."""
    return [line.rpartition(" ")[0] for line in Path("log.txt").read_text().splitlines()[since:]]


def last_pid():
    """The process of the stage that was started last."""
    return int(Path("log.txt").read_text().split()[-1])


def start_score(starter):
    """Start something that runs the stage score, and wait until that holds there."""
    Path("hold").touch()
    started = starter()
    wait_until(lambda: "score smollm2" in ran(), "score did not start")
    return started


def run_flow(server, flow, *arguments):
    """A flow's state, and the stages that it started."""
    before = len(ran())
    with temporary_settings({PREFECT_API_URL: server}):
        state = flow(*arguments, return_state=True)
    return state, ran(before)


def ask(url, what):
    """Task runs or artifacts of the newest flow run."""
    newest = post(url, "flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=1)[0]
    return post(url, f"{what}/filter", flow_runs={"id": {"any_": [newest["id"]]}})


def task_states(url, wanted):
    """The names and states of the newest flow run's task runs, once the wanted ones are among them:
    the server hears of them after the flow."""
    found = {}

    def heard():
        found.update({run["name"]: run["state"]["name"] for run in ask(url, "task_runs")})
        return wanted.items() <= found.items()

    wait_until(heard, found)
    return found


def write_json(**files):
    for path, value in files.items():
        Path("data", path).parent.mkdir(parents=True, exist_ok=True)
        Path("data", path).write_text(json.dumps(value))


# --- with a server


def test_make_serve_runs_what_is_asked_for_shows_it_and_leaves_no_process(
    project, tmp_path, monkeypatch
):
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    for name in ("smollm2-dense", "smollm2-b2"):
        write_json(**{f"metrics/{name}.json": {"perplexity": 20.5}})
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", PASSWORD)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
    served = start(
        flow="serve", PREFECT_SERVER_API_PORT=str(port), PREFECT_HOME=str(tmp_path / "home")
    )
    wait_until(lambda: served.poll() is not None or prune_served(url), "no deployment")
    assert served.poll() is None, served.stdout.read()
    (deployment,) = prune_served(url)
    assert not deployment["enforce_parameter_schema"]
    run = post(url, f"deployments/{deployment['id']}/create_flow_run", state={"type": "SCHEDULED"})
    wait_until(
        lambda: post(url, "flow_runs/filter")[0]["state_type"] in ("COMPLETED", "FAILED", "CRASHED")
    )
    assert post(url, "flow_runs/filter")[0]["state"]["message"] == "5 stages: 5 run, 0 cached", run
    assert ran() == STAGES

    expected = {"iteration 0": "Cached", "iteration 1": "Completed", "score@smollm2": "Completed"}
    task_states(url, expected)
    runs = ask(url, "task_runs")
    names = {run["id"]: run["name"] for run in runs}
    inputs = {run["name"]: run["task_inputs"] for run in runs}
    assert [names[p["id"]] for p in inputs["iteration 0"]["__parents__"]] == ["score@smollm2"]
    assert [names[p["id"]] for p in inputs["iteration 1"]["before"]] == ["iteration 0"], "no arrow"
    assert [names[p["id"]] for p in inputs["commit@smollm2-b2"]["wait_for"]] == ["score@smollm2"], (
        "no arrow"
    )
    assert post(url, "flow_runs/filter")[0]["name"] == "all runs"
    data = {artifact["key"]: artifact["data"] for artifact in ask(url, "artifacts")}
    assert data.keys() == {"score-smollm2-table", "results", "report"}
    pages = f"http://127.0.0.1:{port + 1}/report"
    assert (
        data["report"] == f"[The page]({pages}/index.html)\n\n# title\n\n![a]({pages}/plots/a.png)"
    )
    assert '{"model": "smollm2-b2", "perplexity": 20.5, "why": ""}' in data["results"]
    served.send_signal(signal.SIGINT)
    output, _ = served.communicate()
    assert served.returncode == 0 and "Ctrl-C ends all" in output, output
    wait_until(lambda: processes_in(project) <= {os.getpid()}, "a process is left")


def prune_served(url):
    try:
        found = post(url, "deployments/filter")
    except (httpx.HTTPError, KeyError):  # not yet
        return []
    return (
        [each for each in found if each["name"] == "prune"]
        if len(found) == len(serve.FLOWS)
        else []
    )


def test_one_failure_stops_no_other_model_and_is_in_the_table(project, server, monkeypatch):
    for name in ("smollm2-dense", "smollm2-b20"):
        write_json(**{f"metrics/{name}.json": {"perplexity": 40.0}})
    monkeypatch.setenv("STUB_FAILS", "commit smollm2-b10")
    monkeypatch.setenv(
        "STUB_SAYS", "error in stage commit smollm2-b10: budget '0.1' cannot be reached"
    )
    state, started = run_flow(server, prune, Selection(budgets=("0.1", "0.2"), keep_going=True))
    why = "stage commit@smollm2-b10 failed: budget '0.1' cannot be reached"
    assert state.is_failed() and state.message.startswith(
        f"{why}. Finished stages are kept: run again"
    )
    assert "New in params.yaml: target smollm2-b10, target smollm2-b20; delete" in state.message
    assert started[2:] == ["commit smollm2-b10", "commit smollm2-b20", "report all"]
    (table,) = (json.loads(a["data"]) for a in ask(server, "artifacts") if a["key"] == "results")
    assert table[1:] == [
        {"model": "smollm2-b10", "perplexity": None, "why": why},
        {"model": "smollm2-b20", "perplexity": 40.0, "why": ""},
    ]


def test_a_stage_is_tried_three_times_where_the_network_failed(project, server, monkeypatch):
    monkeypatch.setattr(prune_module.run_stage, "retry_delay_seconds", [0, 0])
    monkeypatch.setenv("STUB_FAILS", "fetch smollm2")
    monkeypatch.setenv(
        "STUB_SAYS", f"error in stage fetch smollm2: {hub_error('a/b', OSError('timed out'))}"
    )
    state, started = run_flow(server, prune)
    assert started == ["fetch smollm2"] * 3 and "timed out; check the network" in state.message
    monkeypatch.setenv("STUB_TIMES", "4")
    state, started = run_flow(server, prune)
    assert started == [*STAGES[:1], *STAGES] and state.message == "5 stages: 5 run, 0 cached"


@pytest.mark.usefixtures("true_starts")
def test_cancelled_flow_leaves_no_process_and_no_open_phase_and_locks_the_workspace(
    project, server, capsys
):
    flow = start_score(lambda: start(PREFECT_API_URL=server))
    with temporary_settings({PREFECT_API_URL: server}):
        assert main(["--budget", "0.3"]) == 2
    said = capsys.readouterr().err
    assert f"process {flow.pid} on" in said and "wait for it or stop it" in said
    assert Path("params.yaml").read_text() == PARAMS
    task_states(server, {"iteration 0": "Running"})
    flow.send_signal(signal.SIGTERM)
    flow.communicate()
    assert flow.returncode == 143 and not alive(last_pid())
    states = task_states(server, {"score@smollm2": "Crashed", "iteration 0": "Crashed"})
    assert "Running" not in states.values()


def test_a_study_makes_its_targets_and_tables_once(project, server, monkeypatch):
    targets = {
        "mine": {"run": "smollm2", "budget": "3blocks"},
        "smollm2-b2": {"run": "smollm2", "budget": "0.02"},
    }
    study = {"title": "One", "runs": ["smollm2"], "targets": targets}
    Path("studies").mkdir()
    Path("studies/one.yaml").write_text(yaml.safe_dump(study))
    state, started = run_flow(server, paper, "one")
    assert state.is_completed(), state.message
    assert started == [
        "fetch smollm2",
        "score smollm2",
        "commit mine",
        "commit smollm2-b2",
        "tables one",
    ]
    assert load_params().targets["mine"] == Target(**targets["mine"]) and load_params().studies == (
        "one",
    )
    with monkeypatch.context() as patch:
        patch.setattr(dvc, "repro", None)  # dvc is not even started
        state, started = run_flow(server, paper, "one")
    assert started == [] and state.message == "5 stages: 0 run, 5 cached"
    targets["mine"]["budget"] = "4blocks"
    Path("studies/one.yaml").write_text(yaml.safe_dump(study))
    with refused("target-taken"):
        choose_study("one")


def test_a_new_model_is_written_made_and_pushed(project, server, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_module.push_outputs, "retry_delay_seconds", [0, 0])
    Path(tmp_path / "file").touch()
    remote = [sys.executable, "-m", "dvc", "remote"]
    subprocess.run([*remote, "add", "-q", "team", str(tmp_path / "file" / "remote")], check=True)
    more = {"score": {"unit": "layer"}, "evaluate": {"zero_shot": {"limit": 7}}}
    Path("models/mine").mkdir(parents=True)
    given = {"name": "mine", "model": "models/mine", "budgets": ["2blocks"], "texts": "texts.txt"}
    form = NewModel.model_validate(
        given | {"heldout": "wikitext-2", "train": True, "more": more, "push": "team"}
    )
    state, started = run_flow(server, new_model, form)
    assert state.is_failed() and state.message.startswith("push to the remote 'team' failed: ")
    assert "`dvc push -r team` tries it again. Finished stages are kept: run again" in state.message
    assert started == ["fetch mine", "score mine", "commit mine-2blocks-train", "report all"]
    pushed = [run for run in ask(server, "task_runs") if run["name"] == "push to team"]
    assert [run["run_count"] for run in pushed] == [3]
    assert (
        post(server, "flow_runs/filter", sort="EXPECTED_START_TIME_DESC")[0]["name"]
        == "mine 2blocks train"
    )
    texts = {"source": "mix", "of": [{"source": "path", "path": "texts.txt"}, {"source": "wide"}]}
    assert yaml.safe_load(Path("runs/mine.yaml").read_text()) == {
        "model": {"source": "path", "path": "models/mine"},
        "score": {"method": "recommended", "unit": "layer"},
        "calibration": {"data": texts, "split": "all", "num_rows": 64, "seq_len": 256},
        "train": training("all") | {"data": texts},
        "evaluate": {"perplexity": {"data": {"source": "wikitext-2"}}, "zero_shot": {"limit": 7}},
    }
    subprocess.run([*remote, "modify", "team", "url", str(tmp_path / "remote")], check=True)
    before = Path("runs/mine.yaml").stat().st_mtime_ns
    state, started = run_flow(server, new_model, form)  # the same again
    assert (
        state.is_completed() and not started and Path("runs/mine.yaml").stat().st_mtime_ns == before
    )
    assert any((tmp_path / "remote").rglob("*"))
    with refused("run-taken"):
        add(form.model_copy(update={"heldout": None}))


def test_what_a_worker_made_is_found_by_the_name_of_its_run(project, server, tmp_path):
    """With results that Git did not know, and without a file that is nobody's business. What is
    stale stays stale."""
    origin, clone, command = (
        str(tmp_path / "origin.git"),
        tmp_path / "clone",
        [sys.executable, "-m", "dvc"],
    )
    subprocess.run(
        [*command, "remote", "add", "-q", "--default", "team", str(tmp_path / "remote")], check=True
    )
    subprocess.run([*command, "repro", "-q"], check=True)
    for arguments in (
        "config user.name test",
        "config user.email test@localhost",
        "add -A",
        "commit -qm first",
        f"clone -q --bare . {origin}",
        f"remote add origin {origin}",
        f"clone -q {origin} {clone}",
    ):
        subprocess.run(["git", *arguments.split()], check=True)
    Path("data/plans/smollm2-b2.txt").write_text("not what the stage made")
    Path("notes.txt").touch()
    write_json(**{"metrics/smollm2-b30.json": {"perplexity": 40.0}})
    selection = Selection(budgets=("0.3",), share="origin")
    state, started = run_flow(server, prune, selection)
    assert state.is_completed() and started == ["commit smollm2-b30", "report all"]
    (found,) = subprocess.run(
        ["git", "ls-remote", origin, "refs/exps/*"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    name = found.rpartition("/")[2]
    for arguments in (["pull", "origin", name], ["apply", name]):
        subprocess.run([*command, "exp", *arguments], cwd=clone, check=True)
    assert (clone / "data/plans/smollm2-b30.txt").read_text() == "# commit smollm2-b30"
    assert (clone / "data/plans/smollm2-b2.txt").read_text() == "# commit smollm2-b2"
    assert "smollm2-b30" in load_params(clone / "params.yaml").targets
    assert (clone / "data/metrics/smollm2-b30.json").exists() and not (clone / "notes.txt").exists()


# --- without a server, or with one that has gone


def test_flow_without_a_server_runs_only_what_changed(project):
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    before = len(ran())
    flow = start("--budget", ".02", "--budget", "3blocks")
    output, _ = flow.communicate()
    assert flow.returncode == 0, output
    assert ran(before) == ["commit smollm2-3blocks", "report all"]
    assert (
        output.count("Cached('nothing has changed'") == 3 and "5 stages: 2 run, 3 cached" in output
    )
    assert (
        '\n  smollm2-3blocks: {run: smollm2, budget: "3blocks"}\n'
        in Path("params.yaml").read_text()
    )


def test_stage_goes_on_when_the_server_is_gone(project):
    environment = {
        "BLOCKPRUNER_OBSERVER": "flows.observer:PrefectObserver",
        "PREFECT_API_URL": NOWHERE,
        "BLOCKPRUNER_PREFECT_PARENT": f"{'0' * 32}/{'1' * 32}",
        "DVC_STAGE": "score@smollm2",
    }
    command = [sys.executable, "-m", "stub", "score", "smollm2", "out.txt"]
    stage = subprocess.run(
        command, env={**os.environ, **environment}, text=True, capture_output=True, check=False
    )
    assert stage.returncode == 0 and Path("out.txt").exists(), stage.stdout
    assert stage.stdout.count("the progress does not reach Prefect any more") == 1, stage.stdout
    assert "iteration 1: removed mha.1" in stage.stdout


# --- dvc


@pytest.mark.usefixtures("true_starts")
def test_stage_ends_with_a_killed_flow(project):
    script = (
        "from blockpruner.store.locks import workspace\n"
        "from flows import dvc\n"
        "with workspace('a test') as lock:\n"
        "    for stage in ('fetch@smollm2', 'score@smollm2'): dvc.repro(stage, lock, print)\n"
    )
    as_nohup_does = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    flow = start_score(
        lambda: subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.DEVNULL, preexec_fn=as_nohup_does
        )
    )
    flow.kill()
    flow.wait()
    wait_until(lambda: not alive(last_pid()), "the stage outlived its flow", seconds=60)

    def is_free():
        try:
            with workspace("the next flow"):
                return True
        except InputError:
            return False

    wait_until(is_free, "dvc outlived its flow", seconds=60)


def test_a_dvc_lock_is_written_whole(project):
    """A kill in the middle of the write leaves the old file. dvc writes in place, and most prefixes
    are valid YAML."""
    with workspace("a test") as lock:
        dvc.repro("fetch@smollm2", lock, print)
        whole = Path("dvc.lock").read_bytes()
        Path("dvc.lock").chmod(0o444)  # root may write to it all the same
        inode = Path("dvc.lock").stat().st_ino
        dvc.repro("score@smollm2", lock, print)
    assert Path("dvc.lock").stat().st_ino != inode and Path("dvc.lock").read_bytes().startswith(
        whole
    )

    def half(data, stream):
        stream.write("schema: '2.0'\nstages: {}\n")
        raise KeyboardInterrupt

    before = Path("dvc.lock").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        dvc.dump_whole("dvc.lock", {}, half)
    assert Path("dvc.lock").read_bytes() == before


def test_pipeline_is_in_the_order_of_its_models_and_knows_what_each_stage_needs(project):
    pipeline, chosen = dvc.read_pipeline(), choose(Selection())
    stages = [stage.replace(" ", "@") for stage in STAGES[:-1]]
    assert chosen.stages(pipeline) == stages and chosen.summaries(pipeline) == ["report"]
    assert pipeline["score@smollm2"] == ("fetch@smollm2",) and set(pipeline["report"]) == set(
        stages[2:]
    )
    assert dvc.stale(stages) == set(stages)
