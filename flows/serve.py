"""`make serve` (`python -m flows.serve`): the pipeline in a browser, on this machine only.

Starts the Prefect server, unless one of this user's answers at PREFECT_API_URL; a runner, which starts FLOWS when the
UI asks for one, one at a time; and the pages of the reports, one port above the server's. Ctrl-C ends all of it.

Decides what is served, where, and how it ends. Who may use the server is decided by flows.server. What a flow does, and
what its form asks for, is decided elsewhere.
Prefect's own settings decide where the server listens (PREFECT_SERVER_API_HOST, PREFECT_SERVER_API_PORT), where its
files are (PREFECT_HOME) and which database it has (PREFECT_SERVER_DATABASE_CONNECTION_URL: SQLite in PREFECT_HOME, or
PostgreSQL).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import IO, Any

import httpx
from prefect import serve
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.deployments.runner import RunnerDeployment
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, get_current_settings, temporary_settings
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from blockpruner.core.errors import InputError
from flows import server
from flows.dvc import end_with, require_posix
from flows.new_model import new_model
from flows.phases import OPEN, open_task_runs
from flows.prune import PAGES_VARIABLE, prune
from flows.sweep import sweep

FLOWS = (prune, new_model, sweep)

POLL = 2.0
"""Seconds between two looks of the runner for what to start, and for what to cancel if the server's events are lost."""

START = 300.0
"""Seconds that the server gets to start; making its database takes most of them."""

END = {"runner": 45.0, "server": 10.0}
"""Seconds to end before SIGKILL. The runner gives its flow 30 s of its own; the server waits for open pages."""

PAGES = ("report", "tables")
"""The folders of data/ that are served."""


def deployments() -> list[RunnerDeployment]:
    """One for each of FLOWS, under the flow's name; their forms name the run files that exist now."""
    return [RunnerDeployment.from_flow(flow, flow.name, entrypoint_type=EntrypointType.MODULE_PATH) for flow in FLOWS]


def run_files() -> dict[str, int]:
    """When each file in runs/ was written."""
    found = {}
    for path in Path("runs").glob("*.yaml"):
        with suppress(FileNotFoundError):  # it went in between
            found[path.name] = path.stat().st_mtime_ns
    return found


def follow_runs(url: str, known: dict[str, int]) -> dict[str, int]:
    """Have the forms name the run files that are there now, if these are not the `known` ones; returns what is known
    then."""
    found = run_files()
    if found == known:
        return known
    try:
        with temporary_settings({PREFECT_API_URL: url}):
            for deployment in deployments():
                deployment.apply()
    except InputError as error:
        print(f"the forms are as before: {error}", file=sys.stderr)
    except httpx.HTTPError:  # try again, unless the server has ended
        return known
    return found


def run_deployments() -> None:
    """Be the runner, until SIGTERM; that cancels the flow that runs."""
    logging.getLogger("prefect.runner").setLevel(logging.WARNING)  # else a line at every look while a run waits
    serve(*deployments(), limit=1, pause_on_shutdown=False, print_starting_message=False, query_seconds=POLL)


def find_server() -> tuple[str, bool]:
    """The URL of the server's API, and whether a server answers there.

    Raises:
        InputError: nothing answers, and no server can be started there.
    """
    settings = get_current_settings()
    url = settings.api.url or f"http://{settings.server.api.host}:{settings.server.api.port}/api"
    if server.answers(url):
        return url, True
    host, port = server.place(url)
    if not server.is_here(url):
        raise InputError(
            f"the Prefect server at {url} (PREFECT_API_URL) does not answer; start it on {host}, or unset "
            "PREFECT_API_URL to start one here"
        )
    require_free(host, port, "PREFECT_SERVER_API_PORT (or PREFECT_API_URL)")
    return url, False


def require_free(host: str, port: int, setting: str, by: str = "what has it is no Prefect server") -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} of {host} cannot be used ({error.strerror}); {by}; stop that, or set {setting} to a "
                "free port"
            ) from None


