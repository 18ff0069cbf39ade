"""What an oracle has measured so far, kept in a file, so that one that was interrupted goes on where it stopped."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .coupling import Coupling
from .files import replace
from .state import named_tensors

FORMAT = 1
PLAN = "taylorkern.oracle"
DIGEST = "taylorkern.oracle.sha256"
PAUSE = 30.0  # seconds between two writings within a minibatch


@dataclass(frozen=True)
class Subject:
    """What is measured: the model as it is, and which of its units, [U]. The texts are digests."""

    fingerprint: str
    state: str
    modes: str
    units: Tensor

    def difference(self, other: "Subject") -> str | None:
        """What is not the same in ``other``, a file's."""
        if self.fingerprint != other.fingerprint:
            return "another model, or this one before or after a cut"
        if self.state != other.state:
            return "this model with other parameters or buffers"
        if self.modes != other.modes:
            return "this model in another mode (training or evaluation)"
        if not torch.equal(self.units, other.units):
            return f"other units ({len(other.units)} of them; this call asks for {len(self.units)})"
        return None


@dataclass
class Row:
    """One minibatch: column 0 is the loss with every gate at 1, the others that without each unit in turn."""

    digest: str
    losses: Tensor  # [1 + U] float64, NaN where not measured
    measured: Tensor  # [1 + U] bool; a measured loss may be NaN as well

    @classmethod
    def empty(cls, digest: str, units: int) -> "Row":
        losses = torch.full((1 + units,), torch.nan, dtype=torch.float64)
        return cls(digest, losses, torch.zeros(1 + units, dtype=torch.bool))

    @property
    def changes(self) -> Tensor:
        """ΔL per unit, [U]."""
        return self.losses[1:] - self.losses[0]


class Measurements:
    """The rows of one subject, in ``path`` where one is given; as a context, writes what is new when it is left.

    Raises ValueError where the file is damaged or of another subject, OSError where it can't be written; a file that
    is refused is left as it is.
    """

    def __init__(self, path: Path | None, subject: Subject) -> None:
        self.path, self.subject, self.rows = path, subject, list[Row]()
        self._written, self._new = time.monotonic(), False
        if path is not None and path.exists():
            self.rows = self._read(path)
        elif path is not None:
            self._write(path)  # what can't be written is known before the work

    @classmethod
    def of(cls, model: nn.Module, coupling: Coupling, units: Tensor, path: Path | None) -> "Measurements":
        """Those of ``units`` [U] of ``model`` as it is now."""
        modes = [name for name, module in model.named_modules() if module.training]
        state = digest(named_tensors(model)) if path is not None else ""
        return cls(path, Subject(coupling.fingerprint, state, digest(modes), units))

    def row(self, minibatch: int, content: Any) -> Row:
        """The row of minibatch number ``minibatch``, a new one where nothing is known of it yet."""
        found = digest(content) if self.path is not None else ""
        if minibatch == len(self.rows):
            self.rows.append(Row.empty(found, len(self.subject.units)))
        if self.rows[minibatch].digest != found:
            raise self._refusal(
                f"minibatch {minibatch} had other inputs or targets; pass the same minibatches in the same order, "
                "without a shuffle or a random augmentation of their own"
            )
        return self.rows[minibatch]

    def add(self, row: Row, columns: Tensor, losses: Tensor) -> None:
        """Take down ``losses`` [R] of ``columns`` [R]; written at a row's end, and at times before it."""
        row.losses[columns], row.measured[columns] = losses, True
        self._new = True
        if bool(row.measured.all()) or time.monotonic() - self._written > PAUSE:
            self.write()

    def check_loss(self, loss: float, precision: float) -> None:
        """Raise ValueError unless ``loss``, of the first minibatch with every gate at 1, is the file's.

        They may differ by rounding: 1e-5, or ``precision``, the model's relative rounding, where that is coarser.
        """
        kept = float(self.rows[0].losses[0])
        if math.isfinite(kept) and not math.isclose(loss, kept, rel_tol=max(1e-5, precision), abs_tol=1e-7):
            raise self._refusal(
                f"the first minibatch had loss {kept:.9g}, and has {loss:.9g} now: another loss or code"
            )

    def known(self, minibatches: int | None) -> int:
        """How many units are measured already in the first ``minibatches``."""
        return sum(int(row.measured[1:].sum()) for row in self.rows[:minibatches])

    def write(self) -> None:
        """Bring the file up to date."""
        if self.path is not None and self._new:
            self._write(self.path)
            self._written, self._new = time.monotonic(), False

    def __enter__(self) -> "Measurements":
        return self

    def __exit__(self, *exception: object) -> None:
        self.write()

    def _refusal(self, difference: str) -> ValueError:
        return ValueError(f"{self.path} can't be gone on with: {difference}. To measure anew, name another file")

    def _write(self, path: Path) -> None:
        width = 1 + len(self.subject.units)
        tensors = {
            "losses": torch.stack([row.losses for row in self.rows]) if self.rows else torch.zeros(0, width).double(),
            "measured": torch.stack([row.measured for row in self.rows]) if self.rows else torch.zeros(0, width).bool(),
            "units": self.subject.units,
        }
        plan = {
            "format": FORMAT,
            "fingerprint": self.subject.fingerprint,
            "state": self.subject.state,
            "modes": self.subject.modes,
            "minibatches": [row.digest for row in self.rows],
            "tensors": digest(tensors),
        }
        text = json.dumps(plan)
        replace(path, safetensors.torch.save(tensors, {PLAN: text, DIGEST: digest(text)}))

    def _read(self, path: Path) -> list[Row]:
        plan, tensors = _opened(path)
        subject = Subject(plan["fingerprint"], plan["state"], plan["modes"], tensors["units"])
        difference = self.subject.difference(subject)
        if difference:
            raise ValueError(f"{path} holds measurements of {difference}. To measure anew, name another file")
        return [
            Row(minibatch, losses, measured)
            for minibatch, losses, measured in zip(
                plan["minibatches"], tensors["losses"].clone(), tensors["measured"].clone(), strict=True
            )
        ]


