"""A checkpoint directory as a repository of the Hugging Face hub.

Decides what may be uploaded: a checkpoint that a fresh process has verified. The user chooses when, and the name.
"""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.inputs.hub import hub_error
from blockpruner.store.files import read_json


def push(checkpoint: Path, repo: str, private: bool) -> str:
    """Upload a checkpoint directory in one commit; returns its address.

    Args:
        repo: "<user or organization>/<name>"; it is made if it does not exist.
        private: whether a new repository is private.

    Raises:
        InputError: there is no such checkpoint, it was not verified, or the hub refuses.
    """
    from huggingface_hub import HfApi, ModelCard

    report = checkpoint / "verification.json"
    if not report.exists():
        raise InputError(f"{checkpoint} is not a verified checkpoint; run its materialize stage first")
    found = read_json(report)
    if found["ok"] is not True:
        raise InputError(
            f"{checkpoint} was not verified ({found.get('unchecked', 'the engine disagreed')}); install the engine and "
            "run the materialize stage again"
        )
    api = HfApi()
    try:
        ModelCard.load(checkpoint / "README.md").validate()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=checkpoint, commit_message=f"{checkpoint.parent.name}: pruned with blockpruner"
        )
    except Exception as error:  # as in `inputs.hub`
        raise hub_error(repo, error, "check the name, the network, and that your token may write there") from error
    return str(commit.commit_url)
