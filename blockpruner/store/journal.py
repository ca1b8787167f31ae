"""Append-only logs: a first line that names what the log is of, then a line for each entry, each
with its CRC-32.

Decides how a line is written and when it is trusted. What an entry means is decided by the modules
that write them.
"""

import json
import math
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from blockpruner.store.files import make_folder, set_aside, storage_error, sync, writing


class Journal:
    """One log on disk. A kill loses at most the line being written; a cut of power also what was
    not synced."""

    def __init__(self, path: Path, header: Mapping[str, Any], seconds: float = 0.0) -> None:
        """Write nothing yet; the file is made by the first entry. `header` is the first line; a
        file with another one is not this log. It is synced by the first entry that comes `seconds`
        after the last sync, and when closed."""
        self.path = path
        self._header = dict(header)
        self._seconds = seconds
        self._stream: TextIO | None = None
        self._synced = -math.inf

    def read_header(self) -> dict[str, Any] | None:
        """The first line as it stands on disk; None if there is no whole one."""
        if not self.path.exists():
            return None
        with open(self.path, encoding="utf-8", errors="replace") as stream:
            line = stream.readline()
        if not line.endswith("\n"):
            return None
        return parse_checksummed(line.removesuffix("\n"))

    def read(self, problems: list[str]) -> list[dict[str, Any]]:
        """Read the entries that are whole; `problems` gets one line for each file or line that is
        not trusted. A log of something else is set aside. A last line without an end is what a kill
        interrupted: no problem."""
        text = self._whole_lines().decode(errors="replace")
        if not text:
            return []
        lines = text.removesuffix("\n").split("\n")
        header = parse_checksummed(lines[0])
        # The header of a writer may have more fields than the reader knows.
        if header is None or not self._header.items() <= header.items():
            bad_path = set_aside(self.path)
            problems.append(
                f"{self.path} is not the log of {self._header} (first line {lines[0][:120]!r}); set"
                f" aside as {bad_path.name}, what it held is computed again"
            )
            return []
        entries = []
        for number, line in enumerate(lines[1:], start=2):
            entry = parse_checksummed(line)
            if entry is None:
                problems.append(f"{self.path}, line {number}: damaged; it is computed again")
            else:
                entries.append(entry)
        return entries

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry, and sync the log when it is due; raises StorageError if that fails."""
        is_new = self._stream is None
        try:
            stream = self._open()
            stream.write(checksummed(entry))
            stream.flush()
            if is_new or time.monotonic() - self._synced >= self._seconds:
                os.fsync(stream.fileno())
                self._synced = time.monotonic()
            if is_new:
                sync(self.path.parent)
        except OSError as error:
            # Closing writes the rest of the line again, which fails again.
            with suppress(OSError):
                if self._stream is not None:
                    self._stream.close()
            self._stream = None
            raise storage_error(self.path, error) from error

    def _open(self) -> TextIO:
        """The stream of the file, which stays open until `close`."""
        if self._stream is None:
            make_folder(self.path.parent)
            self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            # A last line that a kill interrupted would spoil the next one.
            size = len(self._whole_lines())
            self._stream.truncate(size)
            if size == 0:
                self._stream.write(checksummed(self._header))
        return self._stream

    def close(self) -> None:
        """Sync what is not yet, and close the file; raises StorageError if that fails."""
        stream = self._stream
        self._stream = None
        if stream is None:
            return
        with writing(self.path, alone=True), stream:
            if self._seconds:
                os.fsync(stream.fileno())

    def _whole_lines(self) -> bytes:
        """The content without an interrupted last line."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]


def checksummed(value: Mapping[str, Any]) -> str:
    """A line of a log: the CRC-32 of the JSON text, then the text."""
    text = json.dumps(value, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def parse_checksummed(line: str) -> dict[str, Any] | None:
    """The value of a line that `checksummed` wrote; None if the line is damaged."""
    checksum, _, text = line.partition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        return None
    return dict(json.loads(text))
