"""Files that hold results: Parquet schemas, and writes that are whole or absent.

Decides how a file gets onto disk (temporary name, fsync, `os.replace`) and what a reader accepts.
What the rows mean is decided by the modules that write them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from blockpruner.core.errors import InputError, StorageError

HOST = socket.gethostname().replace(".", "_")
"""In the names of temporary files: a store may be shared by machines, whose process ids say nothing of each other."""

TEMPORARY = re.compile(r"\..+\.([^.]+)-(\d+)\.tmp")
"""Their names; groups: the machine, the process."""

DIGEST = "sha256"
"""Key of a table's metadata."""


def storage_error(path: Path, error: OSError) -> StorageError:
    causes = {
        errno.ENOSPC: "no space left on the device; free some and run again",
        errno.EDQUOT: "the disk quota is used up; free some and run again",
        errno.EROFS: "the file system is mounted read-only; remount it writable or choose another place",
        errno.EACCES: "permission denied; make the folder writable for this user or choose another place",
        errno.EPERM: "permission denied; make the folder writable for this user or choose another place",
        errno.ENOLCK: "no file can be locked there; choose a place on another file system",
    }
    cause = causes.get(error.errno or 0, str(error))
    return StorageError(f"cannot write {path}: {cause}. Everything finished before this is kept and will be reused.")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, then move it into place; all or nothing."""
    temporary = path.with_name(f".{path.name}.{_writer()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(path)
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # a read-only place: the error above already says so


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; raises InputError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the stage before this one writes it: run `dvc repro`") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); delete it and run `dvc repro`") from error


def write_table(path: Path, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
    """Write Parquet (zstd) with `metadata` and the digest of the content in the schema, atomically."""
    table = table.replace_schema_metadata({**(metadata or {}), DIGEST: _digest(table)})
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_table(path: Path, schema: pa.Schema) -> tuple[pa.Table, dict[str, str]]:
    """Read Parquet and its metadata.

    Parquet alone does not show damage: of all changes of a byte in a small table 3 % gave other values, and with its
    own checksums of pages, which leave out their headers and the footer, still some.

    Raises:
        InputError: missing, truncated, damaged or not Parquet, or other columns than `schema`.
    """
    try:
        table = pq.read_table(path)
        table.validate(full=True)
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the stage before this one writes it: run `dvc repro`") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is truncated, damaged or not Parquet ({error}); nothing in it can be used: delete it and run "
            "`dvc repro`"
        ) from error
    if _columns(table.schema) != _columns(schema):
        raise InputError(f"{path} has columns {_columns(table.schema)}; expected {_columns(schema)}")
    empty = [field.name for field in schema if not field.nullable and table.column(field.name).null_count]
    if empty:
        raise InputError(f"{path} has no value in some rows of {', '.join(empty)}; every row needs one")
    table = table.cast(schema).replace_schema_metadata(None)
    if metadata.pop(DIGEST, None) not in (None, _digest(table)):  # None: others wrote it
        raise InputError(f"{path} is damaged: its content is not what was written; delete it and run `dvc repro`")
    return table, metadata


def _digest(table: pa.Table) -> str:
    """SHA-256 of the values, which does not depend on the version of Arrow that wrote them."""
    return hashlib.sha256(json.dumps(table.to_pydict(), default=str).encode()).hexdigest()


def _columns(schema: pa.Schema) -> str:
    """Names and types; of lists not what Parquet calls their elements."""
    types = {f.name: f"list of {f.type.value_type}" if pa.types.is_list(f.type) else f.type for f in schema}
    return ", ".join(f"{name}: {kind}" for name, kind in types.items())


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be trusted to `<name>.bad[.n]` beside it, so that nobody reads or loses it."""
    target = path.with_name(path.name + ".bad")
    count = 1
    while target.exists():
        target = path.with_name(f"{path.name}.bad.{count}")
        count += 1
    path.rename(target)
    return target


def replace_directory(path: Path, build: Callable[[Path], object]) -> None:
    """Let `build` fill a temporary directory, then put it in the place of `path`; on failure `path` is unchanged."""
    temporary = path.with_name(f".{path.name}.{_writer()}.tmp")
    replaced = path.with_name(f".{path.name}-replaced.{_writer()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(path)
        temporary.mkdir()
        build(temporary)
        while temporary.exists():
            with suppress(FileNotFoundError):
                os.replace(path, replaced)
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # XFS says the latter
                    raise
                # another process has put its own there in between, and the last one stays
                shutil.rmtree(replaced, ignore_errors=True)
    except SafetensorError as error:  # safetensors reports a failed write by this, with the cause as text
        if "os error" not in str(error):
            raise
        full = "os error 28" in str(error)
        raise storage_error(path, OSError(errno.ENOSPC if full else 0, str(error))) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise storage_error(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _writer() -> str:
    return f"{HOST}-{os.getpid()}"


def let_others_read(directory: Path) -> None:
    """Give weights just written into a directory its own access; safetensors keeps them to their owner."""
    for path in directory.glob("*.safetensors"):
        path.chmod(directory.stat().st_mode & 0o666)


def is_orphan(path: Path) -> bool:
    """Whether this is a temporary file or directory of above that a killed process of this machine left."""
    name = TEMPORARY.fullmatch(path.name)
    return name is not None and name[1] == HOST and (int(name[2]) == os.getpid() or not _runs(int(name[2])))


def _remove_orphans(path: Path) -> None:
    """Remove what killed writers of `path` left beside it."""
    for orphan in [*path.parent.glob(f".{path.name}.*.tmp"), *path.parent.glob(f".{path.name}-replaced.*.tmp")]:
        if not is_orphan(orphan):
            continue
        if orphan.is_dir():
            shutil.rmtree(orphan, ignore_errors=True)
        else:
            orphan.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's, or not a process id
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file systems differ."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
