"""The flow over a miniature project: a real git and DVC repository with stub stages, and a real Prefect server.

The stub appends "<stage> <item> <pid>" to log.txt: a test sees what ran without asking the flow. Its score stage goes
on when there is no file `hold`: no test depends on how fast the machine is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from dvc.lock import Lock
from prefect import Task
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Cancelled, Completed, Failed, Running
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

from blockpruner.core.errors import InputError
from blockpruner.params import load_params, run_names
from blockpruner.store.locks import WORKSPACE
from flows import dvc, serve
from flows import new_model as form_module
from flows import prune as prune_module
from flows.new_model import NewModel, add, check, new_model, require_fit
from flows.prune import main, prune
from flows.selection import RunGrid, Selection, choose
from flows.sweep import left_out
from flows.sweep import main as sweep_main
from tests.integration.project import post
from tests.ports import free_port
from tests.processes import alive, wait_until

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9/api"
PASSWORD = "me:secret"
PARAMS = """# What is run.
runs: [smollm2]            # names of runs/<name>.yaml
targets:                   # pruned models to build
  smollm2-0.02: {run: smollm2, budget: "0.02"}   # the first
  smollm2-0.05: {run: smollm2, budget: "0.05"}
report:
  title: SmolLM2-135M, block by block   # shown on top
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
if f"{stage} {item}" == os.environ.get("STUB_FAILS"):
    sys.exit(os.environ.get("STUB_SAYS", "out of luck"))
if stage == "score":
    for index in range(2):
        show.begin(f"iteration {index}", index / 2)
        for step in range(2):
            while Path("hold").exists():
                time.sleep(0.02)
            show.advance(step + 1, 2, f"without mha.{step}")
        losses = {"mha.0": 2.5, "mha.1": float("nan")}
        rows = [{"added": n, "loss": v, "rows": "2/2", "chosen": n == f"mha.{index}"} for n, v in losses.items()]
        show.end(f"removed mha.{index}", rows, cached=index == 0)
