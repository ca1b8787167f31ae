"""Every source, and every way it can fail; packages are made here and found without a network."""

import errno
import gzip
import hashlib
import io
import json
import os
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from blockpruner.core.errors import InputError, StorageError
from blockpruner.core.settings import HubModel, LocalModel, MixedTexts, PypiPartsModel, PypiTexts
from blockpruner.inputs import packages
from blockpruner.inputs.checkpoints import (
    cached_checkpoint,
    checkpoint_identity,
    copy_files,
    fetch_checkpoint,
    licence_of,
    require_unchanged,
)
from blockpruner.inputs.hub import pinned_revision
from blockpruner.inputs.packages import package_file, read_member
from blockpruner.inputs.texts import (
    TextKind,
    kind_of,
    listed,
    load_texts,
    parse_texts,
    read_texts,
    write_texts,
)
from blockpruner.model.models import load_model
from blockpruner.reporting.labels import origin
from blockpruner.store import manifest as store_manifest
from blockpruner.store.manifest import SOURCE_FILE
from blockpruner.store.provenance import file_sha256
from tests.errors import refused
from tests.fakes import SHA, Hub
from tests.plans import fetch
from tests.tiny import save_tiny, tiny_model


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel `tinydata` that pip finds in a local folder; returns (requirement, sha256)."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinydata/texts.json", json.dumps([{"text": "one"}, {"text": "two"}]))
        archive.writestr(
            "tinydata-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n",
        )
        archive.writestr("tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return "tinydata==1.0", hashlib.sha256(path.read_bytes()).hexdigest()


def test_package_file_is_verified_cached_and_read(tmp_path, wheel, monkeypatch):
    package, digest = wheel
    data = PypiTexts(
        source="pypi", package=package, sha256=digest, file="tinydata/texts.json", format="text"
    )
    assert load_texts(data, tmp_path / "cache", tmp_path / "pins.json", str) == ["one", "two"]
    # it is downloaded again
    package_file(package, digest, tmp_path / "cache").write_bytes(b"damaged")
    assert (
        hashlib.sha256(package_file(package, digest, tmp_path / "cache").read_bytes()).hexdigest()
        == digest
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert load_texts(data, tmp_path / "cache", tmp_path / "pins.json", str) == ["one", "two"]


def sdist(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for member, text in files.items():
            info = tarfile.TarInfo(f"tiny.data-1.0/{member}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_sdist_is_fetched_and_not_built(tmp_path, monkeypatch):
    """pip would run its build backend, to ask it for metadata."""
    name, spy, pages = "tiny.data-1.0.tar.gz", tmp_path / "built", {}
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {
        "pyproject.toml": backend,
        "backend.py": f"open({str(spy)!r}, 'w')\n",
        "texts.json": "[]",
    }
    digest = sdist(tmp_path / name, files)
    pages["https://index.invalid/simple/tiny-data/"] = (
        f'<a href="../{name}#sha256={digest}">{name}</a>'.encode()
    )
    pages[f"https://index.invalid/simple/{name}"] = (tmp_path / name).read_bytes()
    monkeypatch.setattr(packages, "urlopen", lambda url, timeout: io.BytesIO(pages[url]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/simple/")
    result = package_file("Tiny_Data==1.0", digest, tmp_path / "cache")
    assert result.name == name
    assert read_member(result, "tiny.data-1.0/texts.json") == b"[]"
    with refused("package-missing"):
        package_file("Tiny_Data==1.0", "0" * 64, tmp_path / "cache")
    pages[f"https://index.invalid/simple/{name}"] += b"more"
    with refused("package-digest"):
        package_file("Tiny_Data==1.0", digest, tmp_path / "other")
    assert not spy.exists()
    assert not [*(tmp_path / "other").rglob(name)]


def test_package_errors_leave_nothing(tmp_path, wheel):
    package, digest = wheel
    with refused("package-digest"):
        package_file(package, "0" * 64, tmp_path / "cache")
    texts = PypiTexts(
        source="pypi", package="tinydata==9.9", sha256=digest, file="texts.json", format="text"
    )
    with refused("package-missing") as error:
        load_texts(texts, tmp_path / "cache", tmp_path, str)
    assert "give yours alone (--texts FILE --only-texts" in str(error.value)
    assert list((tmp_path / "cache/packages").iterdir()) == []
    result = package_file(*wheel, tmp_path / "cache")
    with refused("package-member") as error:
        read_member(result, "data/texts.json")
    assert "tinydata/texts.json" in str(error.value)


def fetch_hub(root, out="out", **model):
    fetch_checkpoint(
        HubModel(source="hub", repo="a/b", **model), root / out, root / "cache", root / "pins.json"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "access is gated: accept its terms"),
        (RepositoryNotFoundError, "no such repository, or it is private"),
    ],
)
def test_hub_errors_are_one_clear_line_and_leave_nothing(tmp_path, monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error(
            "no", response=httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(InputError, match=rf"hub repository 'a/b' cannot be used: {words}"):
        fetch_hub(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["main", "0123456"])
def test_a_name_that_may_move_is_a_commit_from_its_first_fetch_on(tmp_path, monkeypatch, name):
    """The source file, and the key in the cache, hold the commit."""
    hub = Hub(save_tiny(tmp_path / "hub"), monkeypatch)
    for out, revision in {"one": name, "two": name, "three": SHA}.items():
        fetch_hub(tmp_path, out, revision=revision)
        assert (
            json.loads((tmp_path / out / "blockpruner_source.json").read_text())["source"][
                "revision"
            ]
            == SHA
        )
    assert hub.asked == [("a/b", name)]
    assert json.loads((tmp_path / "pins.json").read_text()) == {f"model:a/b@{name}": SHA}
    assert len(list((tmp_path / "cache/models").iterdir())) == 1


def test_a_full_disk_in_a_download_is_no_fault_of_the_network(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/of/the/hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StorageError, match="cannot write /cache/of/the/hub: no space left"):
        fetch_hub(tmp_path, revision=SHA)


def test_a_broken_download_goes_on(tmp_path, monkeypatch):
    hub = Hub(save_tiny(tmp_path / "hub"), monkeypatch)
    hub.breaks_after = 2
    with pytest.raises(InputError, match="hub repository 'a/b' cannot be used: the line is cut"):
        fetch_hub(tmp_path)
    assert not (tmp_path / "out").exists()
    fetch_hub(tmp_path)
    assert sorted(hub.downloaded) == sorted(set(hub.downloaded))
    assert "model.safetensors" in hub.downloaded
    load_model(tmp_path / "out", "float32", "cpu")


def test_two_fetches_at_once_lose_no_pin_and_agree_on_one(tmp_path, monkeypatch):
    """Each asks the hub, which has moved on, while the other has not yet written what it was
    told."""
    pins, meet, commits = (
        tmp_path / "pins.json",
        Barrier(4, timeout=60),
        iter(f"{n:040x}" for n in range(9)),
    )

    def info(api, repo, revision):
        meet.wait()
        return type("Info", (), {"sha": next(commits)})()

    for name in ("model_info", "dataset_info"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, info)
    asked = [
        ("a/b", "model", None),
        ("a/b", "model", None),
        ("a/b", "model", "v1"),
        ("a/b", "dataset", None),
    ]
    with ThreadPoolExecutor(4) as pool:
        result = list(pool.map(lambda item: pinned_revision(*item, pins), asked))
    assert result[0] == result[1]
    assert len(set(result)) == 3
    assert json.loads(pins.read_text()) == {
        "dataset:a/b": result[3],
        "model:a/b": result[0],
        "model:a/b@v1": result[2],
    }


@pytest.mark.parametrize("content", [b'{"model:a/b": "01234', b'{"model:a/b": "main"}'])
def test_damaged_pins_are_brought_back_and_not_deleted(tmp_path, content):
    """Without them, every model would move to its newest commit."""
    (tmp_path / "pins.json").write_bytes(content)
    with pytest.raises(
        InputError, match=r"pins\.json is damaged, .*`git checkout .*pins\.json`"
    ) as error:
        fetch_hub(tmp_path)
    assert "\n" not in str(error.value)
    assert "delete" not in str(error.value)
    assert (tmp_path / "pins.json").read_bytes() == content


def test_a_model_file_in_parts_is_joined_in_their_order(tmp_path, wheel, monkeypatch):
    package, digest = wheel
    files = ["tinydata-1.0.dist-info/WHEEL", "tinydata/texts.json"]
    parts = [{"package": package, "sha256": digest, "file": file} for file in files]
    model, joined = PypiPartsModel.model_validate({"source": "pypi-parts", "parts": parts}), []

    def convert(content, dtype, directory):
        joined.append(content)
        save_tiny(directory)
        return {}

    monkeypatch.setattr("blockpruner.inputs.checkpoints._convert_gguf", convert)
    fetch_checkpoint(model, tmp_path / "model", tmp_path / "cache", tmp_path / "pins.json")
    expected = b'Wheel-Version: 1.0\nTag: py3-none-any\n[{"text": "one"}, {"text": "two"}]'
    assert joined == [expected]
    # another file, so not the cached one
    other = model.model_copy(update={"parts": model.parts[::-1]})
    fetch_checkpoint(other, tmp_path / "other", tmp_path / "cache", tmp_path / "pins.json")
    fetch_checkpoint(model, tmp_path / "again", tmp_path / "cache", tmp_path / "pins.json")
    assert len(joined) == 2
    assert joined[1].endswith(b"py3-none-any\n")
    assert json.loads((tmp_path / "model" / SOURCE_FILE).read_text())["source"]["parts"] == parts
    assert origin(model) == f"{files[0]} (2 parts) of {package}"


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_identity_is_of_what_configs_say(tmp_path):
    folder = save_tiny(tmp_path / "mine")
    first = checkpoint_identity(fetch(folder, tmp_path / "one"))
    change_json(folder / "config.json", transformers_version="4.0.0")
    assert checkpoint_identity(fetch(folder, tmp_path / "two")) == first
    change_json(folder / "config.json", rms_norm_eps=1e-4)
    assert checkpoint_identity(fetch(folder, tmp_path / "three")) != first


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md"])
def test_a_changed_file_of_a_local_model_is_fetched(tmp_path, name):
    folder, texts = save_tiny(tmp_path / "mine"), ["", "---\nlicense: mit\n---\n"]
    if name != "README.md":
        texts = ['{"eos_token_id": 2, "model": 1}', '{"eos_token_id": 3, "model": 1}']
    for text, out in zip(texts, ("one", "two"), strict=True):
        (folder / name).write_text(text)
        fetch(folder, tmp_path / out)
    if name != "README.md":
        assert (tmp_path / "two" / name).read_text() == texts[1]
    assert licence_of(tmp_path / "two") == ({"license": "mit"} if name == "README.md" else {})
    assert (tmp_path / "one" / SOURCE_FILE).read_text() != (
        tmp_path / "two" / SOURCE_FILE
    ).read_text()


@pytest.mark.parametrize("name", ["model.safetensors", SOURCE_FILE])
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_cached_file_heals(tmp_path, monkeypatch, name, gone):
    """It is damaged in place: the hub's cache, ours and the output are one file."""
    Hub(save_tiny(tmp_path / "hub"), monkeypatch)
    fetch_hub(tmp_path, revision=SHA)
    (kept,) = (tmp_path / "cache" / "models").iterdir()
    complete = (tmp_path / "out" / name).read_bytes()
    assert (kept / name).samefile(tmp_path / "out" / name)
    (kept / name).unlink() if gone else os.truncate(kept / name, len(complete) // 2)
    fetch_hub(tmp_path, revision=SHA)
    assert (tmp_path / "out" / name).read_bytes() == complete
    assert {path.name for path in kept.parent.iterdir()} == {kept.name, f"{kept.name}.bad"}


def test_weights_are_read_where_they_are_and_hashed_once_by_each_process(tmp_path, monkeypatch):
    """A second command finds the model whole, and leaves it alone; two at once make it once. What
    an earlier process read is not trusted: a disk may have lost it since."""
    folder, read = save_tiny(tmp_path / "mine"), []
    monkeypatch.setattr(store_manifest, "SETTLED", 0.01)
    monkeypatch.setattr(
        store_manifest, "file_sha256", lambda path: read.append(path.name) or file_sha256(path)
    )
    model = LocalModel(source="path", path=str(folder))

    def kept(_=None):
        return cached_checkpoint(model, tmp_path / "cache", tmp_path / "pins.json")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(kept, range(2))
    assert first == second
    assert (first / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (first / "config.json").samefile(folder / "config.json")
    inode = first.stat().st_ino
    time.sleep(0.05)  # past SETTLED
    require_unchanged(first)
    read.clear()
    assert kept() == first
    assert first.stat().st_ino == inode
    assert "model.safetensors" not in read
    store_manifest._KNOWN.clear()  # as in another process
    assert kept() == first
    assert "model.safetensors" in read
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with refused("model-changed"):
        require_unchanged(first)
    assert kept() != first


def other_weights(path):
    """Change a file in place, and give it its old time, as `cp -p`, `rsync -t --inplace` or a
    reproducible archive."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("another_process", [False, True])
def test_weights_that_change_under_an_unchanged_name_size_and_time_are_seen(
    tmp_path, monkeypatch, another_process
):
    monkeypatch.setattr(store_manifest, "SETTLED", 0.01)
    folder = save_tiny(tmp_path / "mine")
    model, cache, pins = (
        LocalModel(source="path", path=str(folder)),
        tmp_path / "cache",
        tmp_path / "pins.json",
    )
    first = cached_checkpoint(model, cache, pins)
    time.sleep(0.05)
    assert cached_checkpoint(model, cache, pins) == first
    other_weights(folder / "model.safetensors")
    if another_process:
        store_manifest._KNOWN.clear()
    with refused("model-changed"):
        require_unchanged(first)
    second = cached_checkpoint(model, cache, pins)
    fresh = cached_checkpoint(model, tmp_path / "fresh", pins)
    assert checkpoint_identity(second) == checkpoint_identity(fresh) != checkpoint_identity(first)


def test_only_files_of_a_checkpoint_are_copied(tmp_path):
    """Not a key, a log or an adapter's config, which transformers would follow to another model."""
    folder = save_tiny(tmp_path / "mine")
    names = {path.name for path in folder.iterdir()}
    (folder / "original").mkdir()
    for name in (
        "secrets.txt",
        "adapter_config.json",
        "consolidated.safetensors",
        "modeling.py",
        "original/x.json",
    ):
        (folder / name).write_text("{}")
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md"):
        (folder / name).write_text("terms")
        names.add(name)
    out = fetch(folder, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == names | {SOURCE_FILE}
    assert licence_of(out) == {"license": "other", "license_link": "LICENSE.txt"}
    # DVC protects its outputs: a hard link would turn the user's own files read-only
    assert not (out / "model.safetensors").samefile(folder / "model.safetensors")


def test_a_link_to_a_users_other_files_is_not_followed(tmp_path):
    """Clones and archives hold links; what they lead to would be copied beside the weights, and
    published."""
    folder = save_tiny(tmp_path / "mine")
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (folder / "LICENSE-key").symlink_to(tmp_path / "secret")
    with refused("link-outside") as caught:
        fetch(folder, tmp_path / "out")
    assert "LICENSE-key is a link out of its folder" in str(caught.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "copy").mkdir()
    with refused("link-outside"):
        copy_files(folder, tmp_path / "copy", ("LICENSE*",))
    assert not any((tmp_path / "copy").iterdir())
    (folder / "LICENSE-key").unlink()
    (folder / "terms").write_text("terms")
    (folder / "LICENSE").symlink_to("terms")
    (folder / "model.safetensors").rename(tmp_path / "big.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "big.safetensors")  # read as tensors alone
    assert (fetch(folder, tmp_path / "out") / "LICENSE").read_text() == "terms"


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path):
    folder = tmp_path / "models--me--mine/snapshots/1"
    save_tiny(folder)
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for path in [*folder.iterdir()]:
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert (fetch(folder, tmp_path / "out") / "config.json").is_file()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/id").write_text("PRIVATE KEY")
    (blobs / "more").symlink_to(tmp_path / "keys")
    (folder / "LICENSE").symlink_to("../../blobs/more/id")
    with refused("link-outside"):
        fetch(folder, tmp_path / "other")


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")


def weights_outside(folder):
    """The file is where the index points from the folder and from its place in the cache, two
    folders deeper."""
    weights = load_file(folder / "model.safetensors")
    for place in (folder.parent, folder.parent / "cache/models"):
        place.mkdir(parents=True, exist_ok=True)
        save_file(weights, place / "outside.safetensors", {"format": "pt"})
    names = dict.fromkeys(weights, "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            pickle_weights,
            (
                r"holds no safetensors file.*convert them first, or choose .*revision:"
                r" refs/pr/<number>"
            ),
        ),
        (
            lambda folder: change_json(folder / "config.json", model_type="mamba"),
            "'mamba' is unknown; valid: llama, .*gpt_neox",
        ),
        (lambda folder: (folder / "config.json").unlink(), "does not exist or has no config.json"),
        (
            weights_outside,
            (
                r"model.safetensors.index.json names '../outside.safetensors', which is no file of"
                r" the model's own"
            ),
        ),
    ],
    ids=["pickled weights", "unsupported family", "no config", "weights outside"],
)
def test_what_cannot_be_fetched(tmp_path, spoil, message):
    folder = save_tiny(tmp_path / "mine")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        fetch(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_match_the_config(tmp_path):
    folder = save_tiny(tmp_path / "mine")
    change_json(folder / "config.json", intermediate_size=40)
    with pytest.raises(InputError, match=r"weights in .* do not match its config\.json"):
        load_model(folder, "float32", "cpu")


@pytest.mark.parametrize("sign", ["\u2028", "\x85", "\x1c"])
def test_a_line_of_json_ends_where_its_bytes_do(sign):
    """Unicode has more ends of lines, and JSON allows them in strings."""
    line = json.dumps({"text": f"one{sign}two"}, ensure_ascii=False)
    content = f"{line}\r\n \t\n\n{line}  ".encode()
    assert parse_texts(content, "x.jsonl", "text", str) == [f"one{sign}two"] * 2


def test_texts(tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Ho"},
    ]
    first, second = parse_texts(json.dumps(records).encode(), "x.json", "alpaca", str)
    assert first.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3")
    assert second.endswith("### Instruction:\nHi\n\n### Response:\nHo")
    wiki = (
        b'<doc id="1" title="A">\nA\n\nBody\n\n</doc>\n<doc id="2" title="B">\nB\n\nMore\n</doc>\n'
    )
    assert parse_texts(wiki, "wiki.utf8", "wikipedia", str) == ["A\n\nBody", "B\n\nMore"]
    (tmp_path / "x.json").write_text(json.dumps(records))
    (tmp_path / "y.txt").write_text("Yes.")
    names = {"x.json": "alpaca", "y.txt": "text"}
    parts = [
        {"source": "path", "path": str(tmp_path / name), "format": form}
        for name, form in names.items()
    ]
    mix = MixedTexts.model_validate({"source": "mix", "of": parts})
    mixed = load_texts(mix, tmp_path, tmp_path, str)
    assert mixed == [first, second, "Yes."]
    assert [text.kind.name for text in mixed] == [
        "x.json",
        "x.json",
        "y.txt",
    ]
    write_texts(tmp_path / "t.parquet", [*mixed, "plain"])
    again = read_texts(tmp_path / "t.parquet")
    assert again == [*mixed, "plain"]
    assert [*map(kind_of, again)] == [*map(kind_of, mixed), None]
    alike = MixedTexts.model_validate(
        {"source": "mix", "of": [part | {"kind": "k", "share": 1.5} for part in parts]}
    )
    assert {text.kind for text in load_texts(alike, tmp_path, tmp_path, str)} == {
        TextKind("k", 1.5)
    }
    record = {"text": "x", "kind": "k", "share": 2}
    assert [*map(kind_of, parse_texts(json.dumps([record]).encode(), "x.json", "text", str))] == [
        TextKind("k", 2)
    ]
    code = b"a = 1\n\n\n\n  b\n\n\n \n\n\n"
    assert parse_texts(code, "code.utf8", "text", str, "\n\n\n") == ["a = 1", "  b"]
    with pytest.raises(InputError, match=r"x\.json: separator '#' is for plain text"):
        parse_texts(b"[]", "x.json", "text", str, "#")
    with pytest.raises(
        InputError, match=r"record 0, has no texts 'text' \(it has instruction, input, output\)"
    ):
        parse_texts(json.dumps(records).encode(), "x.json", "text", str)


def test_each_file_of_a_pattern_is_a_text(tmp_path, wheel, monkeypatch):
    path = tmp_path / "code.tar.gz"
    digest = sdist(path, {"a.py": "import b\n", "b.py": "", "sub/c.py": "x = 1", "d.txt": "no"})
    monkeypatch.setattr("blockpruner.inputs.texts.package_file", lambda *args: path)
    data = PypiTexts(
        source="pypi", package="tiny==1", sha256=digest, file="tiny.data-1.0/*.py", format="text"
    )
    assert load_texts(data, tmp_path, tmp_path, str) == ["import b", "x = 1"]
    with refused("package-member"):
        load_texts(data.model_copy(update={"file": "tiny.data-1.0/*.md"}), tmp_path, tmp_path, str)


def test_questions_are_problems_with_solutions_and_stories_once(tmp_path):
    docs = [
        {"query": "Problem: 1 + 1?\nSolution:", "solution": "2."},
        {"story": "Once.", "query": "a"},
        {"story": "Once."},
    ]
    packed = gzip.compress("\n".join(json.dumps({"doc": doc}) for doc in docs).encode())
    assert parse_texts(packed, "x.jsonl.gz", "questions", str) == [
        "Problem: 1 + 1?\nSolution: 2.",
        "Once.",
    ]


def test_texts_that_cannot_be_used_are_refused_by_file_and_record(monkeypatch):
    good = [json.dumps({"text": f"words {i}"}) for i in range(400)]
    with pytest.raises(InputError, match="x.jsonl, record 1, holds half of a character"):
        parse_texts(
            "\n".join([good[0], r'{"text": "a cut emoji \ud83d"}']).encode(), "x.jsonl", "text", str
        )
    with pytest.raises(InputError, match="texts, record 1, holds half of a character"):
        listed(["words", "a cut emoji \ud83d"], str)
    packed = bytearray(gzip.compress("\n".join(good).encode()))
    with pytest.raises(InputError, match="x.jsonl.gz is truncated"):
        parse_texts(bytes(packed[:-20]), "x.jsonl.gz", "text", str)
    packed[len(packed) // 2] ^= 255
    with pytest.raises(InputError, match="x.jsonl.gz is truncated, damaged"):
        parse_texts(bytes(packed), "x.jsonl.gz", "text", str)
    monkeypatch.setattr("blockpruner.inputs.texts.MAX_UNPACKED", 2**20, raising=False)
    with pytest.raises(
        InputError, match="x.jsonl.gz unpacks to more than 1 MiB; unpack it yourself: gunzip"
    ):
        parse_texts(gzip.compress(b" " * (2**20 + 1)), "x.jsonl.gz", "text", str)
    with pytest.raises(InputError, match="x.jsonl is truncated, damaged or not what"):
        parse_texts(good[0].encode(), "x.jsonl", "questions", str)
