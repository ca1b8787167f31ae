"""A lock names its holder; whoever comes second waits or is refused."""

import errno
import fcntl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest

from blockpruner.core.errors import StorageError
from blockpruner.store.files import clear_left, new_directory
from blockpruner.store.locks import hold
from tests.errors import refused


def refuse(holder):
    raise BlockingIOError(f"held by {holder}")


def test_the_second_learns_the_holder_and_waits_or_is_refused(tmp_path):
    path, reported, let_go = tmp_path / "a.lock", [], Event()

    def second():
        with hold(path, "second", lambda holder: (reported.append(holder), let_go.set())):
            return path.read_text()

    with ThreadPoolExecutor() as threads:
        with hold(path, "the first, with a longer name", refuse):
            waiting = threads.submit(second)
            assert let_go.wait(60)
            assert not wait([waiting], timeout=0.1).done
            with (
                pytest.raises(BlockingIOError, match="held by the first, with a longer name$"),
                hold(path, "", refuse),
            ):
                pass
        assert waiting.result() == "second\n"
        assert reported == ["the first, with a longer name"]
    with hold(path, "third", refuse):
        assert path.read_text() == "third\n"


def test_a_name_that_is_not_yet_written_is_of_another_process(tmp_path):
    path = tmp_path / "a.lock"
    with hold(path, "first", refuse):
        for leave in (lambda: path.write_text(""), path.unlink):
            leave()
            with (
                pytest.raises(BlockingIOError, match="held by another process$"),
                hold(path, "second", refuse),
            ):
                pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_it_cannot_be_written_or_locked_is_named(tmp_path, monkeypatch, code):
    """The codes are of NFS without a lock service, of Lustre without `-o flock`, and of others."""
    (tmp_path / "folder").write_text("a file")
    below = tmp_path / "folder/a.lock"
    with pytest.raises(StorageError, match="cannot write .*folder/a.lock"), hold(below, "", refuse):
        pass

    def lock(file, how):
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "flock", lock)
    said = pytest.raises(StorageError, match=r"cannot write .*a\.lock: no file can be locked there")
    with said, hold(tmp_path / "a.lock", "", refuse):
        pass


def test_a_killed_holder_leaves_no_lock_and_its_child_keeps_it(tmp_path):
    script = (
        "import subprocess, sys, time; from pathlib import Path; from blockpruner.store.locks"
        " import hold\nwith hold(Path(sys.argv[1]), 'a parent', print) as lock:\n    child ="
        " subprocess.Popen(['sleep', '600'], pass_fds=(lock,))\n    print(child.pid, flush=True);"
        " time.sleep(600)"
    )
    path = tmp_path / "a.lock"
    command, environment = (
        [sys.executable, "-c", script, path],
        {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    with pytest.raises(BlockingIOError, match="held by a parent"), hold(path, "me", refuse):
        pass
    subprocess.run(["kill", "-9", str(child)], check=True)
    with hold(path, "me", lambda holder: None):
        assert path.read_text() == "me\n"


def test_what_another_process_is_making_stays(tmp_path):
    """The second is refused before it builds, and neither it nor `clear_left` removes what the
    first has made."""

    def second(folder):
        raise AssertionError("built twice")

    def first(folder):
        (folder / "weights").touch()
        clear_left(tmp_path / "out")
        with refused("place-not-empty"):
            new_directory(tmp_path / "out", second)

    new_directory(tmp_path / "out", first)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "weights"]


def test_a_folder_without_locks_is_written_and_named_otherwise(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    new_directory(tmp_path / "out", lambda folder: (folder / "weights").touch())
    assert (tmp_path / "out/weights").exists()