class ReportHandler(SimpleHTTPRequestHandler):
    """The files of the reports, for pages of this machine."""

    def send_head(self) -> Any:
        """Answer to the server's own names only, as `flows.server` does."""
        asked = (self.headers["Host"] or server.LOOPBACK[0]).rpartition(":")
        if (asked[0] or asked[2]).lower() in server.hosts(self.connection.getsockname()[0]):
            return super().send_head()
        self.send_error(400, "Invalid host header")
        return None

    def translate_path(self, path: str) -> str:
        """Find files in PAGES only."""
        found = super().translate_path(path)
        return found if Path(found).relative_to(self.directory).parts[:1] in [(name,) for name in PAGES] else ""

    def list_directory(self, path: str | os.PathLike[str]) -> None:
        """Do not list a folder."""
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def report_pages(host: str, port: int) -> Iterator[None]:
    """Serve the folders of reports; the stages that write them may come later."""
    with ThreadingHTTPServer((host, port), partial(ReportHandler, directory=str(Path("data").absolute()))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


@contextmanager
def child(
    command: list[str], environment: dict[str, str], seconds: float, output: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which Ctrl-C does not reach. It ends with the block, or with this process."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=partial(end_with, os.getpid()),
    )
    try:
        yield process
    finally:
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        finally:  # also after a second Ctrl-C
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def server_settings(host: str, port: int, password: str) -> dict[str, str]:
    """What differs from Prefect's defaults. Of all pages in a browser, only the server's own may use it."""
    origins = [f"http://{name}:{port}" for name in server.hosts(host)]
    return {
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",  # a run that waits for the one before it is not late
    }


@contextmanager
def prefect_server(url: str, password: str) -> Iterator[subprocess.Popen[bytes]]:
    """The server, answering whoever has the password; its output goes to server.log in PREFECT_HOME.

    Raises:
        InputError: it did not start; ends with its output.
    """
    host, port = server.place(url)
    log = get_current_settings().home / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command, settings = [sys.executable, "-m", "flows.server", host, str(port)], server_settings(host, port, password)
    with open(log, "wb") as output, child(command, settings, END["server"], output) as process:
        end = time.monotonic() + START
        while not server.answers(url):
            if process.poll() is not None or time.monotonic() > end:
                last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
                raise InputError(f"the Prefect server did not start at {url}; {log} ends with:\n{last}")
            time.sleep(0.2)
        yield process


def end_lost_runs(url: str) -> None:
    """Mark as crashed what a killed runner left open; the runner that is started next is the only one."""
    message = "`make serve` or its machine ended in this run; finished work is kept: Retry goes on"
    names = DeploymentFilter.model_validate({"name": {"any_": [flow.name for flow in FLOWS]}})
    lost = FlowRunFilter.model_validate({"state": {"type": {"any_": OPEN}}})
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        for run in client.read_flow_runs(deployment_filter=names, flow_run_filter=lost):
            for part in open_task_runs(client, run.id):
                client.set_task_run_state(part.id, Crashed(message=message), force=True)
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
            print(f"flow run {run.name}: {message}")


def main() -> int:
    """0: ended by Ctrl-C or SIGTERM; 1: the server or the runner ended by itself; 2: refused."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also where `nohup` or `&` had it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        require_posix()
        with ExitStack() as stack:
            url, running = find_server()
            password = server.require_private(url) if running else server.password()
            host, port = get_current_settings().server.api.host, server.place(url)[1] + 1
            require_free(host, port, "PREFECT_SERVER_API_PORT", "it may be another `make serve`")
            pages = f"http://{host}:{port}"
            hint = f"the password in {server.password_file()}"
            if password is None:
                password = server.draw_password()
                hint = f"the password {password}, kept in {server.password_file()}"
            elif password != server.kept_password():
                hint = "the password of PREFECT_SERVER_API_AUTH_STRING"
            stack.enter_context(temporary_settings({PREFECT_API_AUTH_STRING: password}))
            known = run_files()
            processes = [] if running else [stack.enter_context(prefect_server(url, password))]
            end_lost_runs(url)
            script = [sys.executable, "-c", "from flows.serve import run_deployments; run_deployments()"]
            variables = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": password, PAGES_VARIABLE: pages}
            processes.append(stack.enter_context(child(script, variables, END["runner"])))
            stack.enter_context(report_pages(host, port))  # after the processes: do not fork beside its thread
            print(f"{'Using' if running else 'Started'} the Prefect server: {url.removesuffix('/api')}/deployments")
            print(f"It asks for {hint}")
            print(f"The report, once there is one: {pages}/report/index.html\nCtrl-C ends all.", flush=True)
            while all(process.poll() is None for process in processes):
                time.sleep(0.5)
                known = follow_runs(url, known)
            print("the Prefect server (see server.log in PREFECT_HOME) or the runner has ended", file=sys.stderr)
            return 1
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
