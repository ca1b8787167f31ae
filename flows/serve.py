"""`make serve` (`python -m flows.serve`): the pipeline in a browser, on this machine only.

Starts the Prefect server, unless PREFECT_API_URL names one; a runner, which starts FLOWS when the
UI asks for one, one at a time; and the pages of the reports, one port above the server's. Ctrl-C
ends all of it.

Decides what is served, and how it ends. Prefect's settings decide the server's port
(PREFECT_SERVER_API_PORT), where its files are (PREFECT_HOME) and which database it has
(PREFECT_SERVER_DATABASE_CONNECTION_URL).
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from prefect import serve
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    get_current_settings,
    temporary_settings,
)
from prefect.types.entrypoint import EntrypointType

from blockpruner.core.errors import InputError
from flows.dvc import end_with, stop
from flows.new_model import new_model
from flows.paper import paper
from flows.prune import PAGES_VARIABLE, prune
from flows.server import password, require_access, status

FLOWS = (prune, new_model, paper)
HOST = "127.0.0.1"
PAGES = ("report", "tables")
"""The folders of data/ that are served."""

START, END = 300.0, 10.0
"""Seconds that the server gets to start, most of them to make its database, and to end before
SIGKILL."""


def deployments() -> list[Any]:
    """One for each of FLOWS, under the flow's name. The flow itself checks what a form holds."""
    module = EntrypointType.MODULE_PATH
    return [
        flow.to_deployment(flow.name, enforce_parameter_schema=False, entrypoint_type=module)
        for flow in FLOWS
    ]


def require_free(port: int) -> None:
    """Refuse a port of this machine that something listens at; raises InputError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            problem = (
                f"port {port} of {HOST} cannot be used ({error.strerror}); it may be another `make"
                " serve`"
            )
            free = "set PREFECT_SERVER_API_PORT to a free port with a free one above it"
            raise InputError(f"{problem}; stop that, or {free}", rule="port-taken") from None


class ReportHandler(SimpleHTTPRequestHandler):
    """The files of the reports, for pages of this machine."""

    def send_head(self) -> Any:
        """Answer to this machine's own names only: a page of another name that leads here gets
        nothing."""
        if (self.headers["Host"] or HOST).partition(":")[0].lower() in (HOST, "localhost"):
            return super().send_head()
        self.send_error(400, "Invalid host header")
        return None

    def translate_path(self, path: str) -> str:
        """Find files in PAGES only, also behind links."""
        file = super().translate_path(path)
        if "\0" in file:  # no file has such a name, and none can be looked for
            return ""
        root = Path(self.directory).resolve()
        target = Path(file).resolve()
        if any(target.is_relative_to(root / name) for name in PAGES):
            return file
        return ""

    def list_directory(self, path: str | os.PathLike[str]) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def report_pages(port: int) -> Iterator[None]:
    """Serve the folders of reports; the stages that write them may come later."""
    with ThreadingHTTPServer(
        (HOST, port), partial(ReportHandler, directory=str(Path("data").absolute()))
    ) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


@contextmanager
def prefect_server(port: int, secret: str) -> Iterator[subprocess.Popen[bytes]]:
    """Prefect's server, answering whoever has the password; its output goes to server.log in
    PREFECT_HOME.

    It is in a session of its own, which Ctrl-C does not reach, and ends with the block, or with
    this process.
    """
    log = get_current_settings().home / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # a run that waits for the one before it is not late
    settings = {
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": ("false"),
    }
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "prefect",
                "server",
                "start",
                "--host",
                HOST,
                "--port",
                str(port),
            ],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            umask=0o077,
            preexec_fn=partial(end_with, os.getpid()),
        )
    try:
        end = time.monotonic() + START
        while status(f"http://{HOST}:{port}/api") is None:
            if process.poll() is not None or time.monotonic() > end:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                tail = "\n".join(lines[-10:])
                raise InputError(
                    f"the Prefect server did not start; {log} ends with:\n{tail}", rule="no-server"
                )
            time.sleep(0.2)
        yield process
    finally:
        stop(process, process.terminate, END)


def main() -> int:
    """0: ended by Ctrl-C or SIGTERM; 2: refused."""
    # until the runner has a handler, which ends its flow
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    # else a line at every look while a run waits
    logging.getLogger("prefect.runner").setLevel(logging.WARNING)
    try:
        settings = get_current_settings()
        port = settings.server.api.port
        server_url = settings.api.url  # of a server that already runs
        with ExitStack() as stack:
            # Reports are served one port above the server. One that already runs holds its own.
            require_free(port + 1)
            if not server_url:
                require_free(port)
            secret, hint = password()
            url = server_url or f"http://{HOST}:{port}/api"
            pages = f"http://{HOST}:{port + 1}"
            stack.enter_context(
                temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: secret})
            )
            if not server_url:
                stack.enter_context(prefect_server(port, secret))
            require_access(url)
            stack.enter_context(report_pages(port + 1))
            print(f"The Prefect server: {url.removesuffix('/api')}\nIt asks for {hint}")
            print(
                f"The report, once there is one: {pages}/report/index.html\nCtrl-C ends all.",
                flush=True,
            )
            os.environ[PAGES_VARIABLE] = pages
            serve(
                *deployments(),
                limit=1,
                pause_on_shutdown=False,
                print_starting_message=False,
                query_seconds=2,
            )
            return 0
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
