"""A run's log for TensorBoard: the points of its history as they come, and its widths in the end."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from taylorkern.errors import CommandError, one_line

from .progress import say

FILES = "events.out.tfevents.*"


class Board:
    """Event files in ``folder``, which TensorBoard reads; as a context it is closed at the end.

    A run that goes on writes its history from the beginning into a file of its own and then takes away the files of
    before, so that no point stands there twice and none is missing; their wall-clock times are then those of the
    writing. Where there is no room for the log, the run goes on and the log follows when there is.

    Raises CommandError where the package tensorboard is missing, and OSError where ``folder`` can't be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if find_spec("tensorboard") is None:
            raise CommandError("a log for TensorBoard needs tensorboard: pip install 'taylorkern[tensorboard]'")
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = None
        self._logged = 0

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def follow(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Log what is new in ``history``, the run's whole one so far: every number of a point at its "step"."""
        before = [] if self._writer else list(self._folder.glob(FILES))
        try:
            self._log(history[self._logged :])
        except OSError as error:
            self._give_up(error)
            return
        self._logged = len(history)
        for file in before:
            file.unlink(missing_ok=True)

    def widths(self, dense: Mapping[str, int], pruned: Mapping[str, int]) -> None:
        """Log a table of every layer's width before and after."""
        rows = [f"| {layer} | {width} | {pruned.get(layer, 0)} |" for layer, width in dense.items()]
        try:
            self._open().add_text("widths", "\n".join(["| layer | dense | pruned |", "|---|---|---|", *rows]))
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Nothing is logged any more; what was is in the folder."""
        if self._writer:
            with suppress(OSError):  # all that was logged has been flushed
                self._writer.close()
        self._writer, self._logged = None, 0

    def _log(self, points: Sequence[Mapping[str, Any]]) -> None:
        writer = self._open()
        for point in points:
            for name, value in point.items():
                if name != "step" and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, point["step"])
        writer.flush()

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        return self._writer

    def _give_up(self, error: OSError) -> None:
        say(f"{self._folder} can't be written now: {one_line(error)}")
        self.close()