Path(out).parent.mkdir(parents=True, exist_ok=True)
Path(out).write_text(f"# {stage} {item}")
if stage in ("tables", "report"):
    Path(out).write_text("# title\\n\\n![a](plots/a.png)")
    (Path(out).parent / "plots").mkdir()
    (Path(out).parent / "plots" / "a.png").write_bytes(b"not really")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """PREFECT_HOME of these tests: one database, since making it takes 4 s."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def server(home):
    """The API URL of a Prefect server of these tests alone."""
    url = f"http://127.0.0.1:{free_port()}/api"
    settings = {PREFECT_HOME: home, PREFECT_API_AUTH_STRING: PASSWORD}
    with pytest.MonkeyPatch.context() as patch, temporary_settings(settings):
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
        with serve.prefect_server(url, PASSWORD):
            yield url


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The miniature project as it is before a test."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copytree(ROOT / "runs", folder / "runs", ignore=shutil.ignore_patterns("dvc.*"))
    files = {"stub.py": STUB, "dvc.yaml": PIPELINE, "params.yaml": PARAMS, "log.txt": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(template, tmp_path, home, monkeypatch):
    """A copy of the miniature project as the current folder; the environment names no server."""
    folder = shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(home))
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    yield folder
    Path("hold").unlink(missing_ok=True)
    for flow in STARTED:
        flow.kill()
    STARTED.clear()


STARTED = []


def start(*options, flow="prune", **environment):
    command, env = [sys.executable, "-m", f"flows.{flow}", *options], {**os.environ, **environment}
    STARTED.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
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


def workspace_is_free():
    try:
        with dvc.workspace("the next flow"):
            return True
    except InputError:
        return False


def ask(url, what):
    """Task runs or artifacts of the newest flow run."""
    newest = post(url, "flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=1)[0]
    return post(url, f"{what}/filter", flow_runs={"id": {"any_": [newest["id"]]}})


def task_runs(url, wanted):
    """Task runs of the newest flow run, as soon as their names, sorted, and states, as "name: state", are the wanted
    ones: the server hears of them after the flow."""
    found = []

    def heard():
        found[:] = ask(url, "task_runs")
        return wanted(sorted(run["name"] for run in found), {f"{run['name']}: {run['state']['name']}" for run in found})

    wait_until(heard, found)
    return found


def parents_of(runs):
    """Names of the task runs that each task run is nested under."""
    names = {run["id"]: run["name"] for run in runs}
    return {run["name"]: [names[p["id"]] for p in run["task_inputs"].get("__parents__", [])] for run in runs}


# --- with a server ------------------------------------------------------------------------------------------------


def test_only_its_own_pages_may_use_the_server(server):
    asked = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "content-type"}
    for origin, allowed in ((server.removesuffix("/api"), True), ("https://elsewhere.example", False)):
        answer = httpx.options(f"{server}/deployments/filter", headers={"Origin": origin} | asked, timeout=60)
        assert ("access-control-allow-origin" in answer.headers) == allowed
    answer = httpx.post(f"{server}/flow_runs/filter", json={}, timeout=60)
    assert answer.status_code == 403, "a form of another page could post"


def test_the_server_asks_for_its_password_under_its_own_names_only(project, server, capsys):
    """A page of another name that leads to this machine is of the same origin as what it asks."""
    for host, path, status in (
        ("localhost:4200", "health", 200), ("localhost:4200", "admin/version", 401), ("elsewhere:4200", "health", 400),
        ("elsewhere:4200", "csrf-token?client=test", 400),
    ):  # fmt: skip
        assert httpx.get(f"{server}/{path}", headers={"Host": host}, timeout=60).status_code == status
    with temporary_settings({PREFECT_API_URL: server, PREFECT_API_AUTH_STRING: "me:guess"}):
        assert main([]) == 2
    said = capsys.readouterr().err
    assert 'export PREFECT_API_AUTH_STRING="$(cat' in said and said.count("\n") == 1 and not ran()


def test_runs_that_a_killed_runner_left_open_are_ended(project, server):
    """Those of the deployments only: another flow may run in a terminal."""
    deployments = serve.deployments()
    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        served = deployments[0].apply()
        lost = client.create_flow_run_from_deployment(served, state=Running())
        part = client.create_task_run(Task(post, name="score"), lost.id, dynamic_key="1", state=Running())
        waiting = client.create_flow_run_from_deployment(served)
        elsewhere = client.create_flow_run(prune, state=Running())
        serve.end_lost_runs(server)
        states = {run.id: client.read_flow_run(run.id).state for run in (lost, waiting, elsewhere)}
        assert [state.name for state in states.values()] == ["Crashed", "Scheduled", "Running"]
        assert "Retry" in str(states[lost.id]) and client.read_task_run(part.id).state_name == "Crashed"
        client.delete_deployment(served)
        client.set_flow_run_state(elsewhere.id, Cancelled(), force=True)


def write_json(**files):
    for path, value in files.items():
        Path("data", path).parent.mkdir(parents=True, exist_ok=True)
        Path("data", path).write_text(json.dumps(value))


def test_flow_shows_stages_iterations_and_artifacts(project, server):
    for name, perplexity in {"smollm2-dense": 20.5, "smollm2-0.02": 22.5}.items():
        write_json(**{f"metrics/{name}.json": {"perplexity": perplexity}})
    flow = start(PREFECT_API_URL=server)
    output, _ = flow.communicate()
    assert flow.returncode == 0, output
    stages = ["fetch smollm2", "score smollm2", "commit smollm2-0.02", "commit smollm2-0.05", "report all"]
    assert ran() == stages
    assert all(output.count(f"hello from {stage}") == 1 for stage in stages)

    expected = {*(stage.replace(" ", "@") for stage in stages[:-1]), "report", "iteration 0", "iteration 1"}
    done = {f"{name}: {state}" for name in expected for state in ("Completed", "Cached")}
    runs = task_runs(server, lambda names, states: names == sorted(expected) and states <= done)
    states, parents = {run["name"]: run["state"]["name"] for run in runs}, parents_of(runs)
    assert states["iteration 0"] == "Cached" and states["iteration 1"] == states["score@smollm2"] == "Completed"
    assert parents["iteration 0"] == parents["iteration 1"] == ["score@smollm2"]

    artifacts = ask(server, "artifacts")
    assert Counter((artifact["type"], artifact["key"]) for artifact in artifacts) == {
        ("progress", "score-smollm2-progress"): 2,
        ("table", "score-smollm2-table"): 2,
        ("markdown", "score-smollm2-pictures"): 1,
        ("table", "results-smollm2"): 1,
        ("markdown", "report"): 1,
        ("markdown", "report-page"): 1,
    }
    data = {artifact["key"]: artifact["data"] for artifact in artifacts}
    assert (project / "data/report/index.html").as_uri() in data["report-page"]
    assert data["report"] == "# title\n\n![a](data:image/png;base64,bm90IHJlYWxseQ==)"
    pictures = r"!\[scores\]\(data:image/png;base64,iVBOR[^)]+\)\n\n!\[blocks\]\(data:image/png;base64,iVBOR[^)]+\)"
    assert re.fullmatch(pictures, data["score-smollm2-pictures"])
    assert '{"metric": "perplexity", "smollm2-dense": 20.5, "smollm2-0.02": 22.5}' in data["results-smollm2"]
    assert all(a["data"] == 100.0 for a in artifacts if a["type"] == "progress")


def test_sweep_goes_run_by_run_and_one_failure_stops_no_other(project, server, monkeypatch, capsys):
    shutil.copy("runs/smollm2.yaml", "runs/other.yaml")
    targets = ["smollm2-0.1", "smollm2-0.2", "other-0.1", "other-0.2"]
    for name, perplexity in {"smollm2-dense": 20.0, "other-dense": 30.0, **dict.fromkeys(targets, 40.0)}.items():
        speed = {"speedup_generation": 1.1} if name in targets else {}
        write_json(**{f"metrics/{name}.json": {"perplexity": perplexity, "average": 0.5}})
        write_json(**{f"evidence/{name}/speed.json": {"speed": speed}, f"plans/{name}/plan.json": {"ratio": 0.123}})
    monkeypatch.setenv("STUB_FAILS", "commit smollm2-0.1")
    monkeypatch.setenv("STUB_SAYS", "error in stage commit smollm2-0.1: budget '0.1' is not in this sequence")
    with temporary_settings({PREFECT_API_URL: server}):
        assert sweep_main(["--run", "smollm2", "--run", "other", "--budget", "0.1", "--budget", "0.2"]) == 1
    message = capsys.readouterr().err.strip()
    assert "not complete: smollm2-0.1. Finished" in message
    assert message.endswith("params.yaml is as before, with smollm2-0.2, other-0.1, other-0.2")
    assert set(load_params().targets) == {"smollm2-0.02", "smollm2-0.05", *targets[1:]}
    assert ran() == [
        *("fetch smollm2", "score smollm2", "commit smollm2-0.1", "commit smollm2-0.2"),
        *("fetch other", "score other", "commit other-0.1", "commit other-0.2", "report all"),
    ]
    wanted = {"commit@other-0.2", "other-0.2", "score@other", "other"}
    nested = parents_of(task_runs(server, lambda names, _: wanted <= set(names)))
    assert nested["commit@other-0.2"] == ["other-0.2"] and nested["score@other"] == ["other"]
    tables = [json.loads(a["data"]) for a in ask(server, "artifacts") if a["key"] == "sweep"]
    assert sorted(map(len, tables)) == [2, 4]
    rows = {row.pop("target"): row for row in max(tables, key=len)}
    assert rows["smollm2-0.1"]["state"] == "Refused" and "commit@smollm2-0.1 failed" in rows["smollm2-0.1"]["why"]
    del rows["other-0.2"]["minutes"]
    assert rows["other-0.2"] == {
        "run": "other", "state": "Completed", "removed, %": 12.3, "perplexity": 40.0, "perplexity, dense": 30.0,
        "accuracy": 0.5, "accuracy, dense": 0.5, "speed-up": 1.1, "why": "",
    }  # fmt: skip


def test_sweep_from_the_command_line(project, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("flows.sweep.sweep", lambda grid, return_state: asked.append(grid) or Completed(message="made"))
    assert sweep_main(["--run", "smollm2"]) == sweep_main(["--run", "smollm2", "--stop-on-failure"]) == 0
    plain = RunGrid(runs=("smollm2",))
    assert asked == [plain, plain.model_copy(update={"stop_on_failure": True})]
    assert sweep_main(["--run", "none"]) == 2 and "none" in capsys.readouterr().err
    assert Path("params.yaml").read_text() == PARAMS


@pytest.mark.parametrize(
    ("stop", "failed", "reason"),
    [(False, "a", "a has no scores"), (False, "a-0.1", ""), (True, "z", "z failed"), (False, "z", "")],
)
def test_sweep_leaves_out_what_needs_the_failed_or_what_comes_after_it(stop, failed, reason):
    grid = RunGrid(runs=("z", "a"), budgets=("0.1",), stop_on_failure=stop)
    assert left_out(grid, "a", {failed: Failed(), "other": Completed()}) == reason


def test_cancelled_flow_leaves_no_process_and_no_open_phase_and_locks_the_workspace(project, server):
    flow = start_score(lambda: start(PREFECT_API_URL=server))
    second = start("--budget", "0.3", PREFECT_API_URL=server)
    output, _ = second.communicate()
    assert second.returncode == 2 and f"process {flow.pid} on" in output and "wait for it or stop it" in output
    assert Path("params.yaml").read_text() == PARAMS
    task_runs(server, lambda names, _: "iteration 0" in names)
    flow.send_signal(signal.SIGTERM)
    flow.communicate()
    assert flow.returncode == 143
    assert not alive(last_pid())
    crashed = {"score@smollm2: Crashed", "iteration 0: Crashed"}
    task_runs(server, lambda _, states: crashed <= states and not any(state.endswith(": Running") for state in states))


@pytest.mark.parametrize(
    ("reason", "refused"),
    [
        ("error in stage score smollm2: budget '0.99' cannot be reached; the largest reachable is 3blocks", True),
        ("error in stage score smollm2: data/trials could not be written: no space left", False),
        ("Killed", False),
    ],
)
def test_after_a_budget_that_a_stage_refuses_params_are_as_before(project, server, monkeypatch, reason, refused):
    monkeypatch.setenv("STUB_FAILS", "score smollm2")
    monkeypatch.setenv("STUB_SAYS", reason)
    with temporary_settings({PREFECT_API_URL: server}):
        state = prune(Selection(budgets=("0.99",)), return_state=True)
    assert (state.name == "Refused") == refused and state.is_failed()
    assert (Path("params.yaml").read_text() == PARAMS) == refused
    assert state.message.endswith("params.yaml is as before") == refused
    why = reason.removeprefix("error in stage score smollm2") if reason != "Killed" else " (dvc ended with"
    assert state.message.startswith(f"stage score@smollm2 failed{why}")


def test_a_failed_stage_is_told_once_in_its_log(project, server):
    flow = start(PREFECT_API_URL=server, STUB_FAILS="score smollm2")
    output, _ = flow.communicate()
    assert flow.returncode == 1 and "NoneType" not in output and "Task run failed with" not in output
    assert output.count("Finished in state Failed(") == 2, output  # the task, the flow


CONFIG = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000, "tie_word_embeddings": True,
}  # fmt: skip
"""Of a model of whose parameters seven tenths are in blocks."""


def new(**changes):
    """What a form sends of a new model, which lies in the workspace."""
    write_json(**{"../models/mine/config.json": CONFIG})
    given = {"name": "mine", "model": {"path": "models/mine"}, "budgets": ["2blocks"], "wait": False}
    drawn = {"texts": {"path": "texts.txt"}, "num_samples": 40, "seq_len": 64}
    return NewModel.model_validate(given | drawn | changes)


def flow_of_form(server, form):
    before = len(ran())
    with temporary_settings({PREFECT_API_URL: server}):
        state = new_model(form, return_state=True)
    return state, ran(before)


def test_a_new_model_is_estimated_written_made_and_pushed(project, server, tmp_path):
    with_dvc = partial(subprocess.run, check=True)
    with_dvc([sys.executable, "-m", "dvc", "remote", "add", "-q", "team", str(tmp_path / "remote")])
    more = {"score": {"unit": "layer"}, "evaluate": {"zero_shot": {"limit": 7}}}
    form = new(tasks="benchmarks", recover=True, export=["hf", "nas"], more=more, push="team")
    state, started = flow_of_form(server, form)
    assert state.is_completed(), state.message
    made = ["fetch@mine", "score@mine", "commit@mine-2blocks-trained", "report"]
    assert started == [*(stage.replace("@", " ") for stage in made[:3]), "report all"]
    text = Path("runs/mine.yaml").read_text()
    assert yaml.safe_load(text) == {
        "model": {"source": "path", "path": "models/mine", "dtype": "float32", "trust_remote_code": False},
        "calibration": {
            "data": {"source": "path", "path": "texts.txt", "format": "text"},
            "split": "all", "num_samples": 40, "seq_len": 64,
        },
        "score": {"method": "floating", "acceleration": "lazy+race", "unit": "layer"},
        "compensate": {"method": "refit"},
        "evaluate": {"zero_shot": {"data": {"source": "benchmarks"}, "limit": 7}},
        "recover": {"data": {"source": "path", "path": "texts.txt", "format": "text"}},
        "export": ["hf", "nas"],
    }  # fmt: skip
    assert load_params().runs == ("smollm2", "mine") and "mine" in run_names()
    task_runs(server, lambda _, states: "push to team: Completed" in states)
    for name in (".dvc/cache", "data/report"):
        shutil.rmtree(name)
    for path in Path("data").rglob("mine*.txt"):
        path.unlink()
    with_dvc([sys.executable, "-m", "dvc", "pull", "-q", "-r", "team", *made])
    assert Path("data/scores/mine.txt").read_text() == "# score mine" and Path("data/report/report.md").exists()

    before = Path("runs/mine.yaml").stat().st_mtime_ns
    state, started = flow_of_form(server, form)  # the same again
    assert state.is_completed() and not started and Path("runs/mine.yaml").stat().st_mtime_ns == before
    state, started = flow_of_form(server, form.model_copy(update={"seq_len": 128}))
    assert state.name == "Refused" and state.message.startswith("runs/mine.yaml is there and has other settings")
    assert not started and Path("runs/mine.yaml").read_text() == text


def test_a_push_that_fails_loses_nothing_and_is_tried_again(project, server, tmp_path):
    Path(tmp_path / "file").touch()
    command = [sys.executable, "-m", "dvc", "remote"]
    subprocess.run([*command, "add", "-q", "team", str(tmp_path / "file" / "remote")], check=True)
    with temporary_settings({PREFECT_API_URL: server}):
        state = prune(Selection(push="team"), return_state=True)
        assert state.is_failed() and state.message.startswith("push to the remote 'team' failed: ")
        assert "`dvc push -r team` tries it again. Finished stages are kept: run again" in state.message
        assert Path("data/report/report.md").exists() and "report" in {a["key"] for a in ask(server, "artifacts")}
        subprocess.run([*command, "modify", "team", "url", str(tmp_path / "remote")], check=True)
        before = len(ran())
        state = prune(Selection(push="team"), return_state=True)
    assert state.is_completed() and not ran(before) and any((tmp_path / "remote").rglob("*"))
    with pytest.raises(InputError, match="push: DVC has no remote 'teem'; valid: team "):
        choose(Selection(push="teem"))


def test_a_new_model_waits_with_its_estimate_until_its_file_is_there(project, server, monkeypatch):
    asked = []

    def suspend(key):
        asked.append((key, Path("runs/mine.yaml").exists()))

    monkeypatch.setattr(form_module, "suspend_flow_run", suspend)
    state, started = flow_of_form(server, new(wait=True))
    assert state.is_completed() and len(started) == 4 and asked == [("estimate", False)]
    flow_of_form(server, new(wait=True))
    assert len(asked) == 1


def test_forms_follow_the_run_files(project, server, capsys):
    """Whoever writes them; files that are wrong leave the forms as they were."""
    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        served = serve.deployments()[0].apply()

        def offered():
            schema = client.read_deployment(served).parameter_openapi_schema
            return schema["definitions"]["Selection"]["properties"]["runs"]["items"]["enum"]

        known = serve.run_files()
        before = offered()
        shutil.copy("runs/smollm2.yaml", "runs/other.yaml")
        assert serve.follow_runs("http://127.0.0.1:9/api", known) is known and offered() == before
        known = serve.follow_runs(server, known)
        assert offered() == sorted([*before, "other"]) and "other.yaml" in known
        assert serve.follow_runs("http://127.0.0.1:9/api", known) is known  # nobody is asked
        Path("runs/other.yaml").unlink()
        serve.follow_runs(server, known)
        assert offered() == before
        for each in client.read_deployments():
            client.delete_deployment(each.id)


# --- without a server, or with one that has gone ------------------------------------------------------------------


def test_flow_without_a_server_runs_only_what_changed(project):
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    before = len(ran())
    flow = start("--budget", ".02", "--budget", "3blocks")
    output, _ = flow.communicate()
    assert flow.returncode == 0, output
    assert ran(before) == ["commit smollm2-3blocks", "report all"]
    assert output.count("Cached('nothing has changed'") == 3 and "5 stages: 2 run, 3 cached" in output
    assert "added target smollm2-3blocks" in output
    assert '\n  smollm2-3blocks: {run: smollm2, budget: "3blocks"}\n' in Path("params.yaml").read_text()


def test_a_server_that_goes_away_does_not_hide_the_failure(project, monkeypatch):
    monkeypatch.setattr(prune_module, "flow_run", SimpleNamespace(id="0" * 32))
    monkeypatch.setattr(prune_module, "task_run", SimpleNamespace(id="1" * 32))
    monkeypatch.setattr(prune_module, "get_run_logger", lambda: SimpleNamespace(info=print))
    monkeypatch.setenv("STUB_FAILS", "fetch smollm2")
    with temporary_settings({PREFECT_API_URL: NOWHERE}), dvc.workspace("a test") as lock:
        state = prune_module.run_stage.fn("fetch@smollm2", lock, True, False)
    assert state.is_failed() and "stage fetch@smollm2 failed" in str(state.message)


def test_stage_goes_on_when_the_server_is_gone(project):
    environment = {
        "BLOCKPRUNER_OBSERVER": "flows.observer:PrefectObserver", "PREFECT_API_URL": NOWHERE,
        "BLOCKPRUNER_PREFECT_PARENT": f"{'0' * 32}/{'1' * 32}", "DVC_STAGE": "score@smollm2",
    }  # fmt: skip
    patient = "import runpy; from flows import observer; observer.FLUSH = 300; runpy.run_module('stub', {}, '__main__')"
    command = [sys.executable, "-c", patient, "score", "smollm2", "out.txt"]
    stage = subprocess.run(command, env={**os.environ, **environment}, text=True, capture_output=True, check=False)
    assert stage.returncode == 0 and Path("out.txt").exists(), stage.stdout
    assert stage.stdout.count("Prefect cannot be told of the progress any more") == 1, stage.stdout
    assert "iteration 1: removed mha.1" in stage.stdout


# --- dvc ----------------------------------------------------------------------------------------------------------


def test_stage_ends_with_a_killed_flow(project):
    script = (
        "from flows import dvc\n"
        "with dvc.workspace('a test') as lock:\n"
        "    for stage in ('fetch@smollm2', 'score@smollm2'): dvc.repro(stage, lock, print)\n"
    )
    as_nohup_does = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    flow = start_score(
        lambda: subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, preexec_fn=as_nohup_does)
    )
    flow.kill()
    flow.wait()
    wait_until(lambda: not alive(last_pid()), "the stage outlived its flow", seconds=60)
    wait_until(workspace_is_free, "dvc outlived its flow", seconds=60)


def test_failed_stage_is_named_and_its_output_shown(project):
    Path("stub.py").write_text("raise SystemExit('no such budget')")
    lines = []
    with dvc.workspace("a test") as lock, pytest.raises(dvc.StageError, match="stage fetch@smollm2 failed"):
        dvc.repro("fetch@smollm2", lock, lines.append)
    assert lines.count("no such budget") == 1


@pytest.mark.parametrize("damage", ["", "schema: '2.0'\nstages:\n  fetch@smollm2:\n    cmd: 'python -m"])
def test_files_that_a_kill_cut_short_are_mended(project, damage):
    """dvc rewrites them in place, and does not start while it cannot read them."""
    lines = []
    Path(".dvc/tmp/rwlock").write_text('{"read": {"a')
    with dvc.workspace("a test") as lock:
        assert dvc.repro("fetch@smollm2", lock, lines.append)
        assert not dvc.repro("fetch@smollm2", lock, lines.append)
        whole = Path("dvc.lock").read_text()
        Path("dvc.lock").write_text(damage)
        assert not dvc.repro("fetch@smollm2", lock, lines.append)
        assert Path("dvc.lock").read_text() == whole and Path("dvc.lock.bad").read_text() == damage
        assert [line.partition(" (")[0] for line in lines if "cut short by a kill" in line] == [
            ".dvc/tmp/rwlock was cut short by a kill; set aside as .dvc/tmp/rwlock.bad",
            "dvc.lock was cut short by a kill; restored from the flow's copy",
        ]
        Path("dvc.lock").write_text(damage)
        Path(".dvc/tmp/flow.dvc.lock").unlink()
        with pytest.raises(dvc.StageError, match="git checkout dvc.lock"):
            dvc.stale(["fetch@smollm2"], lines.append)
        assert Path("dvc.lock").read_text() == damage


def test_starts_at_the_same_time(project):
    """One holds the workspace, the others name it; as flows.prune does it, without Prefect's 3 s of import."""
    script = (
        "import os\nfrom blockpruner.core.errors import InputError\nfrom flows import dvc\n"
        "try:\n    with dvc.workspace(f'process {os.getpid()}') as lock: dvc.repro('score@smollm2', lock, str)\n"
        "except InputError as error: print(error)"
    )
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "fetch@smollm2"], check=True)
    Path("hold").touch()
    starts = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    wait_until(lambda: sum(start.poll() is None for start in starts) == 1, "not one holds the workspace")
    (holder,) = (start for start in starts if start.returncode is None)
    Path("hold").unlink()
    said = {start.pid: start.communicate()[0] for start in starts}
    assert said.pop(holder.pid) == ""
    refused = f"this workspace is in use by process {holder.pid}; wait for it or stop it"
    assert [words.split(",")[0] for words in said.values()] == 3 * [refused]
    assert ran() == ["fetch smollm2", "score smollm2"]
    assert Path("data/scores/smollm2.txt").read_text() == "# score smollm2"


