"""Repositories of the Hugging Face hub: which revision is used, and how a hub error reads."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.store.files import FULL, read_json, storage_error, write_json
from blockpruner.store.locks import hold, this_process

COMMIT = re.compile(r"[0-9a-f]{40}")
ANOTHER = "use a folder or file of this machine"


class HubError(InputError):
    """A repository cannot be used."""


def pinned_revision(repo: str, kind: str, revision: str | None, pins: Path) -> str:
    """The commit of a hub repository: the run file's, else the one in the pins file, else today's,
    which is kept there. `kind` is "model" or "dataset"; `revision` is a commit, or a name that may
    move (a branch, a tag, refs/pr/<number>), None: main."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    key = f"{kind}:{repo}" if revision is None else f"{kind}:{repo}@{revision}"
    commits = _read_pins(pins)
    if key in commits:
        return commits[key]
    from huggingface_hub import HfApi

    api = HfApi()
    repository_info = api.model_info if kind == "model" else api.dataset_info
    try:
        commit = repository_info(repo, revision=revision).sha
    except Exception as error:  # also errors of its HTTP library, which differs between versions
        raise hub_error(repo, error) from error
    assert commit is not None
    lock = pins.with_name(f".{pins.name}.lock")
    with hold(lock, this_process(), lambda holder: None):
        # Another fetch may have pinned the same name meanwhile: its commit stays.
        commits = {key: commit} | _read_pins(pins)
        write_json(pins, dict(sorted(commits.items())))
    return commits[key]


def _read_pins(pins: Path) -> dict[str, str]:
    if not pins.exists():
        return {}
    commits: Any = None
    with suppress(InputError):
        commits = read_json(pins)
    if isinstance(commits, dict) and all(map(_is_commit, commits.values())):
        return commits
    raise InputError(
        f"{pins} is damaged, and it names the commit of every hub repository: bring it back with"
        f" `git checkout {pins}`"
    )


def _is_commit(value: object) -> bool:
    return COMMIT.fullmatch(str(value)) is not None


def hub_error(
    repo: str, error: Exception, fix: str = f"check the network, or {ANOTHER}"
) -> HubError:
    """An error of `huggingface_hub` as one line for the user, with a `fix` where the error does not
    tell what to do; raises StorageError if the hub's cache has no room."""
    if isinstance(error, OSError) and error.errno in FULL:
        raise storage_error(Path(error.filename or "the hub's cache (HF_HOME)"), error) from error
    causes = {
        "GatedRepoError": (
            "access is gated: accept its terms on the hub and log in with `hf auth login`"
        ),
        "RepositoryNotFoundError": (
            "no such repository, or it is private: check the name, or log in with `hf auth login`"
        ),
        "RevisionNotFoundError": (
            "no such revision: check `revision`, a commit, branch, tag or refs/pr/<number>"
        ),
        "OfflineModeIsEnabled": f"HF_HUB_OFFLINE is set: unset it, or {ANOTHER}",
    }
    cause = causes.get(type(error).__name__)
    if cause is None:
        lines = str(error).strip().splitlines()
        cause = f"{lines[0] if lines else type(error).__name__}; {fix}"
    return HubError(f"hub repository {repo!r} cannot be used: {cause}")
