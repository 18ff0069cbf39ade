"""Slices: a tensor at the indices of its dimensions that stay, or nought at those that do not."""

from collections.abc import Mapping

import torch
from torch import Tensor

Indices = Mapping[int, Tensor]  # dim → indices along it, int64


def sliced(tensor: Tensor, keep: Indices) -> Tensor:
    """``tensor`` at the kept indices, in a tensor of its own with the same order of strides.

    >>> sliced(torch.arange(6).view(2, 3), {1: torch.tensor([0, 2])})
    tensor([[0, 2],
            [3, 5]])
    """
    new = tensor.detach()
    for dim, indices in keep.items():
        new = new.index_select(dim, indices.to(tensor.device))
    if new.layout != torch.strided:  # the gradient of a sparse embedding
        return new.clone() if new is tensor else new
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return new.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])


def clear_(tensor: Tensor, zeros: Indices) -> None:
    """Nought in ``tensor`` itself at every index in ``zeros``, whatever the other dimensions'.

    >>> weight = torch.ones(2, 3)
    >>> clear_(weight, {0: torch.tensor([1]), 1: torch.tensor([2])}); weight
    tensor([[1., 1., 0.],
            [0., 0., 0.]])
    """
    with torch.no_grad():
        for dim, indices in zeros.items():
            tensor.index_fill_(dim, indices.to(tensor.device), 0)
