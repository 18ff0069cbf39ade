"""One piece of the check at work: its device, its time, and what it has found so far, kept in a file."""

import json
import time
from pathlib import Path
from typing import Any

from bench.gpu.device import Device
from taylorkern import files


class FoundError(AssertionError):
    """A piece has found what must not be; what it has told is kept."""


class Task:
    """What a piece gets. Everything told is in the file at once, for a piece may be ended at any time."""

    def __init__(self, device: Device, quick: bool, seconds: float, path: Path) -> None:
        self.device, self.quick, self.path = device, quick, path
        self.until = time.monotonic() + seconds
        self.found: dict[str, Any] = {}

    def tell(self, **facts: Any) -> None:
        self.found |= facts
        files.replace(self.path, json.dumps(self.found).encode())

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.tell(rows=[*self.found.get("rows", []), *rows])

    def leave(self, what: str) -> None:
        """Tell that ``what`` was left out, for want of time."""
        self.tell(left=[*self.found.get("left", []), what])

    def overdue(self) -> bool:
        return time.monotonic() > self.until

    def remaining(self) -> float:
        return max(0.0, self.until - time.monotonic())
