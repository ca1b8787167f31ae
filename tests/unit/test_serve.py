"""What `make serve` decides: the forms, where the server is, its password, the pages of the
reports."""

import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_API_PORT,
    Settings,
    temporary_settings,
)
from prefect.utilities.schema_tools import is_valid_schema

from flows import serve, server
from tests.errors import refused
from tests.ports import free_port


def test_forms_describe_every_field_and_enforce_nothing():
    """The flow checks what they hold: a run file may be younger than the form."""
    for deployment in serve.deployments():
        schema = deployment._parameter_openapi_schema.model_dump()
        is_valid_schema(schema)
        assert not deployment.enforce_parameter_schema
        fields = [*schema["properties"].values()]
        for name in [field["$ref"].rpartition("/")[2] for field in fields if "$ref" in field]:
            fields = [*schema["definitions"][name]["properties"].values()]
        assert fields
        assert all(field["description"] for field in fields)


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def settings(port, tmp_path, monkeypatch):
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)  # this process keeps its own
    with temporary_settings({PREFECT_SERVER_API_PORT: port, PREFECT_HOME: tmp_path}):
        yield


def test_the_password_is_drawn_once_and_readable_by_this_user_only(settings):
    drawn, hint = server.password()
    assert len(drawn) > 30
    assert drawn in hint
    kept, hint = server.password()
    assert kept == drawn
    assert drawn not in hint
    assert str(server.password_file()) in hint
    assert server.password_file().stat().st_mode & 0o777 == 0o600
    with temporary_settings({PREFECT_API_AUTH_STRING: "a"}):
        assert server.password()[0] == "a"
        with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: "b"}):
            assert server.password()[0] == "b"


@contextmanager
def standing(port, status):
    """A server that stands in for Prefect's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            running.shutdown()


@pytest.mark.parametrize(
    ("status", "words"), [(401, "wants another password"), (None, "does not answer")]
)
def test_a_server_that_takes_no_report_is_refused(settings, port, status, words):
    url = f"http://127.0.0.1:{port}/api"
    with refused("no-server") as caught:
        if status is None:
            server.require_access(url)
        with standing(port, status):
            server.require_access(url)
    assert words in str(caught.value)
    assert url in str(caught.value)
    with standing(port, 200):
        server.require_access(url)


def test_taken_port_is_named_with_the_fix(settings, port, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        assert serve.main() == 2
    said = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 cannot be used" in said
    assert "PREFECT_SERVER_API_PORT" in said
    assert "Traceback" not in said


def test_report_pages_follow_the_files_and_nothing_else_is_served(tmp_path, monkeypatch, port):
    monkeypatch.chdir(tmp_path)
    url = f"http://127.0.0.1:{port}"
    with serve.report_pages(port):
        assert httpx.get(f"{url}/report/index.html").status_code == 404
        for folder in ("data/report", "data/tables/one/plots", "data/models"):
            Path(folder).mkdir(parents=True)
            Path(folder, "index.html").write_text(folder)
        Path("secret").touch()
        assert httpx.get(f"{url}/report/").text == "data/report"
        assert httpx.get(f"{url}/tables/one/plots/index.html").text == "data/tables/one/plots"
        for path in (
            "",
            "models/index.html",
            "tables/",
            "../secret",
            "report/%2e%2e/models/index.html",
        ):
            with socket.create_connection(
                ("127.0.0.1", port)
            ) as raw:  # httpx would tidy the path up
                raw.sendall(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
                assert raw.recv(100).split()[1] == b"404", path
        Path("data/report/linked").symlink_to(Path("secret").absolute())
        Path("data/tables/two").symlink_to(Path("data/models").absolute())
        Path("data/report/own").symlink_to("index.html")
        assert httpx.get(f"{url}/report/own").text == "data/report"
        for path in ("report/linked", "tables/two/index.html", "report/%00"):
            assert httpx.get(f"{url}/{path}").status_code == 404, path
        for host, status in (
            ("elsewhere.example:4201", 400),
            ("127.0.0.1", 200),
            ("LocalHost:1", 200),
        ):
            assert httpx.get(f"{url}/report/", headers={"Host": host}).status_code == status


def test_the_server_is_for_its_own_page_and_its_files_for_this_user(
    settings, port, tmp_path, monkeypatch
):
    """A program stands in for Python, which would take half a minute to start Prefect."""
    program, origins = tmp_path / "program", tmp_path / "origins"
    program.write_text(
        f"#!/bin/sh\ntouch {tmp_path}/prefect.db\n"
        f'echo "$PREFECT_SERVER_CORS_ALLOWED_ORIGINS" > {origins}.new && mv {origins}.new'
        f" {origins}\nexec sleep 60\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(serve.sys, "executable", str(program))
    monkeypatch.setattr(serve, "status", lambda url: 200 if origins.exists() else None)
    with serve.prefect_server(port, "me:secret"):
        pass
    assert (tmp_path / "prefect.db").stat().st_mode & 0o077 == 0
    allowed = origins.read_text().strip()
    assert allowed == f"http://127.0.0.1:{port},http://localhost:{port}"
    monkeypatch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", allowed)
    assert Settings().server.api.cors_allowed_origins == allowed, "Prefect reads this name"
