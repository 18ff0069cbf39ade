"""Where each layer's units stand among all units of the network."""

import torch
from torch import Tensor

from taylorkern.scores import Scores
from taylorkern.selection import SURGEON

_SINGLE = {SURGEON: "taylor_so"}  # a choice of whole sets has no number for a single unit


def ranking(criterion: str) -> str:
    """The criterion that ranks single units where ``criterion`` chooses: itself, but for the surgeon.

    >>> ranking("taylor_fo"), ranking("surgeon")
    ('taylor_fo', 'taylor_so')
    """
    return _SINGLE.get(criterion, criterion)


def importances(scores: Scores, criterion: str) -> dict[str, list[float]]:
    """Each layer's importances, in the network's order; a unit of several layers counts in each of them.

    Raises what ``scores.importance`` raises.
    """
    return _shared(scores, scores.importance(ranking(criterion)))


def by_layer(scores: Scores, criterion: str) -> dict[str, list[float]]:
    """As :func:`importances`, but ranks among all units: 0 is the least important of them, 1 the most.

    Units that are equally important share the mean of their ranks. Raises what ``scores.importance`` raises.

    >>> import taylorkern as tk
    >>> net = tk.convert(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1, bias=False), torch.nn.Conv2d(3, 1, 1)))
    >>> _ = net[0].weight.data.copy_(torch.tensor([2.0, 1.0, 3.0]).reshape(3, 1, 1, 1))
    >>> by_layer(tk.Scores(net, torch.ones(1, 1, 2, 2)), "magnitude")
    {'0': [0.5, 0.0, 1.0]}
    """
    return _shared(scores, _ranks(scores.importance(ranking(criterion))))


def _shared(scores: Scores, values: Tensor) -> dict[str, list[float]]:
    layers: dict[str, list[float]] = {name: [] for name, _ in scores.model.named_modules()}
    for unit, value in zip(scores.units, values.tolist(), strict=True):
        for layer in dict.fromkeys(layer for layer, _ in unit.places):
            layers[layer].append(value)
    return {layer: inside for layer, inside in layers.items() if inside}


def _ranks(importance: Tensor) -> Tensor:
    """Ranks [U] from 0 to 1 of ``importance`` [U]; a unit that is alone is the most important one."""
    _, group, sizes = torch.unique(importance.double(), return_inverse=True, return_counts=True)
    last = sizes.cumsum(0) - 1
    middle = (last - (sizes - 1) / 2)[group]
    others = len(importance) - 1
    return middle / others if others else torch.ones_like(middle)
