"""Selection: which units go to meet a budget, by an importance of each or by the curvature of all."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from . import budget, surgeon
from .coupling import Coupling
from .criteria import CRITERIA, criterion
from .living import Judged
from .shrinking import Shrinking
from .tally import FROM_CURVATURE

SURGEON = "surgeon"


@dataclass(frozen=True)
class Limits:
    """Remove until ``meter`` reads ``goal`` or less, ``most`` units at most, each layer keeping ``min_channels``."""

    meter: budget.Meter
    goal: float
    min_channels: int
    most: int | None = None


class Selection(Protocol):
    """Chooses round after round; ``smoothed`` [L] is what it remembers of the rounds before, if anything."""

    smoothed: Tensor | None

    def choose(self, judged: Judged, limits: Limits) -> Tensor:
        """Indices of the units that have to go, in that order."""

    def follow(self, kept: Tensor) -> None:
        """The choice was carried out, and of its units the ``kept`` ones (indices) are left."""


class ByImportance:
    """The least important units by a criterion, whose importances are smoothed over rounds by ``momentum``."""

    def __init__(self, name: str, momentum: float = 0.0) -> None:
        criterion(name)
        self._name, self._momentum = name, momentum
        self.smoothed: Tensor | None = None
        self._latest: Tensor | None = None

    def choose(self, judged: Judged, limits: Limits) -> Tensor:
        importance = judged.importance(self._name)
        if self._momentum and self.smoothed is not None:
            importance = self._momentum * self.smoothed + (1 - self._momentum) * importance
        self._latest = importance
        return ranked(importance, judged.coupling, limits)

    def follow(self, kept: Tensor) -> None:
        self.smoothed = None if self._latest is None else self._latest[kept]


class BySurgeon:
    """The set that costs least to remove with the others making up for it, see ``taylorkern.surgeon``."""

    smoothed: Tensor | None = None

    def __init__(self, damping: float, cost_power: float) -> None:
        self._damping, self._cost_power = damping, cost_power

    def choose(self, judged: Judged, limits: Limits) -> Tensor:
        remaining = Shrinking(judged.coupling, limits.meter, limits.goal, limits.most, limits.min_channels)
        return surgeon.choose(judged.gram(), remaining, self._damping, self._cost_power)

    def follow(self, kept: Tensor) -> None:
        """Every round stands by itself."""


def selection(
    name: str, momentum: float = 0.0, damping: float = surgeon.DAMPING, cost_power: float = surgeon.COST_POWER
) -> Selection:
    """The one called ``name``: a criterion or "surgeon". Raises ValueError for another, or one that can't be smoothed.

    >>> type(selection("surgeon")).__name__
    'BySurgeon'
    """
    surgeon.check(damping, cost_power=cost_power)
    if name != SURGEON and name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}; known are {', '.join([*CRITERIA, SURGEON])}")
    if name == SURGEON and momentum:
        raise ValueError(
            f"momentum={momentum} smooths importances over rounds, and the surgeon has none: leave it at 0"
        )
    return BySurgeon(damping, cost_power) if name == SURGEON else ByImportance(name, momentum)


def asks_for_curvature(name: str) -> bool:
    """Whether ``Scores.curvature`` is needed for the one called ``name``, or makes it better.

    >>> asks_for_curvature("surgeon"), asks_for_curvature("obd"), asks_for_curvature("taylor_fo")
    (True, True, False)
    """
    return name == SURGEON or bool(set(criterion(name).needs) & set(FROM_CURVATURE))


def ranked(importance: Tensor, coupling: Coupling, limits: Limits) -> Tensor:
    """The least important units [U] that have to go, indices in that order."""
    order = budget.removable(importance, coupling, limits.min_channels)
    return budget.select(order, len(importance), limits.meter, limits.goal, limits.most)
