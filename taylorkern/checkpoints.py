"""Checkpoints: a training kept on disk, to go on from to the bit after whatever ended the process."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from . import files, randomness, sealed
from .blame import stacklevel
from .container import StoreError
from .dense import check_whole
from .parts import Parts
from .peers import Peers

FORMAT = 1
_NAME = re.compile(r"step-(?P<step>\d+)(?P<process>(\.rank\d+-of-\d+)?)\.pt")


class Checkpoints:
    """Keeps the state of a training in ``folder``: its ``parts``, by name, and all random states.

    A part is what has ``state_dict()`` and ``load_state_dict()``: model=, optimizer=, pruner=, scheduler=, scaler=,
    average=, a sampler, or a ``torch.Generator``. Give models themselves, not what wraps them for several processes or
    is compiled from them, and wrap or compile after :meth:`load`. Call :meth:`save` between steps: gradients, and what
    a backward has still to come for, are not kept.

    The newest ``keep`` are kept, one file each, and one for each process of ``group`` ("world", a
    ``torch.distributed`` group, or None: this process by itself), which all call :meth:`save` and :meth:`load` alike.
    Files are written whole or not at all, and carry a checksum; nothing in them is run when they are read.

    Raises ValueError for ``keep`` below 1, no parts, one without a state, a wrapped model, or a pruner whose model or
    optimiser is none of the parts.

    >>> import tempfile
    >>> from torch import nn, optim
    >>> def training(folder):
    ...     model = nn.Linear(2, 1)
    ...     optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ...     return model, Checkpoints(folder, model=model, optimizer=optimizer)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model, checkpoints = training(folder)
    ...     first = checkpoints.load()
    ...     checkpoints.save(30, epoch=2)
    ...     again, checkpoints = training(folder)
    ...     first, checkpoints.load(), bool((again.weight == model.weight).all())
    (None, {'epoch': 2, 'step': 30}, True)
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, group: Any = "world", **parts: Any) -> None:
        check_whole("keep", keep)
        self.folder, self.keep, self._group = Path(folder), keep, group
        self._parts = Parts(parts)
        self._followed = False  # whether this training is the one that the folder holds

    def save(self, step: int, **extra: Any) -> None:
        """Write a checkpoint, with ``extra`` (numbers, strings, lists, dicts, tensors) in it, then remove old ones.

        Those of later steps, which :meth:`load` left out or this training has gone back behind, are removed too.

        Raises OSError with the path where it can't be written, and ValueError where a state holds what could not be
        read again, or the folder has checkpoints of another training: none was loaded from it. All that was there
        before is there then. Where one process of several fails, all raise.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step={step!r} must be a whole number of at least 0")
        peers = Peers.of(self._group)
        peers.together(lambda: self._write(peers, step, extra))
        self._followed = True
        there = self._there(peers)
        kept = sorted(number for number in there if number <= step)[-self.keep :]
        for old in there.difference(kept):
            self._path(peers, old).unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Put everything back from the newest checkpoint; returns its ``extra`` and "step", None where there is none.

        Parts are to be built as before the first step, and a model dense: a pruner repeats its cuts, then the model's
        tensors come, the optimiser's, the others', and the random states at last. Of several processes all take
        the newest step that each of them has whole. A damaged file is left out with a warning.

        Raises StoreError where no whole checkpoint is left, ValueError where they are of another number of processes
        or of other parts, naming the part, and OSError where a file can't be read.
        """
        peers = Peers.of(self._group)
        step = self._newest(peers.together(lambda: self._look(peers)))
        if step is None:
            self._followed = True
            return None
        state = sealed.read(self._path(peers, step))
        self.load_state_dict(state)
        return {**state["extra"], "step": step}

    def state_dict(self) -> dict[str, Any]:
        """All parts' states and the random ones, for a file of your own; tensors are those in use."""
        return {"format": FORMAT, "parts": self._parts.state_dict(), "random": randomness.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a :meth:`state_dict` back, in the order of :meth:`load`.

        Raises ValueError for a newer format, other parts or a state that a part refuses. Names, shapes and groups of
        parameters are looked at before anything changes; a part that finds more to refuse is named, and what was
        loaded before it stays loaded: build the parts anew then.
        """
        if state.get("format") != FORMAT:
            raise ValueError(
                f"this checkpoint has format {state.get('format')!r}, known is {FORMAT}; update taylorkern"
            )
        randomness.check(state["random"])
        self._parts.load_state_dict(state["parts"])
        randomness.load_state_dict(state["random"])
        self._followed = True

    def _write(self, peers: Peers, step: int, extra: dict[str, Any]) -> None:
        there = self._there(peers)
        if there and not self._followed:
            raise ValueError(
                f"{self.folder} holds the checkpoint of step {max(there)}, which was not loaded and would be lost; "
                "call load() before the first save(), or give another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear(peers)
        sealed.write(self._path(peers, step), {**self.state_dict(), "step": step, "extra": extra})

    def _look(self, peers: Peers) -> tuple[list[int], set[int]]:
        """The steps that this process has whole, newest first and one if it is alone, and all that it has files of."""
        self._clear(peers)
        there, others = self._there(peers), self._of_others(peers)
        if others and max(others) > max(there, default=-1):
            raise ValueError(
                f"{self.folder / others[max(others)]} is newer than any checkpoint of {peers.size} process"
                f"{'es' if peers.size > 1 else ''} and of another number; start as many as then, or move it away"
            )
        return list(islice(self._whole(peers, there), 1 if peers.size == 1 else None)), there

    def _whole(self, peers: Peers, steps: set[int]) -> Iterator[int]:
        for step in sorted(steps, reverse=True):
            if wrong := sealed.damage(path := self._path(peers, step)):
                warnings.warn(f"{path} is damaged and left out: {wrong}", stacklevel=stacklevel())
            else:
                yield step

    def _newest(self, found: list[tuple[list[int], set[int]]]) -> int | None:
        """The newest step that every process has; None where there is none, or not all have finished the first."""
        common = set.intersection(*(set(whole) for whole, _ in found))
        if common:
            return max(common)
        there = set.union(*(steps for _, steps in found))
        if len(there) <= 1 and not all(steps for _, steps in found):
            return None
        raise StoreError(
            f"{self.folder} has files of the steps {', '.join(map(str, sorted(there)))}, none of them whole in every "
            "process; get one of them from a copy, or give an empty folder to start anew"
        )

    def _clear(self, peers: Peers) -> None:
        """Remove what killed writers of this process's files have left."""
        for name, path in files.unfinished(self.folder):
            if (match := _NAME.fullmatch(name)) and match["process"] == _process(peers):
                path.unlink(missing_ok=True)

    def _named(self) -> list[re.Match[str]]:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [match for name in names if (match := _NAME.fullmatch(name))]

    def _there(self, peers: Peers) -> set[int]:
        return {int(match["step"]) for match in self._named() if match["process"] == _process(peers)}

    def _of_others(self, peers: Peers) -> dict[int, str]:
        """Files of trainings in another number of processes, by step."""
        end = _process(peers).partition("-of-")[2]
        return {int(m["step"]): m.string for m in self._named() if m["process"].partition("-of-")[2] != end}

    def _path(self, peers: Peers, step: int) -> Path:
        return self.folder / f"step-{step}{_process(peers)}.pt"


def _process(peers: Peers) -> str:
    return f".rank{peers.rank}-of-{peers.size}" if peers.size > 1 else ""