def digest(content: Any) -> str:
    """A SHA-256 over everything in a nested structure that decides a run: tensors, arrays, texts, numbers, objects.

    Objects count by what pickle would keep of them, attributes as a rule. Raises ValueError for what can't be pickled.

    >>> digest((torch.zeros(2), 1)) == digest((torch.zeros(2), 1)), digest(torch.zeros(2)) == digest(torch.zeros(1, 2))
    (True, False)
    """
    found = hashlib.sha256()
    try:
        for piece in _pieces(content):
            found.update(hashlib.sha256(piece).digest())  # of one length: no two sequences of pieces run together
    except RecursionError as error:
        raise _unknown(content, "something in it holds itself") from error
    return found.hexdigest()


def _pieces(content: Any) -> Iterator[Any]:
    """What to hash of ``content``, each piece bytes or a buffer."""
    yield type(content).__name__.encode()
    if isinstance(content, str | bytes | int | float | complex | None):
        yield repr(content).encode()
    elif isinstance(content, Tensor):
        yield f"{content.dtype}{list(content.shape)}".encode()
        yield _bytes(content)
    elif isinstance(content, Mapping):
        for key, item in content.items():
            yield from _pieces(key)
            yield from _pieces(item)
        yield b"end"
    elif isinstance(content, Sequence):
        for item in content:
            yield from _pieces(item)
        yield b"end"
    elif isinstance(content, Set):
        yield from map(str.encode, sorted(map(digest, content)))  # a set's order is another in every process
        yield b"end"
    elif isinstance(content, type | FunctionType):
        yield _name(content)
    elif isinstance(content, np.ndarray | np.generic) and not isinstance(content, np.ma.MaskedArray):
        yield f"{content.dtype}{list(content.shape)}".encode()
        yield from _pieces(content.tolist()) if content.dtype.hasobject else (content.tobytes(),)
    else:
        yield from _reduced(content)


def _name(content: type | FunctionType) -> bytes:
    if isinstance(content, FunctionType) and "<" in content.__qualname__:
        raise _unknown(content, "a lambda or a function within another may hold anything")
    return f"{content.__module__}.{content.__qualname__}".encode()


def _bytes(tensor: Tensor) -> Any:
    try:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return plain.reshape(-1).view(torch.uint8).numpy().data
    except (RuntimeError, TypeError) as error:  # sparse, nested, quantised, without data
        raise _unknown(tensor, str(error).splitlines()[0]) from error


def _reduced(content: Any) -> Iterator[Any]:
    """The pieces of an object as ``__reduce_ex__`` takes it apart: how to make it, of what, attributes, items."""
    try:
        parts = content.__reduce_ex__(2)
    except Exception as error:  # an object's own code; without one, a TypeError for what pickle can't take apart
        raise _unknown(content, str(error)) from error
    if isinstance(parts, str):  # a name, of something that there is one of
        yield parts.encode()
        return
    for part in parts:
        yield from _pieces(list(part) if isinstance(part, Iterator) else part)


def _unknown(content: Any, reason: str) -> ValueError:
    kind = f"{type(content).__module__}.{type(content).__qualname__}"
    return ValueError(
        f"a {kind} in the inputs or targets can't be hashed ({reason}), so a minibatch can't be told from another; "
        "call without file="
    )


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's plan and tensors, once their checksums are known to be good."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); name another file") from error
    if PLAN not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not an oracle's; name another file")
    if digest(metadata[PLAN]) != metadata.get(DIGEST):
        raise ValueError(f"{path} is damaged (checksum of its plan); name another file")
    plan = json.loads(metadata[PLAN])
    if plan["format"] != FORMAT:
        raise ValueError(f"{path} has format {plan['format']}, this version goes on with {FORMAT}; name another file")
    if digest(tensors) != plan["tensors"]:
        raise ValueError(f"{path} is damaged (checksum of its numbers); name another file")
    return plan, tensors
