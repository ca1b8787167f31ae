"""The password of the Prefect server that `make serve` starts, and whether a server takes it.

Whoever uses a Prefect server can run code as the user who started it, so every request for data
needs a password. When the server starts and ends is decided by flows.serve.
"""

import secrets
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from blockpruner.core.errors import InputError


def password_file() -> Path:
    return get_current_settings().home / "password"


def password() -> tuple[str, str]:
    """The password of the environment, else the one that is kept, else a new one; and where it is,
    in words."""
    settings = get_current_settings()
    from_environment = settings.server.api.auth_string or settings.api.auth_string
    if from_environment:
        return (
            from_environment.get_secret_value(),
            "the password of PREFECT_SERVER_API_AUTH_STRING",
        )
    path = password_file()
    stored = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if stored:
        return stored, f"the password in {path}"
    # As HTTP clients write it: a user, whose name means nothing here, and a password.
    new = f"me:{secrets.token_hex(16)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(f"{new}\n", encoding="utf-8")
    return new, f"the password {new}, kept in {path}"


def status(url: str) -> int | None:
    """The status of the server's answer to a request with the password of the settings; None: no
    answer."""
    with temporary_settings({PREFECT_API_URL: url}):
        try:
            with get_client(sync_client=True) as client:
                return client.request("GET", "/admin/version").status_code
        except httpx.HTTPStatusError as error:
            return error.response.status_code
        except httpx.HTTPError:
            return None


def require_access(url: str) -> None:
    """Refuse a server that a flow cannot report to."""
    status_code = status(url)
    if status_code == 200:
        return
    problem = "wants another password" if status_code == 401 else "does not answer"
    raise InputError(
        f"the Prefect server at {url} (PREFECT_API_URL) {problem}; start it with `make serve` and"
        ' export PREFECT_API_AUTH_STRING="$(cat .prefect/password)", or unset PREFECT_API_URL to'
        " run without one",
        rule="no-server",
    )
