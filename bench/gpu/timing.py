"""Rounds of ways timed on a device, and calls that take turns over several sets of inputs."""

import itertools
import time
from collections.abc import Sequence
from math import ceil

from bench.gpu.device import Device, Run
from bench.pairs import Rounds, Times, Ways

SETS = 8  # of inputs, at most
LEAST = 3  # rounds, however little time there is: quartiles need as many


class Stamped(Rounds):
    """Rounds whose seconds are those between two stamps of the device, one before a call and one behind it.

    Each timed call follows an untimed one of the same way, so that the host is as far ahead of the device as it gets
    where such calls follow one another. ``launches`` are the seconds that the host took for the timed call.
    """

    def __init__(self, ways: Ways, device: Device) -> None:
        super().__init__(ways)
        self.device = device
        self.launches: Times = {name: [] for name in ways}

    def forget(self) -> None:
        for seconds in (*self.times.values(), *self.launches.values()):
            seconds.clear()

    def run(self, order: Sequence[str]) -> None:
        stamps = []
        for name in order:
            call = self.ways[name]
            call()
            start, began = self.device.stamp(), time.perf_counter()
            call()
            self.launches[name].append(time.perf_counter() - began)
            stamps.append((name, start, self.device.stamp()))
        self.device.synchronize()
        for name, start, end in stamps:
            self.times[name].append(self.device.between(start, end))


def stamped(ways: Ways, rounds: int, device: Device, until: float = float("inf")) -> Stamped:
    """``rounds`` rounds, or fewer where ``until`` (of ``time.monotonic``) comes first; three at least."""
    found = Stamped(ways, device)
    found.run(list(ways))  # what compiles, autotunes or allocates at the first call
    found.forget()
    for done in range(rounds):
        if done >= LEAST and time.monotonic() > until:
            break
        found.run(found.draw())
    return found


def sets_needed(held: int, cache: int) -> int:
    """How many sets of inputs of ``held`` bytes take turns, so that none is found in a cache of ``cache`` bytes.

    >>> sets_needed(400, 50), sets_needed(60, 50), sets_needed(1, 50)
    (1, 3, 8)
    """
    return 1 if held > 2 * cache else min(SETS, ceil(2 * cache / held) + 1)


def rotated(calls: Sequence[Run]) -> Run:
    """One of ``calls`` after the other.

    >>> run = rotated([lambda: "a", lambda: "b"])
    >>> run(), run(), run()
    ('a', 'b', 'a')
    """
    turns = itertools.cycle(calls)
    return lambda: next(turns)()
