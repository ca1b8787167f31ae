"""Repositories of the Hugging Face hub: which revision is used, and how a hub error reads."""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.store.files import read_json, write_json

ANOTHER_SOURCE = "check the network, or use another source (pypi, path)"


def pinned_revision(repo: str, kind: str, revision: str | None, pins: Path) -> str:
    """The commit of a hub repository: the run file's, else the one in the pins file, else the newest, which is kept.

    Args:
        kind: "model" or "dataset".
    """
    if revision is not None:
        return revision
    known: dict[str, str] = read_json(pins) if pins.exists() else {}
    key = f"{kind}:{repo}"
    if key not in known:
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            info = api.model_info(repo) if kind == "model" else api.dataset_info(repo)
        except Exception as error:  # also errors of its HTTP library, which differs between versions
            raise hub_error(repo, error) from error
        assert info.sha is not None
        known[key] = info.sha
        write_json(pins, dict(sorted(known.items())))
    return known[key]


def hub_error(repo: str, error: Exception, fix: str = ANOTHER_SOURCE) -> InputError:
    """An error of `huggingface_hub` as one line for the user."""
    causes = {
        "GatedRepoError": "access is gated: accept its terms on the hub and log in with `hf auth login`",
        "RepositoryNotFoundError": "no such repository, or it is private: check the name, or log in with "
        "`hf auth login`",
        "RevisionNotFoundError": "no such revision: check model.revision",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it, or use another source (pypi, path)",
    }
    cause = causes.get(type(error).__name__)
    if cause is None:
        lines = str(error).strip().splitlines()
        cause = f"{lines[0] if lines else type(error).__name__}; {fix}"
    return InputError(f"hub repository {repo!r} cannot be used: {cause}")
