"""Files that are the old one or the new one, whole, whatever interrupts the writing."""

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_PARTIAL = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{32}\.partial")
_UNSYNCABLE = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP}  # of folders that can't be opened or synced


def replace(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` beside ``path``, then rename it, links followed.

    Raises OSError where that can't be done; nothing is left behind then.
    """
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file beside ``path`` to write to, renamed to it, links followed, where the block ends without an error.

    Raises OSError where that can't be done; nothing is left behind then, but by a process that is killed.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def unfinished(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files in ``folder`` that were being written, by a process that lives or was killed: of what name, and where.

    >>> list(unfinished(Path("no such folder")))
    []
    """
    for path in folder.glob(".*.partial"):
        if found := _PARTIAL.fullmatch(path.name):
            yield found["target"], path


def _sync(folder: Path) -> None:
    """The renaming is on the disk, where the file system can tell."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCABLE:
            raise
