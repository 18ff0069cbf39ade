"""Sealed files: what ``torch.save`` writes with its SHA-256 behind it, so that damage is seen before anything is read.

``torch.load`` reads them too, and looks at no checksum: numbers that a disk has altered load as if they were right.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, BinaryIO, cast

import torch

from .container import StoreError
from .files import replacing

SEAL = b"taylorkern sha-256 "
_END = len(SEAL) + hashlib.sha256().digest_size
_CHUNK = 2**20  # bytes read at a time


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``, tensor by tensor: beside them no more memory is taken. Whole or not at all.

    Raises OSError with the path where that can't be done, and ValueError where ``state`` holds what
    ``torch.load(weights_only=True)`` would refuse.
    """
    try:
        with replacing(path) as file:
            hashing = _Hashing(file)
            _save(state, hashing)
            file.flush()
            _check_readable(state, file.name)
            file.write(SEAL + hashing.digest())
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"{why}; give a writable folder with room for a checkpoint", str(path)) from error


def damage(path: Path) -> str:
    """What is wrong with the file, or "" where it is as it was written. Raises OSError where it can't be read."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - _END
        if left < 0:
            return f"only {left + _END} bytes are left"
        found = hashlib.sha256()
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            found.update(chunk)
            left -= len(chunk)
        seal = file.read(_END)
    if not seal.startswith(SEAL):
        return "its end is missing"
    return "" if seal == SEAL + found.digest() else "its checksum is another"


def read(path: Path) -> dict[str, Any]:
    """The state in the file, on the CPU; nothing of it is run.

    Raises StoreError where it holds what would have to be run, and OSError where it can't be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise StoreError(f"{path} is no checkpoint that can be read without running code from it: {error}") from error


class _Hashing:
    """Passes on what is written, one piece behind the other. ``torch.save`` hides an error; it is kept here."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, piece: bytes) -> int:
        try:
            written = self._file.write(piece)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(piece)
        return written

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


def _save(state: Mapping[str, Any], file: _Hashing) -> None:
    try:
        torch.save(dict(state), cast(IO[bytes], file))  # all that it calls is there
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise


def _check_readable(state: Mapping[str, Any], path: str) -> None:
    """Raise ValueError, naming the entry, where what was written would not be read again."""
    if not torch.serialization.get_unsafe_globals_in_checkpoint(path):
        return
    parts = {f"{key}[{name!r}]": value for key in ("parts", "extra") for name, value in state.get(key, {}).items()}
    for name, value in parts.items():
        alone = io.BytesIO()
        torch.save(value, alone)
        alone.seek(0)
        if unknown := torch.serialization.get_unsafe_globals_in_checkpoint(alone):
            raise ValueError(
                f"{name} holds {', '.join(sorted(unknown))}, which torch.load(weights_only=True) would refuse to read; "
                "keep numbers, strings, lists and tensors in it, or allow it (torch.serialization.add_safe_globals)"
            )
    raise ValueError("this state holds objects that torch.load(weights_only=True) would refuse to read")
