"""The ICLR 2017 criterion's statistic: mean abs(a·dL/da) per layer and unit, which no sum over positions can give."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .coupling import Coupling
from .weights import per_unit


def output_shares(arrived: Mapping[str, list[Tensor]], layers: list[str], coupling: Coupling) -> Tensor:
    """Mean over n and S of abs(a·dL/da), summed over a unit's channels in each of ``layers``: [U, layers], float64.

    ``arrived`` holds a·dL/da [N, C, *S] by layer, the gradients of gates that have an element for every one of a's.
    """
    device = next((products[0].device for products in arrived.values()), None)
    shares = torch.zeros(len(coupling.units), len(layers), dtype=torch.float64, device=device)
    for i, layer in enumerate(layers):
        for product in arrived.get(layer, []):
            mean = product.abs().mean([d for d in range(product.dim()) if d != 1])  # [C]
            shares[:, i] += per_unit(mean, coupling.layers[layer], len(shares))
    return shares
