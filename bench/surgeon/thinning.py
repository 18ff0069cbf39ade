"""A network behind gates that loses units round by round: what the cut and folded one computes, with nothing cut."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import taylorkern as tk
from bench.study.removal import accuracy, lowest, masked
from bench.study.scoring import Batches, accumulate
from bench.study.training import fixed_batches
from taylorkern.budget import Meter
from taylorkern.demo.data import Digits
from taylorkern.gram import Block
from taylorkern.shrinking import Shrinking
from taylorkern.surgeon import choose, shift

from .plan import Plan
from .repairs import REPAIRS, Calibration, repair
from .ways import Way

Curve = dict[str, list[float]]


class UnjudgedError(ValueError):
    """The criterion can't judge a unit of the pool."""


class Thinning:
    """``model``, its Scores with a matrix over all units, and the gates z [U], 0 for units that have gone."""

    def __init__(self, model: nn.Module, plan: Plan, data: Digits, seed: int) -> None:
        self.plan, self.data, self.seed = plan, data, seed
        self.batches = fixed_batches(data, plan.minibatches, plan.size, seed)
        self.model = tk.convert(copy.deepcopy(model))
        self.scores = tk.Scores(self.model, self.batches[0][0][:1], gram="full", seed=seed)
        self.coupling = self.scores.coupling
        self.flops = Meter(self.model, self.coupling, "flops")
        self.gates = torch.ones(len(self.scores.units))
        self._calibration = Calibration(self.model, self.coupling, [images for images, _ in self.batches])

    @property
    def stays(self) -> Tensor:
        """[U] bool."""
        return self.gates != 0

    def restore(self) -> None:
        """Have the dense network again."""
        self.gates.fill_(1)
        self._calibration.take_back()

    def curve(self, way: Way, pool: Tensor, fractions: Sequence[float], step: float) -> Curve | None:
        """Accuracy and the part of the FLOPs gone, with each of ``fractions`` of ``pool`` gone in rounds of ``step``.

        None for a criterion that can't judge this network.
        """
        found: dict[float, tuple[float, float]] = {}
        try:
            for chain in chains(fractions, step):
                self.restore()
                for done, fraction in enumerate(chain, start=1):
                    self.remove(way, pool, fraction, round_=done)
                    if fraction in fractions:
                        found[fraction] = self.measured()
        except UnjudgedError:
            return None
        return {"accuracy": [found[f][0] for f in fractions], "flops": [found[f][1] for f in fractions]}

    def measured(self) -> tuple[float, float]:
        """Held-out accuracy, and the part of the FLOPs that is gone."""
        with masked(self.model, self.coupling.layers, self.gates):
            reached = accuracy(self.model, self.data)
        return reached, 1 - self.flops(self.stays) / self.flops.total

    def remove(self, way: Way, pool: Tensor, fraction: float, round_: int = 1) -> None:
        """Have ``fraction`` of ``pool`` gone, by new scores of what is there, and make up for what goes now."""
        self.score(way, round_)
        here = self.stays.nonzero().flatten()
        gone = self.chosen(way, pool, round(fraction * len(pool)) - int((~self.stays[pool]).sum()))
        if way.shifts:
            d = shift(self.among(way), torch.searchsorted(here, gone), way.damping, way.bound)
            self.gates[here] *= (1 + d).float()
        self.gates[gone] = 0
        if way.repair in REPAIRS:
            repair(way.repair, self.model, self.coupling, self.gates, self._calibration)

    def score(self, way: Way, round_: int) -> None:
        """Statistics of the network as it is now, on the minibatches that ``way`` takes."""
        if way.of_data:
            with masked(self.model, self.coupling.layers, self.gates):
                accumulate(self.scores, self._batches(way), way.method, self.seed + round_, way.draws)

    def chosen(self, way: Way, pool: Tensor, count: int) -> Tensor:
        """The ``count`` units of ``pool`` that go next, ascending; no layer loses its last."""
        if way.criterion != "surgeon":
            importance = self.scores.importance(way.criterion)
            if not importance[pool].isfinite().all():
                raise UnjudgedError(way.criterion)
            return lowest(importance, pool, count, self.coupling, ~self.stays).sort().values
        here = self.stays.nonzero().flatten()
        coupling = self.coupling.keep(here)
        remaining = Shrinking(coupling, Meter(self.model, coupling, "channels"), goal=0, most=count)
        remaining.allowed &= torch.isin(here, pool)
        return here[choose(self.among(way), remaining, way.damping)].sort().values

    def among(self, way: Way) -> list[Block]:
        """The matrix over the units that stay, numbered anew from 0, as it is where the others are cut."""
        number = torch.cumsum(self.stays, 0) - 1
        kept = [(block, self.stays[block.units].nonzero().flatten()) for block in self.scores.gram(way.form)]
        return [Block(number[block.units[rows]], block.matrix[rows][:, rows]) for block, rows in kept if len(rows)]

    def _batches(self, way: Way) -> Batches:
        if way.samples is None:
            return self.batches
        size = min(way.samples, self.plan.size)
        return fixed_batches(self.data, -(-way.samples // size), size, self.seed)


def chains(fractions: Sequence[float], step: float) -> list[tuple[float, ...]]:
    """The rounds of at most ``step`` that lead to each of ``fractions``; one chain for all that are whole steps.

    >>> chains((0.2, 0.3), 0.1), chains((0.3, 0.4), 0.2), chains((0.3, 0.4), 1.0)
    ([(0.1, 0.2, 0.3)], [(0.2, 0.4), (0.2, 0.3)], [(0.4,), (0.3,)])
    """
    found: list[tuple[float, ...]] = []
    for fraction in sorted(fractions, reverse=True):
        whole = tuple(round(step * i, 9) for i in range(1, int(fraction / step + 1e-9) + 1))
        chain = whole if whole[-1:] == (fraction,) else (*whole, fraction)
        if not any(longer[: len(chain)] == chain for longer in found):
            found.append(chain)
    return found
