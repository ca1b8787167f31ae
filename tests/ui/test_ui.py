"""What a person does in the browser, from the form to the report: `make test-ui` (Debian: apt-get install chromium).

BLOCKPRUNER_CHROMIUM names another browser; BLOCKPRUNER_SCREENSHOTS a folder that the screenshots are written to.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from scipy.ndimage import find_objects, label

from tests import processes
from tests.integration.project import environment, make_project, post, sentence
from tests.processes import processes_in
from tests.tiny import save_tiny

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `ui` is not installed (make test-ui does it)")
CHROMIUM = os.environ.get("BLOCKPRUNER_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.ui,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no browser: no chromium on PATH (Debian: apt-get install chromium), and BLOCKPRUNER_CHROMIUM is unset",
    ),
]
SECONDS = 1800.0
CANCELLED_WITHIN = 15.0
COMPLETED = (33, 157, 75)
"""The colour of what is completed."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two runs of a model with 12 layers: `tiny` is scored in seconds, `slow` takes long enough to be cancelled. The
    folder `mine` has a model without a run file, and `remote` is a DVC remote."""
    folder = tmp_path_factory.mktemp("ui")
    project = make_project(folder.resolve(), {"tiny-0.1": "0.1"})
    save_tiny(folder / "inputs/model", layers=12, tie_word_embeddings=True)
    shutil.copytree(folder / "inputs", project / "mine")
    with open(project / ".dvc/config", "a") as config:
        config.write(f"['remote \"team\"']\n    url = {folder / 'remote'}\n")
    texts = folder / "inputs/many.parquet"
    pq.write_table(pa.table({"text": [sentence(i) for i in range(4000)]}), texts)
    run = yaml.safe_load((project / "runs/tiny.yaml").read_text())
    run["calibration"]["num_samples"] = 500
    run["calibration"]["data"]["path"] = str(texts)
    (project / "runs/slow.yaml").write_text(yaml.safe_dump(run))
    return project


@pytest.fixture(scope="module")
def served(project):
    """`make serve` in the project: its URL. Ctrl-C ends it, and leaves no process."""
    url = f"http://127.0.0.1:{free_port()}"
    settings = {"PREFECT_HOME": str(project / ".prefect"), "PREFECT_SERVER_API_PORT": url.rsplit(":", 1)[1]}
    outside = {key: value for key, value in environment().items() if not key.startswith("PREFECT_API_")}
    with open(project / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve"], cwd=project, env=outside | settings, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: b"Ctrl-C" in (project / "serve.log").read_bytes() or process.poll() is not None)
        assert process.poll() is None, (project / "serve.log").read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_API_AUTH_STRING", (project / ".prefect/password").read_text().strip())
            wait_until(lambda: len(ask(url, "deployments/filter")) == 3)
            yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
    assert processes_in(project) == set()


@pytest.fixture
def page(served):
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        page = browser.new_page(viewport={"width": 1500, "height": 1150})
        page.set_default_timeout(1000 * SECONDS)
        page.goto(f"{served}/")  # as a person does
        page.get_by_placeholder("admin:pass").fill(os.environ["PREFECT_API_AUTH_STRING"])
        page.get_by_role("button", name="Login").click()
        page.wait_for_url(re.compile("/dashboard"))
        yield page
        browser.close()


def free_port():
    """A port with a free one above it, for the report's page."""
    while True:
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            second.bind(("127.0.0.1", port + 1))
            return port


wait_until = partial(processes.wait_until, seconds=SECONDS)


def ask(url, what, **filters):
    return post(f"{url}/api", what, **filters)


def flow_run(url, name):
    return ask(url, "flow_runs/filter", flow_runs={"name": {"any_": [name]}})[0]


def tasks(url, name):
    """Names and states of a flow run's task runs, in the order of their start, and the name of each one's parent."""
    chosen = {"id": {"any_": [flow_run(url, name)["id"]]}}
    runs = sorted(ask(url, "task_runs/filter", flow_runs=chosen), key=lambda run: run["created"])
    names = {run["id"]: run["name"] for run in runs}
    parents = [[names[p["id"]] for p in run["task_inputs"].get("__parents__", [])] for run in runs]
    return [(run["name"], run["state_name"], *parent) for run, parent in zip(runs, parents, strict=True)]


