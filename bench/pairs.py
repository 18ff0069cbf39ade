"""Timing several ways of doing one thing: interleaved, each round in another order, and judged by paired ratios."""

import random
import statistics
import time
from collections.abc import Callable


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round.

    A slow moment of the machine meets all ways of a round alike. Who runs after whom is drawn anew each time, for the
    one before leaves its mark on caches and allocator.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name, run in shuffled.sample(list(ways.items()), len(ways)):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    """The median and the quartiles around it, of two values or more."""
    return dict(zip(("p25", "median", "p75"), statistics.quantiles(values, n=4), strict=True))


def ratios(times: list[float], to: list[float]) -> list[float]:
    """Round by round, one way's time as a multiple of another's."""
    return [a / b for a, b in zip(times, to, strict=True)]
