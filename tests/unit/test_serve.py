"""What `make serve` decides: the forms, where the server is, how processes end; and what the pictures show."""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from matplotlib.figure import Figure
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_API_HOST,
    PREFECT_SERVER_API_PORT,
    temporary_settings,
)
from prefect.utilities.schema_tools import is_valid_schema, validate

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError
from flows import charts, phases, serve, server
from flows.selection import RunGrid, Selection
from tests.ports import free_port
from tests.processes import alive, wait_until


@pytest.fixture
def forms(tmp_path, monkeypatch):
    """Schemas of all deployments' parameters, made where two run files are."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("small", "large"):
        Path(f"runs/{name}.yaml").touch()
    return {d.name: d._parameter_openapi_schema.model_dump() for d in serve.deployments()}


def test_forms_describe_every_field_and_offer_the_run_files(forms):
    for schema in forms.values():
        is_valid_schema(schema)
        assert all(part["description"] for part in schema["definitions"].values())
        (argument,) = schema["properties"].values()
        form = schema["definitions"][argument["$ref"].rpartition("/")[2]]["properties"]
        assert all(field["description"] for field in form.values())
        if "runs" in form:
            assert form["runs"]["items"]["enum"] == ["large", "small"]


@pytest.mark.parametrize(
    ("deployment", "parameters", "wrong"),
    [
        ("prune", {}, None),
        ("prune", {"selection": {"runs": ["small"], "budgets": ["0.2", "17blocks"]}}, None),
        ("prune", {"selection": {"budgets": ["0.2"], "compensate": "refit", "recover": True}}, None),
        ("prune", {"selection": {"budgets": ["0.2"], "compensate": "glue"}}, "glue"),
        ("prune", {"selection": {"runs": ["none"]}}, "none"),
        ("prune", {"selection": {"budgets": ["a lot"]}}, "a lot"),
        ("prune", {"selection": {"budgets": ["20%"]}}, "20%"),
        ("prune", {"selection": {"bugdets": ["0.2"]}}, "bugdets"),
        ("sweep", {"grid": {"runs": ["small", "large"]}}, None),
        ("sweep", {"grid": {"runs": []}}, "[]"),
        ("sweep", {"grid": {"runs": ["small", "small"]}}, "small"),
        ("sweep", {}, "grid"),
    ],
)
def test_server_refuses_what_no_flow_could_run(forms, deployment, parameters, wrong):
    errors = validate(parameters, forms[deployment])
    assert bool(errors) == (wrong is not None)
    assert wrong is None or wrong in str([error.message for error in errors])


@pytest.mark.parametrize("text", ["0.22", ".5", "00.1", "17blocks", "7layers", "0.30kv", ".3kv", "1.25x", "2x"])
def test_form_takes_every_budget_that_the_flow_takes(forms, text):
    read_budget(text)
    assert not validate({"selection": {"budgets": [text]}}, forms["prune"])
    assert Selection(budgets=(text,)).budgets == RunGrid(runs=("r",), budgets=(text,)).budgets


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def settings(port, tmp_path):
    changes = {PREFECT_SERVER_API_PORT: port, PREFECT_SERVER_API_HOST: "127.0.0.1", PREFECT_HOME: tmp_path}
    with temporary_settings(changes):
        yield


@contextmanager
def standing(port, password=None):
    """A server that stands in for Prefect's; gives what it is shown as passwords."""
    shown = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            given = self.headers["Authorization"]
            shown.extend([base64.b64decode(given.split()[1]).decode()] if given else [])
            is_open = self.path == "/api/health" or password is None or shown[-1:] == [password]
            self.send_response(200 if is_open else 401)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield shown
        running.shutdown()


def test_server_is_started_where_nothing_is_and_used_where_ours_answers(settings, port):
    url = f"http://127.0.0.1:{port}/api"
    assert serve.find_server() == (url, False) and server.password() is None
    drawn = server.draw_password()
    assert server.password() == drawn and len(drawn) > 30 and server.draw_password() != drawn
    assert server.password_file().stat().st_mode & 0o777 == 0o600
    drawn = server.password()
    with standing(port, drawn) as shown:
        assert serve.find_server() == (url, True) and shown == []
        assert server.require_private(url) == drawn and set(shown) == {drawn}
    with temporary_settings({PREFECT_API_AUTH_STRING: "a"}):
        assert server.password() == "a"
        with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: "b"}):
            assert server.password() == "b"


@pytest.mark.parametrize(
    ("theirs", "words"), [(None, "asks for no password"), ("me:theirs", "does not take the password in .*password")]
)
def test_a_server_that_is_not_ours_is_refused(settings, port, capsys, monkeypatch, theirs, words):
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    server.draw_password()
    with standing(port, theirs) as shown:
        assert serve.main() == 2
    assert shown == [] or theirs is not None
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line) and "set PREFECT_SERVER_API_PORT to a free port" in line


def test_a_server_of_another_user_is_sent_nothing(settings, port, capsys, monkeypatch):
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    is_root = os.getuid() == 0
    with ExitStack() as stack:
        if is_root:
            os.seteuid(65534)
        try:
            shown = stack.enter_context(standing(port, "me:theirs"))
        finally:
            if is_root:
                os.seteuid(0)
            else:
                monkeypatch.setattr(server.os, "getuid", lambda: 4711)
        with temporary_settings({PREFECT_API_AUTH_STRING: "me:mine"}):
            assert serve.main() == 2
            assert f"port {port} of 127.0.0.1 belongs to another user" in capsys.readouterr().err
            with pytest.raises(InputError, match="another user"):
                server.require_access(f"http://127.0.0.1:{port}/api")
    assert shown == []