def shoot(page, name):
    page.wait_for_timeout(2000)  # what moves in has arrived
    if folder := os.environ.get("BLOCKPRUNER_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def open_form(page, url, flow, name):
    """The form of a flow, with this name for its run."""
    page.goto(f"{url}/deployments")
    page.get_by_role("link", name=flow, exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").first.click()
    page.locator(".schema-form-property-array").first.wait_for()
    page.locator("input").first.fill(name)


def field(page, name):
    """One parameter of a form."""
    return page.locator(".schema-form-property").filter(has=page.get_by_text(name, exact=True)).last


def write_field(page, name, text):
    """Fill in a parameter of a form."""
    field(page, name).locator("textarea, input").last.fill(text)


def fill_form(page, url, run, budget, name):
    open_form(page, url, "prune", name)
    for name, text in (("Runs (Optional)", run), ("Budgets (Optional)", budget)):
        field(page, name).get_by_role("button", name="Add item").click()
        write_field(page, name, text)


def submit(page):
    page.get_by_role("button", name="Submit").click()


def open_run(page, url, name):
    page.goto(f"{url}/runs")
    page.get_by_role("link", name=name, exact=True).first.click()


def bars(page):
    """Left and top of the bars in a run's graph, which is a canvas, from left to right."""
    picture = Image.open(io.BytesIO(page.locator("canvas").first.screenshot())).convert("RGB")
    green = np.abs(np.asarray(picture).astype(int) - COMPLETED).max(axis=2) < 12
    places = [(r, c) for r, c in find_objects(label(green)[0]) if r.stop - r.start > 24 and c.stop - c.start > 5]
    return sorted((columns.start, rows.start) for rows, columns in places)


def open_report(page, url):
    """The newest report, whose pictures are seen; the URL of its page."""
    newest = ask(url, "artifacts/filter", artifacts={"key": {"any_": ["report"]}}, sort="CREATED_DESC")[0]
    page.goto(f"{url}/artifacts/artifact/{newest['id']}")
    link = page.get_by_role("link", name="The page")
    link.wait_for()
    pictures = page.locator("img[src*='/report/plots/']")
    for number in range(pictures.count()):
        assert pictures.nth(number).evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    return link.get_attribute("href")


def test_trigger_watch_cancel_and_retry(page, served, project):
    idle = processes_in(project)
    fill_form(page, served, "tiny", "0.2", "first")
    shoot(page, "ui-form")
    submit(page)
    page.get_by_role("link", name="first").first.wait_for()
    fill_form(page, served, "slow", "0.08", "second")
    submit(page)
    page.get_by_role("link", name="second").first.wait_for()
    wait_until(lambda: flow_run(served, "first")["state_type"] not in ("SCHEDULED", "PENDING"))
    assert [flow_run(served, name)["state_type"] for name in ("second", "first")] == ["SCHEDULED", "RUNNING"]

    wait_until(lambda: flow_run(served, "first")["state_type"] not in ("SCHEDULED", "PENDING", "RUNNING"))
    assert flow_run(served, "first")["state_name"] == "Completed", (project / "serve.log").read_text()
    found = tasks(served, "first")
    assert ("removal 1", "Completed", "score@tiny") in found and ("score@tiny", "Completed") in found
    open_run(page, served, "first")
    wait_until(lambda: len(bars(page)) == len([name for name, _, *parent in found if not parent]))  # one a stage
    (left, top), (end, _) = bars(page)[2:4]  # score, behind fetch and calibrate, and baseline
    page.locator("canvas").first.click(position={"x": left + 16, "y": top + 16})  # its arrow
    wait_until(lambda: any(left < x < end and y > top + 24 for x, y in bars(page)))
    page.get_by_text("Task Runs", exact=True).click()
    page.get_by_placeholder("Search by run name").fill("removal")
    page.get_by_text("removal 2", exact=True).first.wait_for()
    shoot(page, "ui-run")
    page.get_by_text("Artifacts", exact=True).click()
    for key in ("report", "results", "score-tiny-table"):
        page.get_by_text(key, exact=True).first.wait_for()
    assert "<title>Tiny</title>" in httpx.get(open_report(page, served)).text

    wait_until(lambda: any(name == "removal 2" for name, *_ in tasks(served, "second")))
    open_run(page, served, "second")
    page.get_by_role("button", name="Cancel").click()
    assert flow_run(served, "second")["state_type"] == "RUNNING"
    page.get_by_role("button", name="Confirm").click()
    clicked = time.monotonic()
    wait_until(lambda: processes_in(project) <= idle)
    took = time.monotonic() - clicked
    print(f"gone {took:.1f} s after the click")
    assert took < CANCELLED_WITHIN
    wait_until(lambda: flow_run(served, "second")["state_name"] == "Cancelled")
    before = tasks(served, "second")
    assert before[-1][1:] == ("Crashed", "score@slow"), before

    page.get_by_role("button", name="Retry").first.click()
    page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    wait_until(lambda: flow_run(served, "second")["state_type"] in ("COMPLETED", "FAILED", "CRASHED"))
    assert flow_run(served, "second")["state_name"] == "Completed", (project / "serve.log").read_text()
    again = tasks(served, "second")[len(before) :]
    assert ("fetch@slow", "Cached") in again and ("score@slow", "Completed") in again
    assert ("removal 1", "Cached", "score@slow") in again and (before[-1][0], "Completed", "score@slow") in again


def test_a_new_model_by_form_run_report_and_push(page, served, project):
    open_form(page, served, "new-model", "third")
    write_field(page, "Name", "mine")
    write_field(page, "Model", "mine/model")
    field(page, "Budgets").get_by_role("button", name="Add item").click()
    write_field(page, "Budgets", "0.1")
    for texts in ("Texts (Optional)", "Heldout (Optional)"):
        write_field(page, texts, "mine/texts.parquet")
    write_field(page, "Push (Optional)", "team")
    more = {
        "calibration": {"num_samples": 10, "seq_len": 24},
        "evaluate": {
            "perplexity": {"seq_len": 64, "max_rows": 2},
            "zero_shot": {"data": {"source": "path", "path": "mine"}, "tasks": ["piqa"], "limit": 6},
            "speed": {"prompt_tokens": 4, "new_tokens": 4, "repeats": 1, "batch": 1},
        },
        "compensate": {"num_rows": 24, "seq_len": 32, "validation": 0.25},
    }
    write_field(page, "More (Optional)", json.dumps(more))
    shoot(page, "ui-new-model")
    submit(page)
    page.get_by_role("link", name="third").first.wait_for()
    wait_until(lambda: flow_run(served, "third")["state_type"] in ("COMPLETED", "FAILED", "CRASHED"))
    assert flow_run(served, "third")["state_name"] == "Completed", (project / "serve.log").read_text()
    found = tasks(served, "third")
    assert {state for _, state, *_ in found} <= {"Completed", "Cached"} and found[-1][0] == "push to team", found
    assert any((project.parent / "remote").rglob("*"))
    assert (project / "data/checkpoints/mine-b10/hf/model.safetensors").exists()
    assert "mine-b10" in httpx.get(open_report(page, served)).text
