"""A checkpoint directory as a repository of the Hugging Face hub.

Decides what may be uploaded: the files that a fresh process has verified, with a licence where the
base has one, to a repository that is as private as was asked. The user chooses when, and the name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockpruner.checkpoints.card import HERE
from blockpruner.core.errors import InputError
from blockpruner.inputs.checkpoints import card_fields, checkpoint_identity, licence_of
from blockpruner.inputs.hub import hub_error
from blockpruner.store.files import read_json, require_inside
from blockpruner.store.manifest import CARD_FILE, REPORT_FILE, SOURCE_FILE, require_verified
from blockpruner.store.plans import PLAN_FILE, load_plan


def files_to_push(checkpoint: Path, licence: Mapping[str, Any]) -> list[str]:
    """The files of a checkpoint directory that may be uploaded, sorted; raises InputError if it was
    not verified, has changed since, or its card names no licence though the base has this one."""
    report_path = checkpoint / REPORT_FILE
    card_path = checkpoint / CARD_FILE
    if not report_path.exists():
        raise InputError(
            f"{checkpoint} is not a verified checkpoint; give a folder that `blockpruner prune`, or"
            " the stage materialize, has written"
        )
    report = read_json(report_path)
    if report.get("ok") is not True:
        reason = report.get("unchecked", "the engine disagreed")
        raise InputError(
            f"{checkpoint} was not verified ({reason}); install the engine and export it again"
        )
    if not card_path.is_file():
        raise InputError(
            f"{checkpoint} has no {CARD_FILE}, the model card; put one there, or export again"
        )
    names = sorted([*require_verified(checkpoint), REPORT_FILE, CARD_FILE])
    for name in names:
        require_inside(checkpoint / name, checkpoint)
    if licence and not card_fields(checkpoint).get("license"):
        raise InputError(
            f"{card_path} has no license, and the base model's is {licence['license']}: add it to"
            " the card, or export again"
        )
    return names


def base_licence(checkpoint: Path, cache: Path) -> dict[str, Any]:
    """The licence of the checkpoint's base, if the folder of `--cache` still has that model."""
    plan = checkpoint / PLAN_FILE
    base = load_plan(plan).base if plan.is_file() else None
    for source in (cache / "cache/models").glob(f"[!.]*/{SOURCE_FILE}"):
        dense = source.parent
        # Damaged models that were set aside have the suffix ".bad".
        if ".bad" not in dense.suffixes and checkpoint_identity(dense) == base:
            return licence_of(dense)
    return {}


def push(checkpoint: Path, repo: str, private: bool, licence: Mapping[str, Any], name: str) -> str:
    """Upload a checkpoint directory in one commit, its card with the repository's name; returns the
    address. A repository that does not exist is made. Raises InputError as `files_to_push` does, if
    the repository is there and not as private as was asked, or the hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

    files = files_to_push(checkpoint, licence)
    api = HfApi()
    try:
        ModelCard.load(checkpoint / CARD_FILE).validate()
        api.create_repo(repo, private=private, exist_ok=True)
        if api.model_info(repo).private is not private:
            raise InputError(
                f"repository {repo!r} is there and {'public' if private else 'private'}, and"
                f" push.private is {str(private).lower()}; nothing was uploaded: change one of"
                " them, or push to another repository"
            )
        # llama.cpp loads a repository by another option than a file.
        card = (checkpoint / CARD_FILE).read_text(encoding="utf-8")
        card = card.replace(f"-m {HERE}/model-Q8_0.gguf", f"-hf {repo}:Q8_0").replace(HERE, repo)
        contents: dict[str, Any] = {file: str(checkpoint / file) for file in files}
        contents[CARD_FILE] = card.encode()
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(file, content) for file, content in contents.items()],
            commit_message=f"{name}: pruned with blockpruner",
        )
    except InputError:
        raise
    except Exception as error:
        # The hub's library raises errors of many kinds, as in `inputs.hub`.
        raise hub_error(
            repo, error, "check the name, the network, and that your token may write there"
        ) from error
    return str(commit.commit_url)
