"""Who holds a lock file is known at any moment, and whoever comes waits or is refused."""

import errno
import fcntl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest

from blockpruner.core.errors import StorageError
from blockpruner.store.locks import hold


def refuse(holder):
    raise BlockingIOError(f"held by {holder}")


def test_whoever_comes_is_told_the_holder_and_waits_or_is_refused(tmp_path):
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
        assert waiting.result() == "second" and told == ["the first, with a longer name"]
    with hold(path, "third", refuse):
        assert path.read_text() == "third"


def test_a_holder_that_is_about_to_write_its_name_is_waited_for(tmp_path):
    """Behind a killed one, whose name is still there."""
    path = tmp_path / "a.lock"
    with open(path, "w") as lock, open(f"{path}.naming", "w") as naming, ThreadPoolExecutor() as threads:
        fcntl.flock(naming, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("a killed one")
        lock.flush()
        second = threads.submit(hold(path, "second", refuse).__enter__)
        assert not wait([second], timeout=0.3).done
        lock.seek(0)
        lock.truncate()
        lock.write("first")
        lock.flush()
        fcntl.flock(naming, fcntl.LOCK_UN)
        with pytest.raises(BlockingIOError, match="held by first$"):
            second.result()


def test_one_that_waited_writes_its_name_when_nobody_reads(tmp_path):
    path = tmp_path / "a.lock"
    with open(f"{path}.naming", "w") as naming, ThreadPoolExecutor() as threads:
        with hold(path, "first", refuse):
            second, told = hold(path, "second", lambda holder: told.set()), Event()
            waiting = threads.submit(second.__enter__)
            assert told.wait(60)
            fcntl.flock(naming, fcntl.LOCK_EX)
        assert not wait([waiting], timeout=0.3).done and path.read_text() == "first"
        fcntl.flock(naming, fcntl.LOCK_UN)
        waiting.result()
        assert path.read_text() == "second"
        second.__exit__(None, None, None)


def test_where_it_cannot_be_written_or_locked_is_said(tmp_path, monkeypatch):
    (tmp_path / "folder").write_text("a file")
    with (
        pytest.raises(StorageError, match="cannot write .*folder/a.lock"),
        hold(tmp_path / "folder/a.lock", "", refuse),
    ):
        pass

    def lock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(StorageError, match="no file can be locked there; choose"), hold(tmp_path / "a", "", refuse):
        pass


def test_an_error_of_whoever_is_told_is_its_own(tmp_path):
    def full(holder):
        raise OSError(errno.ENOSPC, "the output is full")

    path = tmp_path / "a.lock"
    with hold(path, "first", refuse):
        with pytest.raises(OSError, match="the output is full") as raised, hold(path, "second", full):
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
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, "-c", script, path], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    with pytest.raises(BlockingIOError, match="held by a parent"), hold(path, "me", refuse):
        pass
    subprocess.run(["kill", "-9", str(child)], check=True)
    with hold(path, "me", lambda holder: None):
        assert path.read_text() == "me"
