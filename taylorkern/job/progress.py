"""What a run tells on stderr: a bar per phase, files that were left out, and warnings."""

import sys
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

NAMED = 5  # unreadable files that are spelled out


class Progress:
    """A bar for one phase: the rate, loss, accuracy, channels left and time to go; as a context it ends with it."""

    def __init__(self, phase: str, steps: int, done: int) -> None:
        self._bar = tqdm(
            total=steps, initial=min(done, steps), desc=phase, unit="step", file=sys.stderr, mininterval=0.5,
            disable=not steps,
        )  # fmt: skip
        self._told: dict[str, str] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def step(self, loss: float | None) -> None:
        """One step is done."""
        if self._bar.total is not None and self._bar.n >= self._bar.total:
            self._bar.total = self._bar.n + 1
        if loss is not None:
            self._told["loss"] = f"{loss:.3f}"
            self._bar.set_postfix(self._told, refresh=False)
        self._bar.update()

    def part(self, done: float) -> None:
        """About so much of the phase is done, of 1; the steps that it takes are reckoned anew."""
        if done > 0 and self._bar.total is not None:
            self._bar.total = max(self._bar.n, round(self._bar.n / min(done, 1.0)))
            self._bar.refresh()

    def point(self, point: Mapping[str, float]) -> None:
        """Something was measured."""
        self._told |= {"accuracy": f"{point['accuracy']:.1%}", "channels": f"{point['channels']:,}"}
        self._told |= {"FLOPs": f"{point['flops_kept']:.0%}"}
        self._bar.set_postfix(self._told)


def say(text: str) -> None:
    """One line on stderr, beside a bar."""
    tqdm.write(f"taylorkern: {text}", file=sys.stderr)


def say_skipped(file: str, why: str, before: int) -> None:
    """That ``file`` was left out, after ``before`` others; the first few are spelled out."""
    if before < NAMED:
        say(f"left out {file}: {why}")
    elif before == NAMED:
        say("further files are left out as well; summary.json names them all")