def test_a_dvc_between_two_stages_is_waited_for(project):
    """It holds its lock then, and names no reader."""
    lock = Lock(".dvc/tmp/lock")
    lock.lock()
    freed = threading.Event()
    free = threading.Timer(1, lambda: (freed.set(), lock.unlock()))
    free.start()
    with dvc.workspace("me"):
        assert freed.is_set()
        free.join()
        assert not lock.is_locked
        lock.lock()  # while the flow works, its own dvc commands have it
    with pytest.raises(InputError, match=r"in use by a dvc command; wait .*acquire lock"), dvc.workspace("her"):
        pass
    assert WORKSPACE.read_text() == "her\n"  # whoever came while she waited was told so
    lock.unlock()


def test_a_plain_dvc_that_reads_params_is_waited_for(project):
    """It reads params.yaml again when its stage ends."""
    plain = start_score(lambda: subprocess.Popen([sys.executable, "-m", "dvc", "repro", "-q", "score@smollm2"]))
    refusal = rf"(?s)in use by a dvc command; wait .*PID {plain.pid}\): .*repro -q score@smollm2"
    with pytest.raises(InputError, match=refusal), dvc.workspace("me"):
        pass
    plain.kill()
    plain.wait()
    os.kill(last_pid(), signal.SIGKILL)
    assert str(plain.pid) in Path(".dvc/tmp/rwlock").read_text()
    assert workspace_is_free() and Path("params.yaml").read_text() == PARAMS


