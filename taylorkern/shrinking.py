"""Shrinking: a network that loses unit after unit, what may still go, and what that would save."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .budget import Meter, widths
from .coupling import Coupling


class Countdown:
    """``count`` removals among the units in ``allowed`` [U] (bool), each of which saves the same.

    >>> left = Countdown(torch.tensor([True, False, True]), 1)
    >>> left.remove(2)
    >>> left.done, left.allowed.tolist(), left.saving.tolist()
    (True, [True, False, False], [1.0, 1.0, 1.0])
    """

    def __init__(self, allowed: Tensor, count: int) -> None:
        self.allowed, self._count = allowed.clone(), count
        self.saving = torch.ones(len(allowed), dtype=torch.float64)

    @property
    def done(self) -> bool:
        return self._count <= 0

    def remove(self, unit: int) -> None:
        self.allowed[unit] = False
        self._count -= 1


class Shrinking:
    """Removals until ``meter``'s cost is at ``goal`` or below, or ``most`` units have gone.

    Every dimension and every layer's output keeps at least ``min_channels`` of its channels. ``saving`` [U] is what
    each unit costs where the others are as they are now, to first order: a convolution between two shrinking layers
    saves less and less per channel.
    """

    def __init__(
        self, coupling: Coupling, meter: Meter, goal: float, most: int | None = None, min_channels: int = 1
    ) -> None:
        units = len(coupling.units)
        self._meter, self._goal, self._most = meter, goal, units if most is None else most
        self._costs = _Incidence(meter.vectors, units)
        self._widths = _Incidence(widths(coupling), units)
        self._least = self._widths.lengths.clamp(max=min_channels)
        self.allowed = torch.ones(units, dtype=torch.bool)
        for vector in range(len(self._least)):
            self._protect(vector)
        self._price()

    @property
    def done(self) -> bool:
        return self._most <= 0 or self._cost <= self._goal

    def remove(self, unit: int) -> None:
        """Take ``unit`` away."""
        self.allowed[unit] = False
        self._most -= 1
        self._costs.remove(unit)
        for vector in self._widths.remove(unit):
            self._protect(vector)
        self._price()

    def _price(self) -> None:
        self._cost = self._meter.cost(self._costs.counts)
        self.saving = self._costs.per_unit(self._meter.slope(self._costs.counts))

    def _protect(self, vector: int) -> None:
        """Units without which ``vector`` would be too narrow stay."""
        units, times = self._widths.of_vector(vector)
        self.allowed[units[self._widths.counts[vector] - times < self._least[vector]]] = False


class _Incidence:
    """How often each unit is in each of some vectors of units, as pairs; ``counts`` [V] is how many indices stay."""

    def __init__(self, vectors: Sequence[Tensor], units: int) -> None:
        self.lengths = torch.tensor([len(vector) for vector in vectors], dtype=torch.int64)
        self.counts, self._width = self.lengths.clone(), units
        found = [vector[vector >= 0].unique(return_counts=True) for vector in vectors]
        none = torch.zeros(0, dtype=torch.int64)
        self._of_vector = found
        self._units = torch.cat([none, *(units_here for units_here, _ in found)])
        self._times = torch.cat([none, *(times for _, times in found)])
        sizes = torch.tensor([len(units_here) for units_here, _ in found], dtype=torch.int64)
        self._vectors = torch.repeat_interleave(torch.arange(len(found)), sizes)
        self._order = self._units.argsort(stable=True)  # the pairs of each unit together
        self._starts = torch.searchsorted(self._units[self._order], torch.arange(units + 1)).tolist()

    def of_vector(self, vector: int) -> tuple[Tensor, Tensor]:
        """The units in ``vector``, and how often each."""
        return self._of_vector[vector]

    def remove(self, unit: int) -> list[int]:
        """Take ``unit`` out of every vector; returns those that it was in."""
        pairs = self._order[self._starts[unit] : self._starts[unit + 1]]
        vectors = self._vectors[pairs]
        self.counts[vectors] -= self._times[pairs]
        return vectors.tolist()

    def per_unit(self, values: Tensor) -> Tensor:
        """Σ over vectors of ``values`` [V] times how often each unit is there, [U] float64."""
        products = values.index_select(0, self._vectors) * self._times
        return torch.zeros(self._width, dtype=torch.float64).index_add_(0, self._units, products)
