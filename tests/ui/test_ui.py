"""What a person does in the browser, from the form to the report, in Prefect's V2 UI, which `/`
leads to, and in V1: `make test-ui` (Debian: apt-get install chromium).

BLOCKPRUNER_CHROMIUM names another browser; BLOCKPRUNER_SCREENSHOTS a folder that the screenshots
are written to.
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

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the extra `ui` is not installed (make test-ui does it)"
)
CHROMIUM = os.environ.get("BLOCKPRUNER_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.ui,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason=(
            "no browser: no chromium on PATH (Debian: apt-get install chromium), and"
            " BLOCKPRUNER_CHROMIUM is unset"
        ),
    ),
]
SECONDS = 1800.0
CANCELLED_WITHIN = 15.0
COMPLETED = (33, 157, 75)
"""The colour of what is completed."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two runs of a model with 12 layers: `tiny` is scored in seconds, `slow` takes long enough to
    be cancelled. The folder `mine` has a model without a run file, and `remote` is a DVC remote."""
    folder = tmp_path_factory.mktemp("ui")
    project = make_project(folder.resolve(), {"tiny-b10": "0.1"})
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
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["report"]["plots"] = True
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    return project


@pytest.fixture(scope="module")
def served(project):
    """`make serve` in the project: its URL. Ctrl-C ends it, and leaves no process."""
    url = f"http://127.0.0.1:{free_port()}"
    settings = {
        "PREFECT_HOME": str(project / ".prefect"),
        "PREFECT_SERVER_API_PORT": url.rsplit(":", 1)[1],
    }
    outside = {
        key: value for key, value in environment().items() if not key.startswith("PREFECT_API_")
    }
    with open(project / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve"],
            cwd=project,
            env=outside | settings,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(
            lambda: b"Ctrl-C" in (project / "serve.log").read_bytes() or process.poll() is not None
        )
        assert process.poll() is None, (project / "serve.log").read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(
                "PREFECT_API_AUTH_STRING", (project / ".prefect/password").read_text().strip()
            )
            wait_until(lambda: len(ask(url, "deployments/filter")) == 3)
            yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
    assert processes_in(project) == set()


@pytest.fixture
def page(served):
    """A browser in the UI that Prefect shows first: V2."""
    with playwright.sync_playwright() as browsers:
        # root has no sandbox
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1150})
        page.set_default_timeout(1000 * SECONDS)
        page.goto(f"{served}/")  # as a person does
        page.get_by_placeholder("admin:pass").fill(os.environ["PREFECT_API_AUTH_STRING"])
        page.get_by_role("button", name="Login").click()
        page.wait_for_url(re.compile("/v2/dashboard"))
        yield page
        browser.close()


@pytest.fixture
def old_page(page, served):
    """A browser in V1."""
    page.get_by_text("Switch to V1 UI").click()
    page.get_by_role("button", name="Skip feedback and switch").click()
    page.wait_for_url(f"{served}/dashboard*")
    return page


def at(page, url, path):
    """Open a page in the UI that the browser is in."""
    page.goto(f"{url}{'/v2' if '/v2/' in page.url else ''}/{path}")


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
    """Names and states of a flow run's task runs, in the order of their start, and the name of each
    one's parent."""
    chosen = {"id": {"any_": [flow_run(url, name)["id"]]}}
    runs = sorted(ask(url, "task_runs/filter", flow_runs=chosen), key=lambda run: run["created"])
    names = {run["id"]: run["name"] for run in runs}
    parents = [[names[p["id"]] for p in run["task_inputs"].get("__parents__", [])] for run in runs]
    return [
        (run["name"], run["state_name"], *parent) for run, parent in zip(runs, parents, strict=True)
    ]


def shoot(page, name):
    page.wait_for_timeout(2000)  # what moves in has arrived
    if folder := os.environ.get("BLOCKPRUNER_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{'v2' if '/v2/' in page.url else 'v1'}-{name}.png")


