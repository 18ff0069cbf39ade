"""Shapes, layouts and tensors that every backend is tested on, and the measure they are compared by."""

import torch
from torch import Tensor

# [N, C, *S]: odd sizes, one of everything, a vector's width more or less, and each number of spatial dimensions.
SHAPES = [
    (2, 3, 5, 7),
    (1, 1, 1, 1),
    (1, 17, 9, 9),
    (3, 1, 4, 4),
    (5, 33, 1, 1),
    (2, 64, 8, 8),
    (4, 31, 13, 3),
    (2, 16, 33, 31),
    (7, 5),
    (3, 9, 11),
    (2, 6, 3, 5, 4),
]
LAYOUTS = ["contiguous", "channels_last"]


def in_layout(t: Tensor, layout: str) -> Tensor:
    """``t`` [N, C, *S] with its channels innermost for "channels_last", whatever the number of dimensions."""
    if layout == "contiguous":
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return in_layout(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layout)


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative distance in norm; infinite where anything is NaN."""
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).norm() / expected.norm().clamp_min(1e-300)
    return float(error.nan_to_num(torch.inf))
