"""Our own texts: short pieces of many packages and texts, and how they mix with texts of one's
own."""

import json
import re
import zipfile
from hashlib import sha256
from importlib.resources import files
from random import Random

import pytest
from pydantic import TypeAdapter

from benchmarks.kinds import LIBRARIES
from blockpruner.core.errors import InputError
from blockpruner.core.settings import PackagesTexts, Texts, read_settings
from blockpruner.inputs import pieces
from blockpruner.inputs.sources import shipped_texts
from blockpruner.inputs.texts import by_kind, judging_texts, kind_of, load_texts
from blockpruner.methods.recipes import sections
from tests.errors import refused

LINES = "\n".join(f"line {number} of many" for number in range(400))


def read(data, place, template=str):
    return load_texts(
        TypeAdapter(Texts).validate_python(data), place / "cache", place / "pins.json", template
    )


def test_a_piece_is_whole_lines_from_anywhere_and_always_the_same():
    result = [pieces.piece(LINES, 300, Random(seed)) for seed in range(200)]
    assert result == [pieces.piece(LINES, 300, Random(seed)) for seed in range(200)]
    lines = set(LINES.splitlines())
    assert all(150 < len(item) <= 300 and set(item.splitlines()) <= lines for item in result)
    starts = [int(re.match(r"line (\d+)", item)[1]) for item in result]
    assert min(starts) < 20 and max(starts) > 350, "from the whole text"
    assert pieces.piece("  short\n", 300, Random(0)) == "short"
    assert len(pieces.piece("x" * 5000, 300, Random(0))) == 300, "a line without an end"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three packages: with three modules, with a short one alone, and with none."""
    described = "Metadata-Version: 2.1\nName: p\n\n" + "The words of the README.\n" * 40
    contents = (
        {
            "p/a.py": "a\n" * 900,
            "p/b.py": "b\n" * 900,
            "p/c.py": "c\n" * 900,
            "p.dist-info/METADATA": described,
        },
        {"q/a.py": "x = 1\n", "q.dist-info/METADATA": "Name: q\n\nshort"},
        {"r/data.txt": LINES},
    )
    archives = []
    for number, content in enumerate(contents):
        archives.append(tmp_path / f"p{number}-1.0-py3-none-any.whl")
        with zipfile.ZipFile(archives[-1], "w") as file:
            for name, text in content.items():
                file.writestr(name, text)
    monkeypatch.setattr(
        pieces, "listed_packages", lambda data: [(str(n), "") for n in range(len(archives))]
    )
    monkeypatch.setattr(
        pieces, "package_file", lambda package, digest, cache: archives[int(package)]
    )


def source(**more):
    given = {"packages": 3, "sha256": "0" * 64, "file": "*.py", "length": 500}
    return PackagesTexts(source="packages", **given | more)


@pytest.mark.usefixtures("packages")
def test_each_package_gives_a_few_pieces_of_different_files(tmp_path):
    result = pieces.pieces_of_packages(source(pieces=2), tmp_path)
    assert len(result) == 2
    assert len({text[0] for text in result}) == 2
    assert all(len(text) <= 500 for text in result)
    assert len(pieces.pieces_of_packages(source(pieces=9), tmp_path)) == 3
    (readme,) = pieces.pieces_of_packages(source(file="*.dist-info/METADATA"), tmp_path)
    assert set(readme.splitlines()) == {"The words of the README."}, "without the fields above it"


def test_the_list_is_pinned_free_to_use_and_holds_no_library_that_measures():
    content = files("blockpruner.inputs").joinpath(pieces.LIST).read_bytes()
    lines = content.decode().splitlines()
    form = re.compile(r"([\w.-]+)==[\w.+!-]+ --hash=sha256:[0-9a-f]{64}  # (.*)")
    result = [form.fullmatch(line) for line in lines]
    assert all(result)
    assert len({item[1].lower() for item in result}) == len(lines) == 320
    assert all(
        re.search("MIT|BSD|Apache|ISC|PSF|Python Software|Zope|Academic", item[2])
        for item in result
    )
    measured = {name.partition("==")[0].lower() for name in LIBRARIES}
    assert not measured & {item[1].lower() for item in result}
    digest = sha256(content).hexdigest()
    assert len(pieces.listed_packages(source(packages=320, sha256=digest))) == 320
    with refused("package-digest"):
        pieces.listed_packages(source())
    with refused("too-many-packages"):
        pieces.listed_packages(source(packages=321, sha256=digest))


@pytest.mark.usefixtures("real_texts")
def test_our_kinds_are_half_beside_texts_of_ones_own():
    shares = {}
    for item in shipped_texts().of:
        shares.setdefault(item.kind, item.share)
    assert len(shares) == 8
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("recommended", {}, {"mine": 0.5, "ours": 0.5}),
        ("narrow", {}, {"mine": 0.5, "ours": 0.5}),
        ("recommended", {"only_texts": True}, {"mine": 1.0}),
        ("blockpruner", {}, {"mine": 1.0}),
    ],
)
def test_texts_of_ones_own_are_half_unless_they_are_wanted_alone(tmp_path, method, given, expected):
    from blockpruner.inputs.sources import named_sources, with_sources

    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(9)))
    data = {"source": "path", "path": str(path)}
    result = sections(method, data=data, calibration={}, score={}, **given)["calibration"]["data"]
    texts = read(with_sources(result, named_sources()), tmp_path)
    parts = {"mine": 0.0, "ours": 0.0}
    for kind in by_kind(texts):
        parts["mine" if kind.name == "mine.jsonl" else "ours"] += kind.share
    assert {
        name: share / sum(parts.values()) for name, share in parts.items() if share
    } == pytest.approx(expected)


def test_kinds_of_ones_own_file_share_its_half(tmp_path):
    records = [
        {"text": "x" * n, "kind": "ab"[n % 2], "share": 1 + 2 * (n % 2)} for n in range(1, 9)
    ]
    path, other = tmp_path / "own.json", tmp_path / "other.txt"
    path.write_text(json.dumps(records))
    other.write_text("other")
    of = [{"source": "path", "path": str(item)} for item in (path, other)]
    shares = {
        kind.name: kind.share for kind in by_kind(read({"source": "mix", "of": of}, tmp_path))
    }
    assert shares == pytest.approx({"a": 0.25, "b": 0.75, "other.txt": 1.0})
    assert {kind_of(text).name for text in read(of[1], tmp_path)} == {"other.txt"}


def test_conversations_of_ours_need_no_template(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(
        json.dumps(
            [{"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Ho"}]}]
        )
    )

    def none(messages):
        raise InputError("no template")

    data = {"source": "path", "path": str(path), "format": "chat"}
    assert read(data, tmp_path, none) == ["user: Hi\n\nbot: Ho"]
    assert read(data, tmp_path, lambda messages: "by template") == ["by template"]
    with pytest.raises(InputError):
        read(data | {"format": "text"}, tmp_path, none)


def test_the_librarys_modules_judge():
    result = judging_texts(["ours"])
    library = [text for text in result if kind_of(text)]
    assert len(library) > 50
    assert {kind_of(text).name for text in library} == {"Python's library"}
    assert all(len(text) <= pieces.LENGTH for text in library)
    assert read_settings(PackagesTexts, source().model_dump()).title == "3 packages"