def open_form(page, url, flow):
    """The form of a flow."""
    at(page, url, "deployments")
    page.get_by_role("link", name=flow, exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").first.click()
    page.get_by_role("button", name="Add item").first.wait_for()
    page.wait_for_timeout(1000)  # V2 draws the form twice


def part(page, name, tag):
    """An element of one parameter of a form."""
    if "/v2/" in page.url:
        own = page.get_by_text(name, exact=True).first.locator(f"xpath=ancestor::*[.//{tag}][1]")
    else:
        own = (
            page.locator(".schema-form-property")
            .filter(has=page.get_by_text(name, exact=True))
            .last
        )
    return own.locator(f"xpath=.//{tag}").last


def write_field(page, name, text):
    """Fill in a parameter of a form; "!": JSON, "?": it may be none, "+": an item of a list."""
    name, kind = (name[:-1], name[-1]) if name[-1] in "!?+" else (name, "")
    if kind == "+":
        part(page, name, "button[contains(., 'Add item')]").click()
    if kind == "?":
        part(page, name, "button[normalize-space()='str']").click()
    part(
        page,
        name,
        "*[contains(@class, 'cm-content')]" if kind == "!" else "*[self::input or self::textarea]",
    ).fill(text)


def fill_form(page, url, run, budget):
    open_form(page, url, "prune")
    write_field(page, "Runs (Optional)+", run)
    write_field(page, "Budgets (Optional)+", budget)


def submit(page, url):
    """Send a form; wait until the server has the run."""
    before = len(ask(url, "flow_runs/filter"))
    # a click is lost where the form moves under it
    page.get_by_role("button", name="Submit").press("Enter")
    wait_until(lambda: len(ask(url, "flow_runs/filter")) > before)


def open_run(page, url, name):
    at(page, url, f"runs/flow-run/{flow_run(url, name)['id']}")


def wait_for_end(url, project, name):
    """Wait for the end of a run, which has the name of what it makes from its start on."""
    over = ("COMPLETED", "FAILED", "CRASHED")
    wait_until(
        lambda: any(
            run["name"] == name and run["state_type"] in over
            for run in ask(url, "flow_runs/filter")
        )
    )
    state = flow_run(url, name)["state"]
    assert state["name"] == "Completed", f"{state}\n{(project / 'serve.log').read_text()}"


def bars(page):
    """Left, top, right and bottom of the bars in a run's graph, which is a canvas, from left to
    right."""
    picture = Image.open(io.BytesIO(page.locator("canvas").first.screenshot())).convert("RGB")
    green = np.abs(np.asarray(picture).astype(int) - COMPLETED).max(axis=2) < 12
    places = [(c.start, r.start, c.stop, r.stop) for r, c in find_objects(label(green)[0])]
    return sorted(place for place in places if place[2] - place[0] > 3 and place[3] - place[1] > 10)


def open_report(page, url):
    """The newest report, whose pictures are seen; the URL of its page."""
    newest = ask(
        url, "artifacts/filter", artifacts={"key": {"any_": ["report"]}}, sort="CREATED_DESC"
    )[0]
    at(page, url, f"artifacts/artifact/{newest['id']}")
    link = page.get_by_role("link", name="The page")
    link.wait_for()
    pictures = page.locator("img[src*='/report/plots/']")
    pictures.first.wait_for()
    for number in range(pictures.count()):
        assert (
            pictures.nth(number).evaluate("image => image.decode().then(() => image.naturalWidth)")
            > 0
        )
    return link.get_attribute("href")


def run_and_look(page, url, project, budget):
    """From the form to the report; returns the stages of the run and those of its task runs that
    are nested."""
    fill_form(page, url, "tiny", budget)
    shoot(page, "form")
    submit(page, url)
    wait_for_end(url, project, name := f"tiny {budget}")
    found = tasks(url, name)
    assert ("removal 1", "score@tiny-greedy") in [(name, *parent) for name, _, *parent in found]
    assert ("score@tiny-greedy", "Completed") in found
    open_run(page, url, name)
    stages = [name for name, _, *parent in found if not parent]
    page.locator("canvas").first.wait_for()
    wait_until(lambda: len(bars(page)) >= len(stages))
    page.get_by_text("Task Runs", exact=True).click()
    page.get_by_placeholder("Search by run name").fill("removal")
    page.get_by_text("removal 2", exact=True).first.wait_for()
    shoot(page, "run")
    page.get_by_text("Artifacts", exact=True).click()
    for key in ("report", "results", "score-tiny-greedy-table"):
        page.get_by_text(key, exact=True).first.wait_for()
    assert "<title>Tiny</title>" in httpx.get(open_report(page, url)).text
    shoot(page, "report")
    return stages, [name for name, _, *parent in found if parent]


def test_v2_triggers_a_run_and_shows_its_phases_and_pictures(page, served, project):
    stages, phases = run_and_look(page, served, project, "0.2")
    open_run(page, served, "tiny 0.2")
    wait_until(lambda: len(bars(page)) == len(stages) + len(phases))


def test_v1_does_so_too_and_unfolds_a_stage(old_page, served, project):
    page = old_page
    stages, _ = run_and_look(page, served, project, "0.15")
    open_run(page, served, "tiny 0.15")
    wait_until(lambda: len(bars(page)) == len(stages))
    left, top, right, bottom = bars(page)[stages.index("score@tiny-greedy")]
    size = bottom - top
    # in the bar, or behind a short one
    arrow = left + size / 2 if right - left > 2 * size else right + size / 2 + 4

    def removals():
        return [bar for bar in bars(page) if left <= bar[0] < right and bar[1] > bottom]

    assert removals() == []
    page.locator("canvas").first.click(position={"x": arrow, "y": (top + bottom) / 2})
    wait_until(lambda: len(removals()) > 1)
    shoot(page, "unfolded")


def test_runs_wait_for_each_other_and_are_cancelled_and_retried(old_page, served, project):
    page = old_page
    idle = processes_in(project)
    fill_form(page, served, "slow", "0.08")
    submit(page, served)
    wait_until(lambda: any(run["name"] == "slow 0.08" for run in ask(served, "flow_runs/filter")))
    fill_form(page, served, "tiny", "0.1")
    submit(page, served)
    waiting = ask(
        served, "flow_runs/filter", flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}}
    )
    assert len(waiting) == 1 and flow_run(served, "slow 0.08")["state_type"] == "RUNNING"
    wait_until(lambda: any(name == "removal 2" for name, *_ in tasks(served, "slow 0.08")))
    httpx.delete(
        f"{served}/api/flow_runs/{waiting[0]['id']}",
        auth=("me", os.environ["PREFECT_API_AUTH_STRING"][3:]),
    )
    open_run(page, served, "slow 0.08")
    page.get_by_role("button", name="Cancel").click()
    assert flow_run(served, "slow 0.08")["state_type"] == "RUNNING"
    page.get_by_role("button", name="Confirm").click()
    clicked = time.monotonic()
    wait_until(lambda: processes_in(project) <= idle)
    took = time.monotonic() - clicked
    print(f"gone {took:.1f} s after the click")
    assert took < CANCELLED_WITHIN
    wait_until(lambda: flow_run(served, "slow 0.08")["state_name"] == "Cancelled")
    before = tasks(served, "slow 0.08")
    assert before[-1][1:] == ("Crashed", "score@slow-greedy"), before

    page.get_by_role("button", name="Retry").first.click()
    page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    wait_until(lambda: flow_run(served, "slow 0.08")["state_type"] != "CANCELLED")
    wait_for_end(served, project, "slow 0.08")
    again = tasks(served, "slow 0.08")[len(before) :]
    assert ("fetch@slow", "Cached") in again and ("score@slow-greedy", "Completed") in again
    assert ("removal 1", "Cached", "score@slow-greedy") in again
    assert (before[-1][0], "Completed", "score@slow-greedy") in again


