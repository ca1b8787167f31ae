"""Files inside packages of a Python package registry. A pinned SHA-256 makes a package file trusted.

A package is read as an archive, and no code of it runs: it is neither installed nor built. pip fetches wheels. To fetch
an sdist, pip would build its metadata with a backend that nobody has pinned, so we read pip's index ourselves. A
downloaded file is kept in the cache folder, under its SHA-256.
"""

from __future__ import annotations

import lzma
import re
import shutil
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from ast import literal_eval
from base64 import b64encode
from contextlib import AbstractContextManager
from html import unescape
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import Request, urlopen

from blockpruner.core.errors import InputError
from blockpruner.store.files import replace_directory
from blockpruner.store.provenance import file_sha256

PYPI = "https://pypi.org/simple"

MEMBER_LIMIT = 4 * 2**30
"""Largest archive member that is read, bytes."""

ARCHIVE_LIMIT = 64 * 2**30
"""How far into an unpacked sdist a member may begin, bytes."""

ARCHIVE_ERRORS = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, struct.error,
    NotImplementedError, RuntimeError, OverflowError, UnicodeDecodeError,
)  # fmt: skip
"""What zipfile, tarfile and the decompressors raise for damaged, encrypted or unknown content."""


def package_file(package: str, sha256: str, cache: Path) -> Path:
    """Download one file of `package` ("name==version"), the one with this SHA-256, into the cache.

    Raises:
        InputError: there is no such package, or none of its files has this digest; nothing is left behind.
    """
    kept = cache / "packages" / sha256
    found = list(kept.glob("*")) if kept.exists() else []
    if found and file_sha256(found[0]) == sha256:
        return found[0]

    def download(directory: Path) -> None:
        requirements = directory / "requirements.txt"
        requirements.write_text(f"{package} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
        command += ["--dest", str(directory), "--requirement", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        requirements.unlink()
        if result.returncode != 0 and not _download_listed(package, sha256, directory):
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


def _download_listed(package: str, sha256: str, directory: Path) -> bool:
    """Download the file with this SHA-256 from the page of `package` in pip's index (PEP 503); False if none has it."""
    options = _pip_options()
    if options.get("no-index", "0") not in ("0", "false"):
        return False
    name = re.sub(r"[-_.]+", "-", package.partition("==")[0]).lower()
    context = ssl.create_default_context(cafile=options.get("cert"))
    for index in (options.get("index-url", PYPI), *options.get("extra-index-url", "").split()):
        page = f"{index.rstrip('/')}/{name}/"
        try:
            with _opened(page, context) as answer:
                found = re.search(rf"""href=["']([^"'#]+)#sha256={sha256}""", answer.read().decode())
            if found is None:
                continue
            url = urljoin(page, unescape(found[1]))
            with _opened(url, context) as answer, open(directory / Path(urlsplit(url).path).name, "wb") as file:
                shutil.copyfileobj(answer, file)
            return True
        except (OSError, HTTPException, ValueError):  # pip's own error tells more
            continue
    return False


def _pip_options() -> dict[str, str]:
    """pip's options of files and of the environment, the latter first."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    found = re.findall(r"^(:env:|download|global)\.([\w-]+)=(.*)$", "\n".join(lines), re.MULTILINE)
    return {
        key: str(literal_eval(value))
        for part in ("global", "download", ":env:")
        for own, key, value in found
        if own == part
    }


def _opened(url: str, context: ssl.SSLContext) -> AbstractContextManager[IO[bytes]]:
    """Open a URL, which may hold a user's name and password."""
    parts = urlsplit(url)
    account, _, host = parts.netloc.rpartition("@")
    request = Request(parts._replace(netloc=host).geturl())
    if account:
        request.add_unredirected_header("Authorization", f"Basic {b64encode(unquote(account).encode()).decode()}")
    opened: AbstractContextManager[IO[bytes]] = urlopen(request, context=context, timeout=60)
    return opened


def read_member(archive: Path, member: str) -> bytes:
    """Read one regular file of a wheel or sdist into memory. Nothing is unpacked onto disk, and no link is followed.

    `package_file` has checked the archive's bytes; an sdist has no checksums of its members.

    Raises:
        InputError: there is no such file (the message names similar ones), it is too large, or the archive is damaged.
    """
    read = _read_wheel if archive.suffix in (".whl", ".zip") else _read_sdist
    try:
        return read(archive, member)
    except ARCHIVE_ERRORS as error:
        raise InputError(
            f"{archive.name} is damaged, or no archive that can be read ({type(error).__name__}: {error}); delete "
            f"{archive.parent} and run again, or name another file of the package by its sha256"
        ) from error


def _read_wheel(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as wheel:
        found = {info.filename: info for info in wheel.infolist()}
        info = found.get(member)
        if info is None or info.is_dir() or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _no_member(archive, member, list(found))
        _check_size(archive, member, info.file_size)
        return wheel.read(info)  # reads at most file_size, whatever the compressed bytes hold


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
