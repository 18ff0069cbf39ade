"""Every operation in plain PyTorch: any device, dtype and strides. The other backends are tested against this one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import accumulator, masked


class Activation(NamedTuple):
    """act(z), and dL/dz from z and dy."""

    apply: Callable[[Tensor, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]


class Kinked(NamedTuple):
    """act(z) of straight lines: dL/dz is dy where ``passes(z)``, or a mask that keeps it, holds; else ``stopped(dy)``.

    At a kink that is torch's gradient; at a NaN relu and relu6 let it through.
    """

    apply: Callable[[Tensor, float], Tensor]
    passes: Callable[[Tensor], Tensor]
    stopped: Callable[[Tensor, float], Tensor]

    def gradient(self, z: Tensor, dy: Tensor, slope: float) -> Tensor:
        return self.masked(self.passes(z), dy, slope)

    def masked(self, mask: Tensor, dy: Tensor, slope: float) -> Tensor:
        return torch.where(mask, dy, self.stopped(dy, slope))


def _zero(dy: Tensor, slope: float) -> Tensor:
    return torch.zeros_like(dy)


def _silu_gradient(z: Tensor, dy: Tensor, slope: float) -> Tensor:
    share = torch.sigmoid(z)
    return dy * share * (1 + z * (1 - share))


def _hardswish_gradient(z: Tensor, dy: Tensor, slope: float) -> Tensor:
    return torch.where(z >= 3, dy, torch.where(z <= -3, 0, dy * (z / 3 + 0.5)))


KINKED = {
    "none": Kinked(lambda z, slope: z, lambda z: torch.ones_like(z, dtype=torch.bool), _zero),
    "relu": Kinked(lambda z, slope: torch.relu(z), lambda z: ~(z <= 0), _zero),
    "relu6": Kinked(lambda z, slope: F.relu6(z), lambda z: ~((z <= 0) | (z >= 6)), _zero),
    "leaky_relu": Kinked(lambda z, slope: F.leaky_relu(z, slope), lambda z: z > 0, lambda dy, slope: dy * slope),
}
ACTIVATIONS: dict[str, Activation | Kinked] = {
    **KINKED,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = x.to(accumulator(x.dtype))
    mean, var = _statistics(wide, running_mean, running_var, training)
    z = _affine(wide, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.to(z.dtype)
    wanted = masked(residual, activation)
    mask = _like(KINKED[activation].passes(z), x, torch.bool) if wanted else x.new_empty(0, dtype=torch.bool)
    return _like(ACTIVATIONS[activation].apply(z, slope), x), mean, var, mask


def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
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
    if mask is None:
        dz = ACTIVATIONS[activation].gradient(_affine(wide, weight, bias, mean, var, eps), dz, slope)
    else:
        kinked = KINKED[activation]
        dz = kinked.masked(mask if mask.dtype is torch.bool else kinked.passes(mask), dz, slope)
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


def accumulate(totals: Sequence[Tensor], more: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    values = torch.cat([t.flatten() for t in more])
    # Nought times anything is nought, but for what is not finite: half a pass, where isfinite() takes four.
    finite = (values * 0).sum() == 0
    kept = torch.where(finite, values, 0.0).split([t.numel() for t in more])
    return [total + added.view_as(total) for total, added in zip(totals, kept, strict=True)], finite.long()


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


def _like(t: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """t in x's memory layout and dtype, or another, never t itself."""
    return torch.empty_like(x, dtype=dtype).copy_(t)