# --- what is chosen -----------------------------------------------------------------------------------------------


def test_added_run_and_target_keep_comments(project):
    shutil.copy("runs/smollm2.yaml", "runs/other.yaml")
    chosen = choose(Selection(runs=("other",), budgets=("0.1", ".10", "17blocks", "0.10kv", ".1kv", "1.5x")))
    chosen.write()
    names = ["0.1", "17blocks", "0.10kv", "1.5x"]
    assert chosen.additions == ("run other", *(f"target other-{name}" for name in names))
    assert chosen.stages() == ("fetch@other", "score@other", *(f"commit@other-{name}" for name in names), "report")
    new = [f'  other-{name}: {{run: other, budget: "{name}"}}' for name in names]
    lines, before = Path("params.yaml").read_text().splitlines(), PARAMS.splitlines()
    assert all(line in lines for line in new)
    assert [line for line in lines if line not in new and line != lines[1]] == [before[0], *before[2:]]
    assert lines[1].split("#")[0].split() == ["runs:", "[smollm2,", "other]"]
    assert lines[1].split("#")[1] == before[1].split("#")[1]


def test_only_what_is_built_is_kept_and_nothing_of_others_changed(project):
    shutil.copy("runs/smollm2.yaml", "runs/other.yaml")
    chosen = choose(Selection(runs=("smollm2", "other"), budgets=("0.1", "0.02")))
    chosen.write()
    ours = Path("params.yaml").read_text()
    theirs = ours.replace("block by block", "by hand")
    Path("params.yaml").write_text(theirs)
    assert not chosen.keep([]) and Path("params.yaml").read_text() == theirs
    for built, runs, targets in (
        (["smollm2-0.02", "smollm2-0.1"], ("smollm2",), ["smollm2-0.1"]),
        (["other-0.02"], ("smollm2", "other"), ["other-0.02"]),
    ):
        Path("params.yaml").write_text(ours)
        assert chosen.keep(built)
        assert load_params().runs == runs
        assert list(load_params().targets) == ["smollm2-0.02", "smollm2-0.05", *targets]
    Path("params.yaml").write_text(ours)
    assert chosen.keep([]) and Path("params.yaml").read_text() == PARAMS


