"""Files that are the old one or the new one, whole, whatever interrupts the writing."""

import os
import uuid
from pathlib import Path


def replace(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` beside ``path``, then rename it, links followed.

    Raises OSError where that can't be done; nothing is left behind then.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
