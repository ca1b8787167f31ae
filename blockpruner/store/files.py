"""Files that hold results: each is whole or absent.

Decides how a file gets onto disk (temporary name, fsync, `os.replace`) and what a reader accepts.
What the content means is decided by the modules that write it.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pydantic import BaseModel
from safetensors import SafetensorError

from blockpruner.core.errors import InputError, StorageError
from blockpruner.core.settings import read_settings

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)
"""The name of a temporary file or folder."""

DIGEST = "sha256"
"""The key of a table's metadata, and of a sealed JSON object, that holds the digest of the
content."""

DENIED = "permission denied; give this user the right to it or choose another place"
UNLOCKED = "no file can be locked there; choose a place on another file system"
CAUSES = {
    errno.ENOSPC: "no space left on the device; free some and run again",
    errno.EDQUOT: "the disk quota is used up; free some and run again",
    errno.EFBIG: (
        "no file there may be so large; raise the limit (`ulimit -f`) or choose another place"
    ),
    errno.EROFS: (
        "the file system is mounted read-only; remount it writable or choose another place"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM), DENIED),
    **dict.fromkeys((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP), UNLOCKED),
}
"""What a user can do about an error of the file system."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errors of a place without room."""

NO_MEMORY = re.compile("out of memory|can.?t allocate memory|cannot allocate memory", re.IGNORECASE)
"""The messages of torch and of the system when memory is used up."""

SAFETENSORS = re.compile(r"os error (\d+)|Os \{ code: (\d+)")
"""The messages of safetensors about a failed write: of today, and of 0.5."""

TORCH = ("inline_container", "iostream error")
"""Parts of torch's messages about a failed write."""


def storage_error(path: Path, error: OSError) -> StorageError:
    cause = CAUSES.get(error.errno or 0, str(error))
    return StorageError(
        f"cannot write {path}: {cause}. Everything finished before this is kept and will be reused."
    )


def explained(error: Exception, logs: Path) -> InputError:
    """The error that a user sees in place of any error: of a place that cannot be used, of memory
    that is used up, of a package that is not installed. The traceback of an unforeseen error is
    written to a file in the folder `logs`, or among the temporary files."""
    message = " ".join(str(error).split())
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError) and error.errno in CAUSES:
        return StorageError(
            f"cannot use {error.filename or 'a file'}: {CAUSES[error.errno]}; what is finished is"
            " kept"
        )
    if isinstance(error, MemoryError) or NO_MEMORY.search(message):
        return InputError(
            f"the memory is used up ({message or 'MemoryError'}); choose a smaller model or shorter"
            " rows, end other programs, or use a machine with more",
            rule="no-memory",
        )
    if isinstance(error, EOFError):
        return InputError("a file is cut short", rule="damaged-file")
    if isinstance(error, ModuleNotFoundError):
        return InputError(
            f"this needs the package {error.name}, which is not installed: pip install {error.name}"
        )
    # transformers and lm-eval write themselves how to install what they lack.
    if isinstance(error, ImportError) and "pip install" in message:
        return InputError(message)
    log = _write_traceback(error, logs)
    return InputError(
        f"{type(error).__name__}: {message}; the traceback is in {log}; please report both",
        rule="unforeseen",
    )


def _write_traceback(error: Exception, logs: Path) -> str:
    """Write a traceback to a new file; returns its path."""
    text = "".join(traceback.format_exception(error))
    for folder in (logs, tempfile.gettempdir()):
        with suppress(OSError):
            log = tempfile.mkstemp(".log", "error-", folder)[1]
            Path(log).write_text(text, errors="replace")
            return log
    return "no file, since none can be written"


@contextmanager
def writing(path: Path, *, alone: bool = False) -> Iterator[None]:
    """Raise StorageError if a file or folder cannot be written within, also by safetensors and
    torch, which have errors of their own. With `alone`, nothing else is done within, and every
    OSError is of this path."""
    try:
        yield
    except OSError as error:
        if alone or error.errno in CAUSES:
            raise storage_error(path, error) from error
        raise
    except (SafetensorError, RuntimeError) as error:
        message = str(error)
        # torch reports no error number. A full disk is the usual cause.
        code = errno.ENOSPC
        if match := SAFETENSORS.search(message):
            code = int(match[1] or match[2])
        elif not any(phrase in message for phrase in TORCH):
            raise
        raise storage_error(path, OSError(code, message)) from error