def test_a_budget_means_the_target_that_is_not_recovered(project):
    run = Path("runs/smollm2.yaml")
    without = run.read_text()
    run.write_text(f"{without}\nrecover: {{data: {{source: path, path: texts.parquet}}}}\n")
    text = PARAMS.replace('budget: "0.05"}', 'budget: "0.05", recover: true}')
    Path("params.yaml").write_text(text.replace("smollm2-0.05", "smollm2-lora"))
    chosen = choose(Selection(budgets=("0.02", "0.05")))
    assert list(chosen.targets) == ["smollm2-0.02", "smollm2-0.05"]
    assert chosen.additions == ("target smollm2-0.05",)
    run.write_text(without)
    with pytest.raises(InputError, match=r"'smollm2-lora' has recover: true, but runs/smollm2.yaml has no recover"):
        choose(Selection())


def test_healed_targets_are_added_beside_the_plain_ones(project):
    run = Path("runs/smollm2.yaml")
    run.write_text(f"{run.read_text()}\nrecover: {{data: {{source: path, path: texts.parquet}}}}\n")
    options = [{}, {"compensate": "scale"}, {"recover": True}, {"compensate": "none", "recover": True}]
    names = ["", "-scale", "-trained", "-none-trained"]
    for option, name in zip(options, names, strict=True):
        chosen = choose(Selection(budgets=("0.1",), **option))
        assert chosen.additions == (f"target smollm2-0.1{name}",)
        chosen.write()
        added = load_params().targets[f"smollm2-0.1{name}"]
        assert added.model_dump(exclude_defaults=True) == {"run": "smollm2", "budget": "0.1"} | option
    for option, name in zip(options, names, strict=True):
        again = choose(Selection(budgets=(".10",), **option))
        assert list(again.targets) == [f"smollm2-0.1{name}"] and not again.additions


