"""Reads safetensors files that nobody vouches for: nothing is run, mapped or allocated that does not fit the model.

Such a file is the header's length n in 8 bytes, n bytes of JSON, and the tensors' bytes one behind another. Only
the header is read, and only where it is no longer than expected; each tensor is then read into memory of its own size.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
METADATA = "__metadata__"
LONGEST = 100  # characters of something foreign in an error message


class StoreError(RuntimeError):
    """A file can't be written, or can't be what the model needs. The model is as it was before the call."""


@dataclass(frozen=True)
class Container:
    """An open file whose header has the form of a safetensors file's, and whose tensors fill it from end to end."""

    path: Path
    file: FileIO
    metadata: dict[str, str]
    entries: dict[str, dict[str, Any]]
    start: int

    def read(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Tensor ``name``, on the CPU; StoreError where the header gives it another dtype, shape or size."""
        entry = self.entries[name]
        begin, end = entry["data_offsets"]
        size = prod(shape) * dtype.itemsize
        if (DTYPES.get(entry["dtype"]), tuple(entry["shape"]), end - begin) != (dtype, shape, size):
            raise StoreError(f"{self.path}: header and plan tell different things of {name}: altered; save it again")
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        with _told(self.path):
            _fill(self.file, self.start + begin, raw(tensor).numpy().data)
        if dtype == torch.bool and bool((raw(tensor) > 1).any()):
            raise StoreError(f"{self.path}: {name} holds bytes that are no booleans: altered; save it again")
        return tensor


@contextmanager
def opened(path: Path, longest: int) -> Iterator[Container]:
    """The file at ``path``, open while the context lasts; refuses a header of more than ``longest`` bytes.

    Raises StoreError where the file can't be read, is no regular file or not a safetensors file.
    """
    with ExitStack() as stack:
        with _told(path):
            file = stack.enter_context(_regular(path))
            container = _container(path, file, longest)
        yield container


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What can go wrong with a file, as a StoreError that says what to do."""
    try:
        yield
    except (EOFError, RecursionError, ValueError) as error:
        why = shown(str(error))
        raise StoreError(
            f"{path} is truncated, altered or not a safetensors file ({why}); get or save it again"
        ) from error
    except OSError as error:
        raise StoreError(f"can't read {path}: {error}; check the path and its permissions") from error


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8)


def strict(text: str) -> Any:
    """``text`` as JSON; ValueError also for what Python's parser lets pass: a key twice, NaN, Infinity."""
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)


def shown(text: str) -> str:
    """Something out of a file as an error message can show it: printable and short."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def whole(values: Any) -> bool:
    """Whether ``values`` is a list of whole numbers from 0 on, and nothing that only compares like one."""
    return type(values) is list and all(type(value) is int and value >= 0 for value in values)


def _regular(path: Path) -> FileIO:
    """``path`` opened, which a pipe or a device is not: it could block, or never end."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")
    file = FileIO(path, opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # changed in between
        file.close()
        raise OSError("it is no regular file")
    return file


def _container(path: Path, file: FileIO, longest: int) -> Container:
    size = os.fstat(file.fileno()).st_size
    first = bytearray(8)
    _fill(file, 0, memoryview(first))
    length = int.from_bytes(first, "little")
    if length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    if length > longest:
        raise StoreError(
            f"{path} has a header of {length} bytes, and a file of this model needs less than {longest}: it holds "
            "another network, or was altered; build the model as it was built before it was pruned"
        )
    text = bytearray(length)
    _fill(file, 8, memoryview(text))
    header = strict(text.decode())
    if type(header) is not dict:
        raise ValueError("the header is no JSON object")
    metadata = header.pop(METADATA, {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("the metadata are no strings")
    _check_entries(header, size - 8 - length)
    return Container(path, file, metadata, header, 8 + length)


def _check_entries(entries: dict[str, Any], size: int) -> None:
    """Every entry of its form, and all together filling ``size`` bytes without a gap or an overlap."""
    for name, entry in entries.items():
        formed = type(entry) is dict and entry.keys() == {"dtype", "shape", "data_offsets"}
        if not formed or type(entry["dtype"]) is not str or not whole(entry["shape"]):
            raise ValueError(f"the header's entry of {shown(name)} is malformed")
        if not whole(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
            raise ValueError(f"the offsets of {shown(name)} are malformed")
    reached = 0
    for begin, end in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
        if begin != reached or end < begin:
            raise ValueError(f"the tensors' bytes {begin} to {end} don't follow on {reached}")
        reached = end
    if reached != size:
        raise ValueError(f"{size} bytes of tensors where the header tells of {reached}")


def _fill(file: FileIO, offset: int, view: memoryview) -> None:
    file.seek(offset)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise EOFError(f"it ends {len(view)} bytes early")
        view = view[count:]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