def temporary_beside(path: Path) -> Path:
    """A name for a temporary file or folder in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, then move the result into place: all
    or nothing. On return content and name are on disk, and no cut of power takes them back."""
    temporary = temporary_beside(path)
    try:
        with writing(path, alone=True):
            make_folder(path.parent)
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        # On a read-only file system this fails, too. The error above names that.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder with its parents, and flush the new names to disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object with the digest of its content, which `read_json` checks."""
    content = json.loads(json.dumps(value))
    write_json(path, {**content, DIGEST: _json_digest(content)})


def read_json(path: Path, sealed: bool = False) -> Any:
    """Read a JSON object. Its digest, which a `sealed` one must have, is checked and taken out.
    Raises InputError if the file is missing, no JSON object, or not what was written."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"is no JSON object, but a {type(value).__name__}")
    digest = value.pop(DIGEST, None)
    if (sealed or digest is not None) and digest != _json_digest(value):
        raise damaged(path)
    return value


def read_checked(path: Path, schema: type[BaseModel], sealed: bool = False) -> dict[str, Any]:
    """Read a JSON object that a stranger may have written; raises InputError as `read_json` does,
    and if it does not fit the schema."""
    value: dict[str, Any] = read_json(path, sealed)
    read_settings(schema, value, f"{path}: ")
    return value


def read_kept_json(path: Path, note: Callable[[str], object]) -> Any:
    """The content of a sealed file; None if there is no file, or a damaged one. A damaged file is
    set aside, and `note` gets a line."""
    if not path.exists():
        return None
    try:
        return read_json(path, sealed=True)
    except InputError as error:
        note(f"warning: {error}; set aside as {set_aside(path).name}")
        return None


def _json_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _missing(path: Path) -> InputError:
    return InputError(f"{path} does not exist", rule="missing-file", value=str(path))


def damaged(
    path: Path, problem: str = "is damaged: its content is not what was written"
) -> InputError:
    """The error of a file that cannot be used. The caller adds how the file is made again."""
    return InputError(f"{path} {problem}", rule="damaged-file", value=str(path))


def write_table(path: Path, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
    """Write Parquet (zstd) with `metadata` and the digest of the content in the schema,
    atomically."""
    table = table.replace_schema_metadata({**(metadata or {}), DIGEST: table_digest(table)})
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_table(path: Path, schema: pa.Schema) -> tuple[pa.Table, dict[str, str]]:
    """Read Parquet and its metadata; raises InputError if it is missing, truncated, damaged or not
    Parquet, or has other columns than `schema`. The digest is ours because Parquet does not show
    all damage: of all changes of one byte in a small table 3 % gave other values. Its own checksums
    of pages leave out the pages' headers and the footer, and some were still missed."""
    try:
        table = pq.read_table(path)
        table.validate(full=True)
        entries = table.schema.metadata or {}
        metadata = {key.decode(): value.decode() for key, value in entries.items()}
        columns = _columns(table.schema)
    except FileNotFoundError:
        raise _missing(path) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(
            path, f"is truncated, damaged or not Parquet ({error}); nothing in it can be used"
        ) from error
    if columns != _columns(schema):
        raise InputError(f"{path} has columns {columns}; expected {_columns(schema)}")
    required = [field.name for field in schema if not field.nullable]
    incomplete = [name for name in required if table.column(name).null_count]
    if incomplete:
        raise InputError(
            f"{path} has no value in some rows of {', '.join(incomplete)}; every row needs one"
        )
    table = table.cast(schema).replace_schema_metadata(None)
    if metadata.pop(DIGEST, None) != table_digest(table):
        raise damaged(path)
    return table, metadata


def table_digest(table: pa.Table) -> str:
    """SHA-256 of the values; it does not depend on the version of Arrow that wrote them."""
    return hashlib.sha256(json.dumps(table.to_pydict(), default=str).encode()).hexdigest()