def test_no_options_take_everything_and_write_nothing(project):
    before = Path("params.yaml").stat().st_mtime_ns
    chosen = choose(Selection())
    chosen.write()
    assert chosen.keep([]) and Path("params.yaml").stat().st_mtime_ns == before
    assert list(chosen.targets) == ["smollm2-0.02", "smollm2-0.05"] and Path("params.yaml").read_text() == PARAMS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1.5"], "budget '1.5' is not valid; give a share of all parameters between 0 and 1"),
        (["--budget", "0", "--budget", "0.3"], "budget '0' is not valid"),
        (
            ["--budget", "0.3", "--recover"],
            "'smollm2-0.3-trained' has recover: true, but runs/smollm2.yaml has no recover",
        ),
        (["--compensate", "refit", "--recover"], "compensate and recover: for targets by budget only; name a budget"),
        (["--run", "../smollm2"], "run name '../smollm2' is not valid"),
        (["--run", "none"], "run 'none' is unknown: runs/none.yaml does not exist; existing runs: baichuan2-13b, "),
    ],
)
def test_bad_selection_is_refused_without_traceback(project, capsys, options, message):
    assert main(options) == 2
    assert message in (said := capsys.readouterr().err) and "tmp" not in said and "Traceback" not in said
    assert Path("params.yaml").read_text() == PARAMS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"path": "../elsewhere"}}, r"path '../elsewhere' leads out of the workspace; put a copy inside"),
        ({"model": {"path": "~"}}, "path '~' leads out"),
        ({"texts": {"path": "link/texts.txt"}}, "path 'link/texts.txt' leads out"),
        ({"more": {"evaluate": {"zero_shot": {"data": {"source": "path", "path": "/tmp"}}}}}, "path '/tmp' leads out"),
        ({"more": {"calibration": {"data": {"source": "mix", "of": [{"path": "/tmp"}]}}}}, "path '/tmp' leads out"),
        ({"more": {"model": {"trust_remote_code": True}}}, "trust_remote_code: a form cannot allow it"),
        ({"more": {"model": {"trust_remote_code": "yes"}}}, "trust_remote_code: a form cannot allow it"),
        ({"more": {"score": {"units": "layer"}}}, r"runs/mine.yaml: unknown key 'score.units'; valid keys there: acc"),
        ({"more": {"model": {"source": "hub", "repo": "../m", "revision": 40 * "a"}}}, "model.hub.repo: String should"),
        ({"export": ["nas"]}, r"runs/mine.yaml: export: .*\['nas'\] lacks hf"),
        ({"method": "best"}, "method 'best' is unknown; valid: recommended, blockpruner, "),
        ({"name": "sources"}, "run name 'sources' is taken"),
        ({"name": "smollm2"}, "runs/smollm2.yaml is there and has other settings; choose another name"),
        ({"budgets": ["9blocks"]}, "budget '9blocks' .*the largest (reachable )?is 8blocks"),
        ({"model": {"path": "models/none"}}, "'models/none'|models/none/config.json"),
        ({"push": "team"}, "push: DVC has no remote 'team'; valid: none"),
    ],
)
def test_what_a_form_may_not_ask_for_is_refused_and_nothing_written(project, changes, message):
    Path("link").symlink_to("/tmp")
    files = sorted(Path("runs").iterdir())
    with pytest.raises(InputError, match=message):
        require_fit(form := new(**changes), check(form, form.text()))
    assert sorted(Path("runs").iterdir()) == files and Path("params.yaml").read_text() == PARAMS and not ran()


