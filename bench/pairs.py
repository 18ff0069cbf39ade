"""Timing several ways of doing one thing: interleaved, each round in another order, and judged by paired ratios."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

Ways = dict[str, Callable[[], object]]
Times = dict[str, list[float]]
Timer = Callable[[Ways, int], Times]  # of ways and rounds; ``interleaved`` is one
Quartiles = dict[str, float]


class WrongError(AssertionError):
    """What was to be timed computes something else, so nothing was timed."""


class Rounds:
    """Seconds of each way in each round, in ``times``.

    A slow moment of the machine meets all ways of a round alike. Who runs after whom is drawn anew each time, for the
    one before leaves its mark on caches and allocator.
    """

    def __init__(self, ways: Ways) -> None:
        self.ways, self.shuffled = ways, random.Random(0)
        self.times: Times = {name: [] for name in ways}

    def draw(self) -> list[str]:
        """An order for one round."""
        return self.shuffled.sample(list(self.ways), len(self.ways))

    def run(self, order: Sequence[str]) -> None:
        for name in order:
            start = time.perf_counter()
            self.ways[name]()
            self.times[name].append(time.perf_counter() - start)


def interleaved(ways: Ways, rounds: int) -> Times:
    """Seconds of each way in each round."""
    all_rounds = Rounds(ways)
    for _ in range(rounds):
        all_rounds.run(all_rounds.draw())
    return all_rounds.times


def quartiles(values: list[float]) -> Quartiles:
    """The median and the quartiles around it, of three values or more; of three they are the outer ones."""
    return dict(zip(("p25", "median", "p75"), statistics.quantiles(values, n=4), strict=True))


def ratios(times: list[float], to: list[float]) -> list[float]:
    """Round by round, one way's time as a multiple of another's."""
    return [a / b for a, b in zip(times, to, strict=True)]


def geometric(values: Sequence[float]) -> float:
    """The geometric mean, which is the mean for ratios.

    >>> geometric([0.5, 2.0])
    1.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))
