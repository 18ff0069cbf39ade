"""What was measured when all was well, and what is said about figures that have moved away from it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taylorkern import files

UPDATE = "`make guard-update` (python -m bench.guard --update)"


class NotRunError(RuntimeError):
    """A check that this machine can't make; the message says why and what to do."""


@dataclass(frozen=True)
class Rule:
    """How far a figure may move: ``margin`` as a part of the baseline, upwards or, with ``both``, either way."""

    unit: str
    margin: float
    both: bool

    def complaints(self, measured: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, str]:
        """What is wrong with each figure that is out of bounds or has no counterpart, by its name.

        >>> list(Rule("of eager", 0.1, both=False).complaints({"a": 0.5, "b": 0.6}, {"a": 0.6, "b": 0.5}))
        ['b']
        """
        names = sorted({*measured, *baseline})
        found = {name: self._complaint(name, measured.get(name), baseline.get(name)) for name in names}
        return {name: complaint for name, complaint in found.items() if complaint}

    def _complaint(self, name: str, value: float | None, want: float | None) -> str | None:
        if value is None:
            return f"{name}: has a baseline, but is not measured any more"
        if want is None:
            return f"{name}: has no baseline"
        moved = value / want - 1
        figures = f"{name}: {value:.4g} {self.unit}, {moved:+.1%} from the baseline's {want:.4g}"
        if not moved <= self.margin:
            return f"{figures}: more than the {self.margin:.0%} that are allowed"
        if self.both and moved < -self.margin:
            return f"{figures}: better than what is recorded, so a later loss could hide there"
        return None


def read(path: Path) -> dict[str, Any]:
    """The recorded figures, with what they were recorded under; nothing where there is no file yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, content: Mapping[str, Any]) -> None:
    files.replace(path, (json.dumps(content, indent=1) + "\n").encode())
