"""What a disk holds after a kill or a cut of power, before any write of a piece of work.

Decides what a write is (a sync, a rename, a link, a new folder) and which of the writes before the
cut survive. The work runs in a forked child. Files are looked at when they are synced, so writes in
C++ are seen as well.

- `killed`: the process dies, and all that it has written stays.
- `lost`: power is cut. The disk has what was synced and nothing else: files as at their last sync,
  folders with the names of theirs. No file system may keep less.
- `full`: the disk is full from this write on, which fails, as does every later one. A file that is
  opened to be written counts as a write, too.
- `reordered`: power is cut. The disk has all names, but of content only what was synced, and half
  of a new file that never was. File systems that write names before data do this.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MODES = ("killed", "lost", "reordered")
WRITES = ("fsync", "replace", "rename", "link", "mkdir")
"""Functions of `os`; pathlib and shutil call them, too."""

Image = dict[str, bytes | None]
"""Content by path; None for a folder."""


def forked(
    folder: Path, work: Callable[[], object], log: Path, cut: int = 0, mode: str = "killed"
) -> tuple[int, int]:
    """Do the work in a child process within a folder; power is cut before one of its writes, and
    the folder is then what the disk holds.

    Args:
        log: gets the output.
        cut: the number of the write; 0 cuts nothing.

    Returns:
        The child's exit code (-SIGKILL where it was cut), and its number of writes.
    """
    notes = log.with_name("power.pickle")
    notes.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            with open(log, "wb", buffering=0) as output:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (
                open(number, "w", buffering=1, closefd=False)  # noqa: SIM115 (the fork's own)
                for number in (1, 2)
            )
            recorder = Recorder(folder, cut, mode, notes)
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            if "recorder" in locals():
                recorder.note(None)
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    writes, image = pickle.loads(notes.read_bytes())
    if image is not None:
        shutil.rmtree(folder)
        for path, content in image.items():
            Path(path).mkdir() if content is None else Path(path).write_bytes(content)
    return code, writes


class Recorder:
    """The state of a folder that is promised to be on disk, in the process that writes to it."""

    def __init__(self, folder: Path, cut: int, mode: str, notes: Path) -> None:
        """Take what is there for synced."""
        self.folder, self.cut, self.mode, self.notes, self.writes = str(folder), cut, mode, notes, 0
        self.process = os.getpid()
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        """Of each folder, by inode, at its last sync: the inode of each name, and whether it is a
        folder."""
        self.content: dict[int, bytes] = {}
        """Of each file, by inode, at its last sync."""
        self.held: dict[int, int] = {}
        """Open files by inode: the inode of a file that is deleted goes to no other."""
        if mode == "full":
            io.open = builtins.open = self.counted("open", builtins.open)
        elif cut and mode != "killed":
            for path in (self.folder, *(str(path) for path in folder.rglob("*"))):
                self.see(path)
        for name in WRITES:
            setattr(os, name, self.counted(name, getattr(os, name)))

    def see(self, path: str) -> None:
        """Take a file or folder, as it is now, for synced."""
        descriptor = os.open(path, os.O_RDONLY)
        inode = os.fstat(descriptor).st_ino
        if inode in self.held:
            os.close(self.held[inode])
        self.held[inode] = descriptor
        try:
            self.names[inode] = {
                each.name: (each.inode(), each.is_dir()) for each in os.scandir(descriptor)
            }
        except NotADirectoryError:
            self.content[inode] = Path(path).read_bytes()

    def counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            if os.getpid() != self.process or not self.is_within(
                arguments[name in ("replace", "rename", "link")]
            ):
                return original(*arguments, **options)
            if name == "open" and not set("wax+") & set((*arguments, options.get("mode", "r"))[1]):
                return original(*arguments, **options)
            self.writes += 1
            if self.mode == "full" and 0 < self.cut <= self.writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.writes == self.cut:
                self.note(None if self.mode == "killed" else dict(self.image()))
                os.kill(self.process, signal.SIGKILL)
            if name != "fsync":
                return original(*arguments, **options)
            if self.held:  # only recorded: no power is cut, and a real sync takes milliseconds
                self.see(f"/proc/self/fd/{arguments[0]}")
            return None

        return write

    def is_within(self, place: Any) -> bool:
        """Whether a path or an open file is in the folder: caches of libraries elsewhere do not
        count."""
        path = (
            Path(f"/proc/self/fd/{place}").readlink()
            if isinstance(place, int)
            else Path.cwd() / place
        )
        return str(path).startswith(self.folder)

    def note(self, image: Image | None) -> None:
        self.notes.write_bytes(pickle.dumps((self.writes, image)))

    def image(self) -> Iterator[tuple[str, bytes | None]]:
        return (
            self.promised(self.folder, Path(self.folder).stat().st_ino)
            if self.mode == "lost"
            else self.named()
        )

    def promised(self, path: str, inode: int) -> Iterator[tuple[str, bytes | None]]:
        """What was synced of a folder; a name may be on disk before its content."""
        yield path, None
        for name, (below, is_folder) in self.names.get(inode, {}).items():
            if is_folder:
                yield from self.promised(f"{path}/{name}", below)
            else:
                yield f"{path}/{name}", self.content.get(below, b"")

    def named(self) -> Iterator[tuple[str, bytes | None]]:
        yield self.folder, None
        for path in sorted(Path(self.folder).rglob("*")):
            if path.is_dir():
                yield str(path), None
            else:
                content = path.read_bytes()
                yield str(path), self.content.get(path.stat().st_ino, content[: len(content) // 2])
