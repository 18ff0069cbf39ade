"""The ICLR 2017 criterion's statistic: mean abs(a·dL/da) per layer and unit, which no sum over positions can give."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .coupling import Coupling
from .folding import Folding


class OutputShares:
    """Mean over n and S of abs(a·dL/da), summed over a unit's channels in each of ``layers``."""

    def __init__(self, layers: list[str]) -> None:
        self._column = {layer: i for i, layer in enumerate(layers)}
        self._coupling: Coupling | None = None
        self._foldings: dict[tuple[tuple[str, ...], torch.device], Folding] = {}

    def __call__(self, arrived: Mapping[str, list[Tensor]], coupling: Coupling, device: torch.device) -> Tensor:
        """[U, layers] in float64, on ``device``.

        ``arrived`` holds a·dL/da [N, C, *S] by layer, the gradients of gates that have an element for every one of a's.
        """
        if coupling is not self._coupling:
            self._coupling = coupling
            self._foldings.clear()
        shape = len(coupling.units), len(self._column)
        shares = torch.zeros(shape, dtype=torch.float64, device=device)
        for turn in range(max(map(len, arrived.values()), default=0)):  # a layer that runs several times has several
            layers = tuple(layer for layer in self._column if len(arrived.get(layer, ())) > turn)
            means = torch.cat([_mean(arrived[layer][turn]).to(device) for layer in layers])
            sums, _ = self._folding(coupling, layers, device)(means.unsqueeze(0))
            shares += sums.view(shape)
        return shares

    def _folding(self, coupling: Coupling, layers: tuple[str, ...], device: torch.device) -> Folding:
        if (layers, device) not in self._foldings:
            cells = [_cells(coupling.layers[layer], self._column[layer], len(self._column)) for layer in layers]
            size = len(coupling.units) * len(self._column)
            self._foldings[layers, device] = Folding(torch.cat(cells), size, device)
        return self._foldings[layers, device]


def _cells(units: Tensor, column: int, columns: int) -> Tensor:
    return torch.where(units < 0, -1, units * columns + column)


def _mean(product: Tensor) -> Tensor:
    """Over all but the channels: [C]."""
    return product.abs().mean([d for d in range(product.dim()) if d != 1])
