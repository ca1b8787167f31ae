"""The Prefect server that `make serve` starts: for this user alone, and for pages of its own alone.

Whoever uses a Prefect server can run code as the user who started it. Decides the password that every request needs,
which server is ours, and, as `python -m flows.server HOST PORT`, under which names a browser may ask: a page whose own
name was made to lead here would otherwise be asked like ours. When the server starts and ends is decided by
flows.serve.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, get_current_settings, temporary_settings

from blockpruner.core.errors import InputError
from blockpruner.store.files import write_atomic

LOOPBACK = ("127.0.0.1", "localhost")
LISTENS = "0A"
"""The state of a socket in /proc/net/tcp that waits for connections."""

OTHER_PORT = "stop that server, or set PREFECT_SERVER_API_PORT to a free port"


def place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or LOOPBACK[0], parts.port or (443 if parts.scheme == "https" else 80)


def hosts(host: str) -> tuple[str, ...]:
    """The names under which a browser of this machine reaches a server that listens at `host`."""
    return tuple(dict.fromkeys((host, *LOOPBACK)))


def is_here(url: str) -> bool:
    return place(url)[0] in hosts(get_current_settings().server.api.host)


def password_file() -> Path:
    return get_current_settings().home / "password"


def kept_password() -> str | None:
    path = password_file()
    return (path.read_text(encoding="utf-8").strip() or None) if path.exists() else None


def password() -> str | None:
    """The password of the environment, else the one that is kept; None: there is none yet."""
    settings = get_current_settings()
    given = settings.server.api.auth_string or settings.api.auth_string
    return given.get_secret_value() if given else kept_password()


def draw_password() -> str:
    """A new password, kept in a file that only this user can read."""
    drawn = f"me:{secrets.token_hex(16)}"  # as clients of HTTP write it: a user, which is nobody here, and a password

    def write(temporary: Path) -> None:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(f"{drawn}\n")

    write_atomic(password_file(), write)
    return drawn


def answers(url: str) -> bool:
    """Whether a server answers; it is sent no password."""
    return _status(url, "/health", None) == 200


def _status(url: str, path: Literal["/health", "/admin/version"], shown: str | None) -> int | None:
    """The status of an answer to a request with this password; None: no answer."""
    changes = {PREFECT_API_URL: url} | ({PREFECT_API_AUTH_STRING: shown} if shown else {})
    with temporary_settings(changes, restore_defaults=() if shown else (PREFECT_API_AUTH_STRING,)):
        try:
            with get_client(sync_client=True) as client:
                return client.request("GET", path).status_code
        except httpx.HTTPStatusError as error:
            return error.response.status_code
        except httpx.HTTPError:
            return None


def require_own(url: str) -> None:
    """Refuse a server of this machine that another user runs; root is trusted.

    Raises:
        InputError: names the user and the fix.
    """
    host, port = place(url)
    for user in (_listeners(port) if is_here(url) else set()) - {os.getuid(), 0}:
        raise InputError(f"port {port} of {host} belongs to another user (id {user}); {OTHER_PORT}")


def _listeners(port: int) -> set[int]:
    """The users whose processes wait for connections at a port of this machine; none where there is no /proc."""
    tables = (path for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists())
    rows = [line.split() for path in tables for line in path.read_text().splitlines()[1:]]
    return {int(row[7]) for row in rows if row[3] == LISTENS and int(row[1].rpartition(":")[2], 16) == port}


def require_private(url: str) -> str:
    """The password of a server that runs already.

    Raises:
        InputError: it is another user's, serves everybody, or does not take our password.
    """
    require_own(url)
    if _status(url, "/admin/version", None) == 200:
        raise InputError(
            f"the Prefect server at {url} asks for no password, so every user of this machine can run code by it; "
            f"{OTHER_PORT}"
        )
    given = get_current_settings().api.auth_string
    known = password() if is_here(url) else given and given.get_secret_value()  # ours is nothing to other machines
    if not known or _status(url, "/admin/version", known) != 200:
        raise InputError(
            f"the Prefect server at {url} does not take the password in {password_file()} (or PREFECT_API_AUTH_STRING)"
            f", so `make serve` of this folder did not start it; {OTHER_PORT}"
        )
    return known


def require_access(url: str) -> None:
    """Refuse a server that a flow cannot report to.

    Raises:
        InputError: it does not answer, is another user's, or wants a password.
    """
    if not answers(url):
        raise InputError(
            f"the Prefect server at {url} (PREFECT_API_URL) does not answer; start it with `make serve`, or unset "
            "PREFECT_API_URL to run without one"
        )
    require_own(url)
    given = get_current_settings().api.auth_string
    if _status(url, "/admin/version", given.get_secret_value() if given else None) == 401:
        raise InputError(
            f"the Prefect server at {url} (PREFECT_API_URL) wants another password: "
            'export PREFECT_API_AUTH_STRING="$(cat .prefect/password)"'
        )


def main() -> None:
    """Be the server, as `prefect server start` is, behind a check of the name that it is asked by."""
    import uvicorn
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    host, port = sys.argv[1], int(sys.argv[2])
    app = TrustedHostMiddleware(create_app(final=True), allowed_hosts=hosts(host), www_redirect=False)
    settings = get_current_settings().server
    uvicorn.run(
        app,
        host=host,
        port=port,
        timeout_keep_alive=settings.api.keepalive_timeout,
        log_level=settings.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