def test_a_run_file_whose_targets_are_refused_is_taken_back(project):
    text = PARAMS.replace("smollm2-0.05:", "mine-2blocks:")
    Path("params.yaml").write_text(text)
    form = new()
    with pytest.raises(InputError, match="target 'mine-2blocks' exists with budget '0.05' of run 'smollm2'"):
        add(form, form.text())
    assert not Path("runs/mine.yaml").exists() and Path("params.yaml").read_text() == text
    form = new(budgets=["1blocks"])
    assert add(form, form.text()).additions == ("run mine", "target mine-1blocks")


def test_the_form_is_made_of_the_settings(project):
    parts = (schema := parameter_schema(new_model).model_dump_for_openapi())["definitions"]
    assert {"recommended", "blockpruner", "floating"} <= {*parts["NewModel"]["properties"]["method"]["enum"]}
    assert parts["NamedModel"]["properties"]["source"]["enum"] == ["gemma3-270m", "smollm2-135m"]
    assert parts["NamedTexts"]["properties"]["source"]["enum"] == ["encyclopaedia", "instructions", "wikitext-2"]
    assert parts["NewModel"]["properties"]["tasks"]["enum"] == ["hub", "benchmarks"]
    assert parts["NewModel"]["properties"]["seq_len"] == {**parts["NewModel"]["properties"]["seq_len"], "minimum": 2}
    order = [part.get("$ref", "").rpartition("/")[2] for part in parts["NewModel"]["properties"]["texts"]["anyOf"]]
    assert order[:3] == ["NamedTexts", "TextFile", "HubDataSet"], "Prefect would not let a user choose some of them"
    shown = {*parts["HubRepository"]["properties"], *parts["Folder"]["properties"]}
    assert shown == {"repo", "revision", "path", "dtype"}
    given = {"form": {"name": "mine", "model": {"repo": "a/b"}, "budgets": ["0.1"]}}
    assert not validate(given, schema, raise_on_error=False)
    for change in (
        {"name": "../mine"}, {"budgets": []}, {"budgets": ["1.5"]}, {"seq_len": 1}, {"method": "best"},
        {"model": {"repo": "a/b", "trust_remote_code": True}}, {"model": {"path": "m", "trust_remote_code": True}},
    ):  # fmt: skip
        assert validate({"form": given["form"] | change}, schema, raise_on_error=False), change


