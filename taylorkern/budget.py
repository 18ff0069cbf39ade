"""Budgets: what a network costs as a function of the units it keeps, and which units go to meet a target."""

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
        axes = [coupling.axes.get((name, dim)) for dim in range(parameter.dim())]
        yield parameter.numel(), tuple(axis for axis in axes if axis is not None)


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

    def __init__(self, model: nn.Module, coupling: Coupling, of: str) -> None:
        if of not in MEASURES:
            raise ValueError(f"of={of!r} is not one of {', '.join(MEASURES)}")
        terms = list(MEASURES[of](model, coupling))
        vectors = [vector for _, vectors in terms for vector in vectors]
        units = len(coupling.units)
        self._sizes = torch.tensor([size for size, _ in terms], dtype=torch.float64)
        self._term = torch.tensor([i for i, (_, vectors) in enumerate(terms) for _ in vectors], dtype=torch.int64)
        self._lengths = torch.tensor([len(vector) for vector in vectors], dtype=torch.int64)
        self._ends = self._lengths.cumsum(0)
        # End to end; what belongs to no unit gets an entry of its own, which always stays.
        self._units = torch.cat([torch.zeros(0, dtype=torch.int64), *vectors]) % (units + 1)
        self.total = self(torch.ones(units, dtype=torch.bool))

    def __call__(self, kept: Tensor) -> float:
        """The cost where only units with ``kept`` [U] (bool) stay."""
        stays = torch.cat([kept, torch.ones(1, dtype=torch.bool)]).index_select(0, self._units)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), stays.cumsum(0)])  # how many stay up to each place
        fraction = (before[self._ends] - before[self._ends - self._lengths]).double() / self._lengths
        share = torch.ones_like(self._sizes).scatter_reduce_(0, self._term, fraction, "prod")
        return float((self._sizes * share).sum())


def removable(importance: Tensor, coupling: Coupling, min_channels: int) -> Tensor:
    """Units that may go, least important first: every layer keeps its ``min_channels`` most important channels.

    Infinitely important units stay. Ties go by unit index. Returns indices, int64.
    """
    order = torch.argsort(importance, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    stays = importance.isposinf()
    for vector in _distinct([*coupling.axes.values(), *coupling.layers.values()]):
        missing = min(min_channels, len(vector)) - int((vector < 0).sum())
        if missing > 0:
            units = vector[vector >= 0]
            stays[units[rank[units].topk(missing).indices]] = True
    return order[~stays[order]]


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


def _distinct(vectors: Iterable[Tensor]) -> list[Tensor]:
    return list({vector.numpy().tobytes(): vector for vector in vectors}.values())
