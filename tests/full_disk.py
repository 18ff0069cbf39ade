"""Disks that are full from a chosen moment on, and things that happen when a file begins to be written."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

ROOM = 4 * 2**20
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_watched: list[Callable[[str], None]] = []


class Disk:
    """A small file system in ``folder`` where mounting is permitted; else a folder that opens no file when "full"."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self._ballast, self._full = folder, folder / "ballast", False
        self.mounted = _mount(f"size={ROOM}", folder)

    def fill(self) -> None:
        """From now on nothing can be written."""
        self._full = True
        if self.mounted:
            with suppress(OSError), self._ballast.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(1024))

    def free(self) -> None:
        """There is room again."""
        self._full = False
        self._ballast.unlink(missing_ok=True)

    def refuse(self, path: str) -> None:
        """What a full disk does, where it isn't a real one."""
        if self._full and not self.mounted and path.startswith(str(self.folder)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def protect(self) -> bool:
        """Make it read-only, where it is a file system of its own; whether it is."""
        return self.mounted and _mount("remount,ro", self.folder)

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


def _mount(options: str, folder: Path) -> bool:
    """Whether that was permitted."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextmanager
def writing(watcher: Callable[[str], None]) -> Iterator[None]:
    """``watcher(path)`` is called before a file is opened for writing, the latest first; it may raise."""
    _hook()
    _watched.append(watcher)
    try:
        yield
    finally:
        _watched.remove(watcher)


def at(name: str, number: int, action: Callable[[], None]) -> Callable[[str], None]:
    """A watcher that does ``action`` at the ``number``-th writing of a path with ``name`` in it."""
    seen = []

    def watch(path: str) -> None:
        if name in path:
            seen.append(path)
            if len(seen) == number:
                action()

    return watch


@cache
def _hook() -> None:
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple) -> None:
    if _watched and event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        for watcher in reversed(_watched):
            watcher(os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else "")
