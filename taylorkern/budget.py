"""Budgets: what a network costs as a function of the units it keeps, and which units go to meet a target."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .coupling import Coupling

# One term of a cost: its size with every unit there, and the unit vectors it is proportional to the kept part of.
Term = tuple[float, tuple[Tensor, ...]]


def _flops(model: nn.Module, coupling: Coupling) -> Iterable[Term]:
    return [(cost.flops, cost.vectors) for cost in coupling.costs]


def _params(model: nn.Module, coupling: Coupling) -> Iterable[Term]:
    for name, parameter in model.named_parameters():
        axes = {dim: coupling.axes[name, dim] for dim in range(parameter.dim()) if (name, dim) in coupling.axes}
        # The coupling's sizes, not the model's: where units are masked, these still count them.
        sizes = (len(axes[dim]) if dim in axes else size for dim, size in enumerate(parameter.shape))
        yield math.prod(sizes), tuple(axes.values())


def _channels(model: nn.Module, coupling: Coupling) -> Iterable[Term]:
    units = len(coupling.units)
    return [(units, (torch.arange(units),))]


MEASURES: dict[str, Callable[[nn.Module, Coupling], Iterable[Term]]] = {
    "flops": _flops,
    "params": _params,
    "channels": _channels,
}


class Meter:
    """Cost of a network in ``of`` ("flops", "params" or "channels"), for any choice of kept units.

    FLOPs count every convolution and matrix product of one run on the example inputs, as
    ``torch.utils.flop_counter`` does; channels are prunable units.
    """

    @torch.inference_mode(False)  # for the slope
    def __init__(self, model: nn.Module, coupling: Coupling, of: str) -> None:
        if of not in MEASURES:
            raise ValueError(f"of={of!r} is not one of {', '.join(MEASURES)}")
        terms = list(MEASURES[of](model, coupling))
        self.vectors = distinct(vector for _, vectors in terms for vector in vectors)
        number = {vector.numpy().tobytes(): i for i, vector in enumerate(self.vectors)}
        units = len(coupling.units)
        self._sizes = torch.tensor([size for size, _ in terms], dtype=torch.float64)
        pairs = [(i, number[vector.numpy().tobytes()]) for i, (_, vectors) in enumerate(terms) for vector in vectors]
        self._term, self._vector = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        self._lengths = torch.tensor([len(vector) for vector in self.vectors], dtype=torch.int64)
        self._ends = self._lengths.cumsum(0)
        # End to end; what belongs to no unit gets an entry of its own, which always stays.
        self._units = torch.cat([torch.zeros(0, dtype=torch.int64), *self.vectors]) % (units + 1)
        self.total = self(torch.ones(units, dtype=torch.bool))

    def __call__(self, kept: Tensor) -> float:
        """The cost where only units with ``kept`` [U] (bool) stay."""
        stays = torch.cat([kept, torch.ones(1, dtype=torch.bool)]).index_select(0, self._units)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), stays.cumsum(0)])  # how many stay up to each place
        return self.cost(before[self._ends] - before[self._ends - self._lengths])

    def cost(self, counts: Tensor) -> float:
        """The cost where so many indices of each of ``vectors`` stay, [V] int64."""
        return float(self._cost(counts.double()))

    def slope(self, counts: Tensor) -> Tensor:
        """∂cost/∂counts [V]: what one index of each of ``vectors`` costs more or less, to first order."""
        with torch.inference_mode(False), torch.enable_grad():
            parts = counts.clone().double().requires_grad_()
            (slope,) = torch.autograd.grad(self._cost(parts), parts)
        return slope

    def _cost(self, counts: Tensor) -> Tensor:
        fraction = (counts / self._lengths).index_select(0, self._vector)
        return (self._sizes * torch.ones_like(self._sizes).scatter_reduce(0, self._term, fraction, "prod")).sum()


def removable(importance: Tensor, coupling: Coupling, min_channels: int) -> Tensor:
    """Units that may go, least important first: every layer keeps its ``min_channels`` most important channels.

    Infinitely important units stay. Ties go by unit index. Returns indices, int64.
    """
    order = torch.argsort(importance, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    stays = importance.isposinf()
    for vector in widths(coupling):
        missing = min(min_channels, len(vector)) - int((vector < 0).sum())
        if missing > 0:
            units = vector[vector >= 0]
            stays[units[rank[units].topk(missing).indices]] = True
    return order[~stays[order]]


def widths(coupling: Coupling) -> list[Tensor]:
    """What must not become too narrow: the units of every dimension of a tensor and of every layer's output."""
    return distinct([*coupling.axes.values(), *coupling.layers.values()])


def select(order: Tensor, units: int, meter: Meter, goal: float, most: int | None = None) -> Tensor:
    """The shortest beginning of ``order`` whose removal brings the cost down to ``goal``, ``most`` units at most.

    Where even removing all of ``order`` does not reach the goal, all of it (up to ``most``) is returned.
    """

    def cost(count: int) -> float:
        kept = torch.ones(units, dtype=torch.bool)
        kept[order[:count]] = False
        return meter(kept)

    low, high = 0, len(order) if most is None else min(most, len(order))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= goal else (middle + 1, high)
    return order[:low]


def distinct(vectors: Iterable[Tensor]) -> list[Tensor]:
    """Each of ``vectors`` once, in the order of their first appearance."""
    return list({vector.numpy().tobytes(): vector for vector in vectors}.values())