def test_a_new_model_by_form_run_report_and_push(page, served, project):
    open_form(page, served, "new-model")
    write_field(page, "Name", "mine")
    write_field(page, "Model", "mine/model")
    write_field(page, "Budgets+", "0.1")
    for texts in ("Texts (Optional)?", "Heldout (Optional)?"):
        write_field(page, texts, "mine/texts.parquet")
    write_field(page, "Push (Optional)?", "team")
    more = {
        "calibration": {"num_samples": 10, "seq_len": 24},
        "evaluate": {
            "perplexity": {"seq_len": 64, "max_rows": 2},
            "zero_shot": {
                "data": {"source": "path", "path": "mine"},
                "tasks": ["piqa"],
                "limit": 6,
            },
            "speed": {"prompt_tokens": 4, "new_tokens": 4, "repeats": 1, "batch": 1},
        },
        "compensate": {"num_rows": 24, "seq_len": 32, "validation": 0.25},
    }
    write_field(page, "More (Optional)!", json.dumps(more))
    shoot(page, "new-model")
    submit(page, served)
    wait_for_end(served, project, "mine 0.1")
    found = tasks(served, "mine 0.1")
    assert {state for _, state, *_ in found} <= {"Completed", "Cached"} and found[-1][
        0
    ] == "push to team", found
    assert any((project.parent / "remote").rglob("*"))
    assert (project / "data/checkpoints/mine-b10/hf/model.safetensors").exists()
    assert "mine-b10" in httpx.get(open_report(page, served)).text