def _columns(schema: pa.Schema) -> str:
    """Names and types of the columns."""
    columns = []
    for field in schema:
        # Versions of Parquet give another name to the elements of a list.
        is_list = pa.types.is_list(field.type)
        kind = f"list of {field.type.value_type}" if is_list else field.type
        columns.append(f"{field.name}: {kind}")
    return ", ".join(columns)


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be trusted to `<name>.bad[.n]` in its folder: nobody reads it, and
    nobody loses it."""
    target = path.with_name(f"{path.name}.bad")
    count = 0
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}.bad.{count}")
    return path.rename(target)


def require_free(path: Path) -> None:
    """Raise InputError for the path of a new folder, unless nothing or an empty folder is there."""
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if os.path.lexists(path) and not is_empty_folder:
        message = f"{path} is not empty; choose another folder, or remove it"
        raise InputError(message, rule="place-not-empty", value=str(path))
    if path.is_mount():
        raise InputError(
            f"{path} is a mount point; choose a folder in it", rule="mount-point", value=str(path)
        )


def new_directory(path: Path, build: Callable[[Path], object]) -> None:
    """Let `build` fill a temporary directory, then rename it to `path`. A failure leaves nothing
    new, and on return all of it is on disk. What `build` writes next to the directory is removed.
    Raises InputError if something is at `path`, or has come while `build` ran; it stays as it
    is."""
    require_free(path)
    path = path.resolve()
    with _workshop(path) as workshop, _built(path, build, workshop / "new") as temporary:
        try:
            temporary.rename(path)
        except OSError:
            require_free(path)
            raise


def clear_left(path: Path) -> None:
    """Remove the temporary folder of a killed `new_directory`; that of a living process stays."""
    with suppress(InputError), _workshop(path.resolve()):
        pass


@contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path` that only this process uses, empty at first. Raises
    InputError if a living process has it."""
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    folder = path.with_name(f".{path.name}.{key}.tmp")
    file = folder.with_suffix(".lock")
    lock = FileLock(file, fallback_to_soft=False)
    try:
        with writing(path, alone=True):
            make_folder(path.parent)
        lock.acquire(blocking=False)
    except Timeout:
        message = f"another process is writing {path}; wait for it, or choose another folder"
        raise InputError(message, rule="place-not-empty", value=str(path)) from None
    except OSError:
        # On a file system without locks, a folder under the fixed name may be in use.
        folder = temporary_beside(path)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        with writing(path, alone=True):
            folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock.is_locked:
            # A process that has opened the file meanwhile sees that it has no name, and makes one.
            file.unlink()
            lock.release()


def replace_directory(path: Path, build: Callable[[Path], object]) -> None:
    """Let `build` fill a temporary directory that then replaces `path`. A failure leaves `path`
    unchanged, and on return all of it is on disk. A kill between the two renames leaves neither the
    old directory nor the new one."""
    replaced = temporary_beside(path)
    try:
        with _built(path, build, temporary_beside(path)) as temporary:
            with suppress(FileNotFoundError):
                os.replace(path, replaced)
            try:
                os.replace(temporary, path)
            except OSError as error:
                # Another process may have put its result there: the first one stays.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _built(path: Path, build: Callable[[Path], object], temporary: Path) -> Iterator[Path]:
    """A temporary directory that `build` has filled, on disk; removed at the end unless it was
    renamed."""
    try:
        with writing(path):
            with writing(path, alone=True):
                make_folder(path.parent)
                temporary.mkdir()
            build(temporary)
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in [*names, "."]:
                    sync(Path(folder, name))
            yield temporary
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def let_others_read(directory: Path) -> None:
    """Give weights just written the access of their directory; safetensors makes them readable to
    the owner only."""
    for path in directory.glob("*.safetensors"):
        path.chmod(directory.stat().st_mode & 0o666)


def remove_temporaries(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Remove the temporary files of killed writers from a folder. No other process may be writing
    files of the pattern there."""
    for path in list(folder.glob(pattern)):
        if not TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a link out of a model's folder, whose content would be copied and published. The hub's
    own cache is excepted: its folder `snapshots` links to its folder `blobs`."""
    home = folder.resolve()
    target = path.resolve()
    is_hub_blob = target.parent == home.parent.parent / "blobs"
    if not is_hub_blob and not target.is_relative_to(home):
        message = (
            f"{path} is a link out of its folder, to {target}; put the file itself there, or remove"
            " the link"
        )
        raise InputError(message, rule="link-outside", value=str(path))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file systems differ."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
