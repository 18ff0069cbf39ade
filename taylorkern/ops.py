"""The operations: schemas, shapes and the mathematics. Implementations live in ``taylorkern.backends``.

Notation: N samples, C channels, ``*S`` zero to three spatial dimensions; *acc* is float64 for float64 inputs and
float32 otherwise. Every operation is functional (no argument is written, no output aliases an input) and
deterministic: the same inputs give the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish")

# What serves each operation; ``taylorkern.backends`` fills it in.
IMPLEMENTATIONS: dict[str, Callable] = {}

library = torch.library.Library("taylorkern", "DEF")
library.define("channel_scores(Tensor a, Tensor g) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.define(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, bool training, float eps, str activation, float slope) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "bool training, float eps, str activation, float slope, bool residual_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower.

    >>> accumulator(torch.bfloat16)
    torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def channel_scores(a: Tensor, g: Tensor) -> Tensor:
    """Gate gradient of a channel: s[n, c] = sum over S of a[n, c, s] · g[n, c, s].

    ``a`` is a layer's output and ``g`` the loss gradient at it, both [N, C, *S] of one dtype, in any memory layout.
    Returns s, [N, C], in the accumulator's dtype, in units of the loss: -s predicts the loss change when that
    channel is removed for that sample (Molchanov et al. 2019, eq. 8, before the square).

    Raises ValueError where the shapes or dtypes differ, or there is no channel dimension.

    >>> channel_scores(torch.ones(2, 3, 4), torch.full((2, 3, 4), 0.5))
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    if a.dim() < 2 or a.shape != g.shape or a.dtype != g.dtype:
        raise ValueError(
            "channel_scores needs an activation and its gradient of one shape [N, C, *S] and one dtype, "
            f"got {tuple(a.shape)} {a.dtype} and {tuple(g.shape)} {g.dtype}"
        )
    return _called("channel_scores", a, g)


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    activation: str = "none",
    slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = act((x - mean) / sqrt(var + eps) · weight + bias + residual), normalised per channel.

    ``x`` and ``residual`` are [N, C, *S]; ``weight``, ``bias`` and the running statistics are [C], of any float
    dtype. In training, ``mean`` and ``var`` are the batch's, over N and S, ``var`` biased; otherwise they are the
    running ones. ``activation`` is one of ``ACTIVATIONS``; "leaky_relu" has ``slope`` below 0. Returns y (dtype and
    layout of x), mean, var ([C], accumulator's dtype) and the mask that backward needs with a residual and "relu6" or
    "leaky_relu": bool, in the shape and layout of x, true where act' is 1; else it is empty, [0]. The running
    statistics are not updated here.

    Raises ValueError for an unknown activation, or where running statistics are needed and missing.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> y, mean, var, mask = batch_norm_act(x, 0 * x, None, None, None, None, True, 0.0, "relu6")
    >>> y.tolist(), mean.item(), var.item(), mask.tolist()
    ([[0.0], [1.0]], 2.0, 1.0, [[False], [True]])
    """
    _check_activation(activation)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("batch_norm_act with training=False needs running_mean and running_var; one is None")
    return _called(
        "batch_norm_act", x, residual, weight, bias, running_mean, running_var, training, eps, activation, slope
    )


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
    activation: str = "none",
    slope: float = 0.0,
    residual_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`batch_norm_act`, and the gate gradient s of its affine output, from the same sums.

    With dz = dy·act'(z), z the activation's input, x̂ = (x - mean) / sqrt(var + eps), and per sample and channel
    A[n, c] = Σ_S x̂·dz and B[n, c] = Σ_S dz::

        s[n, c] = weight·A + bias·B        dweight = Σ_n A        dbias = Σ_n B
        dx = weight / sqrt(var + eps) · (dz - (dbias + x̂·dweight) / M)      in training, M = N·|S|
        dx = weight / sqrt(var + eps) · dz                                  otherwise

    ``mask`` is the forward's mask, or the forward's y where the activation is "relu", or None: then z is computed from
    x, which is right only if there was no residual (see :func:`told`). The gradients of "silu" and "hardswish" can't be
    told from a mask, so they take None only.
    Returns dx (like x), dresidual (dz if ``residual_grad``, else an empty tensor), dweight and dbias ([C], acc)
    and s ([N, C], acc).

    Raises ValueError for an unknown activation, or a ``mask`` that this one can't use.

    >>> x, dy = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]])
    >>> one = torch.ones(1)
    >>> batch_norm_act_backward(dy, x, None, one, one, 2 * one, one, True, 0.0)[4]
    tensor([[0.],
            [4.]])
    """
    _check_activation(activation)
    if mask is not None and not maskable(activation):
        raise ValueError(f"the gradient of {activation} can't be told from a mask: pass None, without a residual")
    if mask is not None and mask.dtype is not torch.bool and activation != "relu":
        raise ValueError(
            f"{activation} needs a mask of bool, got {mask.dtype}; only relu's own output does in its place"
        )
    return _called(
        "batch_norm_act_backward",
        dy, x, mask, weight, bias, mean, var, training, eps, activation, slope, residual_grad,
    )  # fmt: skip


def maskable(activation: str) -> bool:
    """Whether the activation is made of straight lines with two slopes at most, so that a mask tells its gradient.

    Such a one may stand behind an addition.

    >>> maskable("relu6"), maskable("silu")
    (True, False)
    """
    return activation in ("none", "relu", "relu6", "leaky_relu")


def masked(residual: Tensor | None, activation: str) -> bool:
    """Whether :func:`batch_norm_act` makes a mask: only where nothing else tells its backward act'."""
    return residual is not None and activation in ("relu6", "leaky_relu")


def told(residual: Tensor | None, activation: str, y: Tensor, mask: Tensor) -> Tensor | None:
    """What tells :func:`batch_norm_act_backward` act', of what the forward has made: its ``mask`` argument.

    Behind an addition that is relu's ``y``, which the next layer keeps anyway, or the mask. Otherwise x tells it.

    >>> y, mask = torch.ones(2, 3), torch.empty(0, dtype=torch.bool)
    >>> told(torch.zeros(2, 3), "relu", y, mask) is y, told(None, "relu", y, mask)
    (True, None)
    """
    if residual is None or activation == "none":
        return None
    return y if activation == "relu" else mask


def followed() -> bool:
    """Whether somebody follows single operations: a compiler, a dispatch mode, a transform or a profiler."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _called(operation: str, first: Tensor, *rest: Any) -> Any:
    """The operation through torch's dispatcher, or without that detour where nobody would notice."""
    if followed() or type(first) not in _PLAIN or torch.is_grad_enabled():
        return getattr(torch.ops.taylorkern, operation).default(first, *rest)
    return IMPLEMENTATIONS[operation](first, *rest)


_PLAIN = (Tensor, torch.nn.Parameter)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def _per_sample(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulator(x.dtype))


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=accumulator(x.dtype))


@torch.library.register_fake("taylorkern::channel_scores", lib=library)
def _(a: Tensor, g: Tensor) -> Tensor:
    return _per_sample(a)


@torch.library.register_fake("taylorkern::batch_norm_act", lib=library)
def _(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *_, activation, _slope = rest
    wanted = masked(residual, activation)
    mask = torch.empty_like(x, dtype=torch.bool) if wanted else x.new_empty(0, dtype=torch.bool)
    return torch.empty_like(x), _per_channel(x), _per_channel(x), mask


@torch.library.register_fake("taylorkern::batch_norm_act_backward", lib=library)
def _(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    residual_grad = rest[-1]
    dresidual = torch.empty_like(x) if residual_grad else x.new_empty(0)
    return torch.empty_like(x), dresidual, _per_channel(x), _per_channel(x), _per_sample(x)
