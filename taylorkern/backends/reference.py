"""Every operation in plain PyTorch: any device, dtype and strides. The other backends are tested against this one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import accumulator


class Activation(NamedTuple):
    """act(z), and dL/dz from z (or y, see ``ops.reads_output``) and dy. A NaN lets a gradient through, as in torch."""

    apply: Callable[[Tensor, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]


def _silu_gradient(z: Tensor, dy: Tensor, slope: float) -> Tensor:
    share = torch.sigmoid(z)
    return dy * share * (1 + z * (1 - share))


def _hardswish_gradient(z: Tensor, dy: Tensor, slope: float) -> Tensor:
    return torch.where(z >= 3, dy, torch.where(z <= -3, 0, dy * (z / 3 + 0.5)))


ACTIVATIONS = {
    "none": Activation(lambda z, slope: z, lambda z, dy, slope: dy),
    "relu": Activation(lambda z, slope: torch.relu(z), lambda z, dy, slope: torch.where(z <= 0, 0, dy)),
    "relu6": Activation(lambda z, slope: F.relu6(z), lambda z, dy, slope: torch.where((z <= 0) | (z >= 6), 0, dy)),
    "leaky_relu": Activation(
        lambda z, slope: F.leaky_relu(z, slope), lambda z, dy, slope: torch.where(z > 0, dy, dy * slope)
    ),
    "silu": Activation(lambda z, slope: F.silu(z), _silu_gradient),
    "hardswish": Activation(lambda z, slope: F.hardswish(z), _hardswish_gradient),
}


def supports(operation: str, tensor: Tensor) -> bool:
    return True


def channel_scores(a: Tensor, g: Tensor) -> Tensor:
    acc = accumulator(a.dtype)
    return (a.to(acc) * g.to(acc)).flatten(2).sum(2) if a.dim() > 2 else a.to(acc) * g.to(acc)


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(accumulator(x.dtype))
    mean, var = _statistics(wide, running_mean, running_var, training)
    z = _affine(wide, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return _like(ACTIVATIONS[activation].apply(z, slope), x), mean, var


def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    activation: str,
    slope: float,
    residual_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    wide, dz = x.to(acc), dy.to(acc)
    xhat = (wide - _column(mean, x)) * _column(torch.rsqrt(var + eps), x)
    z = _affine(wide, weight, bias, mean, var, eps) if y is None else y.to(acc)
    dz = ACTIVATIONS[activation].gradient(z, dz, slope)
    A, B = _spatial_sum(xhat * dz), _spatial_sum(dz)  # [N, C]
    dweight, dbias = A.sum(0), B.sum(0)
    s = _scale(weight, A) * A + (0 if bias is None else bias.to(acc) * B)
    dx = dz
    if training:
        count = max(x.numel() // max(x.shape[1], 1), 1)
        dx = dz - (_column(dbias, x) + xhat * _column(dweight, x)) / count
    dx = dx * _column(_scale(weight, var) * torch.rsqrt(var + eps), x)
    return _like(dx, x), _like(dz, x) if residual_grad else x.new_empty(0), dweight, dbias, s


def follow(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbias: float
) -> None:
    running_mean.data.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.data.lerp_((var * unbias).to(running_var.dtype), momentum)


def _statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    if training and x.numel() == 0:
        return x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var
    assert running_mean is not None and running_var is not None  # ops.batch_norm_act has refused this
    return running_mean.to(x.dtype, copy=True), running_var.to(x.dtype, copy=True)


def _column(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    # Subtracting first keeps the digits that x·scale + (bias - mean·scale) would cancel.
    z = (x - _column(mean, x)) * _column(_scale(weight, var) * torch.rsqrt(var + eps), x)
    return z if bias is None else z + _column(bias.to(z.dtype), z)


def _scale(weight: Tensor | None, like: Tensor) -> Tensor:
    return like.new_ones(()) if weight is None else weight.to(like.dtype)


def _spatial_sum(t: Tensor) -> Tensor:
    return t.flatten(2).sum(2) if t.dim() > 2 else t.clone()


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t in x's dtype and memory layout, never t itself."""
    return torch.empty_like(x).copy_(t)
