"""A lock file names its holder; whoever comes second waits or is refused."""

import errno
import fcntl
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest

from blockpruner.core.errors import StorageError
from blockpruner.store import locks
from blockpruner.store.locks import hold


def refuse(holder):
    raise BlockingIOError(f"held by {holder}")


@pytest.mark.parametrize("system", ["POSIX", "Windows"])
def test_the_second_is_told_the_holder_and_waits_or_is_refused(tmp_path, system, monkeypatch):
    if system == "Windows":
        monkeypatch.setattr(locks, "fcntl", None)
    path, told, let_go = tmp_path / "a.lock", [], Event()

    def second():
        with hold(path, "second", lambda holder: (told.append(holder), let_go.set())):
            return path.read_text()

    with ThreadPoolExecutor() as threads:
        with hold(path, "the first, with a longer name", refuse):
            waiting = threads.submit(second)
            assert let_go.wait(60) and not wait([waiting], timeout=0.1).done
            with pytest.raises(BlockingIOError, match="held by the first, with a longer name$"), hold(path, "", refuse):
                pass
        assert waiting.result() == "second\n" and told == ["the first, with a longer name"]
    with hold(path, "third", refuse):
        assert path.read_text() == "third\n"
        with open(path) as file:
            if system == "Windows":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing of POSIX was used
            else:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_on_windows_a_killed_holder_leaves_no_lock(tmp_path, monkeypatch):
    script = (
        "import sys, time; from pathlib import Path; from blockpruner.store import locks; locks.fcntl = None\n"
        "with locks.hold(Path(sys.argv[1]), 'another process', print): print('mine', flush=True); time.sleep(600)"
    )
    path = tmp_path / "a.lock"
    command, environment = [sys.executable, "-c", script, path], {"PYTHONPATH": str(Path(__file__).parents[2])}
    monkeypatch.setattr(locks, "fcntl", None)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(BlockingIOError, match="held by another process$"), hold(path, "me", refuse):
            pass
        other.kill()
    with hold(path, "me", refuse):
        assert path.read_text() == "me\n"


@pytest.mark.parametrize(
    ("written", "later", "seen"),
    [("", "", "another process"), ("fir", "", "another process"), ("", "first\n", "first"), ("fir", "st\n", "first")],
)
def test_a_name_that_is_being_written_is_read_whole_or_not_at_all(tmp_path, written, later, seen, monkeypatch):
    path = tmp_path / "a.lock"
    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(written)
        lock.flush()
        monkeypatch.setattr("time.sleep", lambda seconds: (lock.write(later), lock.flush()))
        with pytest.raises(BlockingIOError, match=f"held by {seen}$"), hold(path, "second", refuse):
            pass


def test_where_it_cannot_be_written_or_locked_is_named(tmp_path, monkeypatch):
    (tmp_path / "folder").write_text("a file")
    below = tmp_path / "folder/a.lock"
    with pytest.raises(StorageError, match="cannot write .*folder/a.lock"), hold(below, "", refuse):
        pass

    def lock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(StorageError, match="no file can be locked there; choose"), hold(tmp_path / "a", "", refuse):
        pass


def test_a_full_disk_is_named(tmp_path):
    """The limit of this process stands in for it: a write of one byte more fails, and so would another try at close."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*a\.lock"), hold(tmp_path / "a.lock", "me", refuse):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_of_whoever_is_told_is_its_own(tmp_path):
    def full(holder):
        raise OSError(errno.ENOSPC, "the output is full")

    path = tmp_path / "a.lock"
    said = pytest.raises(OSError, match="the output is full")
    with hold(path, "first", refuse), said as raised, hold(path, "second", full):
        pass
    assert type(raised.value) is OSError


def test_a_killed_holder_leaves_no_lock_and_its_child_keeps_it(tmp_path):
    script = (
        "import subprocess, sys, time; from pathlib import Path; from blockpruner.store.locks import hold\n"
        "with hold(Path(sys.argv[1]), 'a parent', print) as lock:\n"
        "    child = subprocess.Popen(['sleep', '600'], pass_fds=(lock,))\n"
        "    print(child.pid, flush=True); time.sleep(600)"
    )
    path = tmp_path / "a.lock"
    command, environment = [sys.executable, "-c", script, path], {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    with pytest.raises(BlockingIOError, match="held by a parent"), hold(path, "me", refuse):
        pass
    subprocess.run(["kill", "-9", str(child)], check=True)
    with hold(path, "me", lambda holder: None):
        assert path.read_text() == "me\n"