def test_the_password_is_no_business_of_other_machines(settings, monkeypatch):
    server.draw_password()
    sent = []
    monkeypatch.setattr(server, "_status", lambda url, path, shown: sent.append(shown) or 401)
    with pytest.raises(InputError, match="does not take the password"):
        server.require_private("https://elsewhere.example/api")
    assert sent == [None]


def test_taken_port_is_named_with_the_fix(settings, port, capsys, monkeypatch):
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)  # this process keeps its own
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        assert serve.main() == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in (said := capsys.readouterr().err)
    assert "PREFECT_SERVER_API_PORT" in said and "Traceback" not in said


def test_server_elsewhere_is_not_started_here(settings):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.2:9/api"}), pytest.raises(InputError) as error:
        serve.find_server()
    assert "http://127.0.0.2:9/api" in str(error.value) and "unset PREFECT_API_URL" in str(error.value)


def test_report_pages_follow_the_files_and_nothing_else_is_served(tmp_path, monkeypatch, port):
    monkeypatch.chdir(tmp_path)
    url = f"http://127.0.0.1:{port}"
    with serve.report_pages("127.0.0.1", port):
        assert httpx.get(f"{url}/report/index.html").status_code == 404
        for folder in ("data/report", "data/tables/one/plots", "data/models"):
            Path(folder).mkdir(parents=True)
            Path(folder, "index.html").write_text(folder)
        Path("secret").touch()
        Path("data/tables/one/a.csv").touch()
        for path, folder in {
            "report/": "data/report", "report/index.html": "data/report", "tables/one/plots/": "data/tables/one/plots"
        }.items():  # fmt: skip
            assert httpx.get(f"{url}/{path}").text == folder
        for path in ("", "models/index.html", "tables/", "tables/one/", "../secret", "report/%2e%2e/%2e%2e/secret",
                     "report/../models/index.html", "report/%2e%2e/models/index.html"):  # fmt: skip
            with socket.create_connection(("127.0.0.1", port)) as raw:  # httpx would tidy the path up
                raw.sendall(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
                assert raw.recv(100).split()[1] == b"404", path
        for host, status in (("elsewhere.example:4201", 400), ("127.0.0.1", 200), ("LocalHost:1", 200)):
            assert httpx.get(f"{url}/report/", headers={"Host": host}).status_code == status
    serve.require_free("127.0.0.1", port, "nothing")


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"


def test_process_that_does_not_end_is_killed(tmp_path):
    with open(tmp_path / "out", "wb") as output, serve.child([sys.executable, "-c", DEAF], {}, 0.3, output) as process:
        wait_until(lambda: (tmp_path / "out").read_text())
    assert process.returncode == -signal.SIGKILL


def test_process_ends_with_this_one():
    script = (
        "import sys, time; from flows.serve import child\n"
        "with child([sys.executable, '-c', 'import time; time.sleep(60)'], {}, 9) as process:\n"
        "    print(process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    wait_until(lambda: not alive(pid))


LOSSES = {"mha.0": 9.0, "mlp.0": 3.0, "mha.1": 2.5, "mlp.1": 2.75, "mha.2": float("nan")}


def rows(chosen, losses=LOSSES, used=5):
    return [{"added": n, "loss": v, "rows": f"{used}/5", "chosen": n == chosen} for n, v in losses.items()]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, each with its texts."""
    figures = []

    def catch(size, draw):
        figures.append(figure := Figure(figsize=size))
        draw(figure)
        return b"png"

    monkeypatch.setattr(charts, "_png", catch)
    return figures


def test_bars_stand_at_their_layers_and_show_what_each_costs_more(drawn):
    charts.scores(charts.candidates(rows("mha.1")))
    (axes,) = drawn[0].axes
    bars = {round(bar.get_x() + bar.get_width() / 2, 3): bar.get_height() for bar in axes.patches}
    assert bars == pytest.approx({-0.2: 6.5, 0.2: 0.5, 0.8: 0.0, 1.2: 0.25})
    (mark,) = axes.lines
    assert mark.get_xdata()[0] == pytest.approx(0.8)


def test_map_grows_also_by_what_is_not_drawn(drawn):
    search = phases.SearchPhase()
    assert search.pictures(rows("mlp.1"), show=False) == {}
    assert search.pictures(rows("mha.2"), show=False) == {}
    assert search.pictures([], show=True) == {}
    assert search.pictures(rows("mha.1"), show=True) == {"scores": b"png", "blocks": b"png"}
    numbers = {(round(t.get_position()[0]), t.get_position()[1]): t.get_text() for t in drawn[-1].axes[0].texts}
    assert numbers == {(1, 1): "1", (2, 0): "2", (1, 0): "3"}  # (layer, 0 for MHA and 1 for MLP)


def test_order_without_losses_has_a_map_only(drawn):
    lost = [row | {"loss": float("nan")} for row in rows("mlp.0")]
    assert phases.SearchPhase().pictures(lost, show=True).keys() == {"blocks"}


def test_pictures_are_png():
    assert charts.scores(charts.candidates(rows("mha.1"))).startswith(b"\x89PNG")