def fetch_as(run, repo, layers):
    """What the stage fetch leaves of a model."""
    config = CONFIG | {"num_hidden_layers": layers}
    model = {"source": "hub", "repo": repo, "revision": "abc", "dtype": "bfloat16", "trust_remote_code": False}
    source = {"identity": "", "source": model}
    write_json(**{f"models/{run}/config.json": config, f"models/{run}/blockpruner_source.json": source})


@pytest.mark.parametrize(
    ("budget", "largest"), [("0.99", r"8blocks, ratio 0\.7"), ("9blocks", "8blocks"), ("5layers", "3layers")]
)
def test_a_budget_beyond_a_fetched_model_is_refused_and_not_written(project, capsys, budget, largest):
    run = Path("runs/smollm2.yaml")
    run.write_text(re.sub(r"model:.*?\n(?=\w)", "model: {source: hub, repo: a/b}\n", run.read_text(), flags=re.DOTALL))
    before = PARAMS.replace("0.02", "0.2").replace("0.05", "8blocks")
    Path("params.yaml").write_text(before)
    fetch_as("smollm2", "a/b", layers=4)
    choose(Selection(budgets=("8blocks", "0.98kv", "3layers")))
    assert main(["--budget", "0.3", "--budget", budget]) == 2
    assert re.search(f"run smollm2: budget '{budget}' .*the largest (reachable )?is {largest}", capsys.readouterr().err)
    assert Path("params.yaml").read_text() == before and not ran()
    fetch_as("smollm2", "a/smaller", layers=4)  # what was fetched is not what the run's file names by now
    assert choose(Selection(budgets=(budget,))).additions


def test_unreachable_server_is_named(project, capsys):
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        assert main([]) == 2
    assert NOWHERE in capsys.readouterr().err
