"""Autograd functions: they call operations and hand the gate its gradient; no arithmetic of their own."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops


class InplaceError(RuntimeError):
    """A tensor that a score needs was overwritten in place between forward and backward."""


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` without a graph of its own: a second derivative through it is refused, not left out.

    Torch's ``once_differentiable`` refuses it only where the incoming gradient requires one, and takes its time.
    """
    refusing = once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, dy: Tensor, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, dy, *rest)
        return refusing(ctx, dy if dy.requires_grad else dy.detach().requires_grad_(), *rest)

    return run


class ChannelGate(torch.autograd.Function):
    """y = a · z for a gate z [N, C] of ones: forward hands ``a`` on, backward adds dL/dz = channel_scores(a, dy).

    ``e`` is a gate [N, C, *S] of ones, or None: its gradient is a·dy. ``view`` shows an output-shaped tensor as
    [N, C, *S]. ``recompute`` returns ``a`` once more, for the case that y was overwritten in place (``relu_``, ``+=``)
    after it was handed out. ``to`` is where both gradients are delivered instead, in compiled code, or None.
    """

    @staticmethod
    def forward(
        a: Tensor, z: Tensor, e: Any, view: Callable[[Tensor], Tensor], recompute: Callable[[], Tensor] | None, to: Any
    ) -> Tensor:
        # Not tracked as a view: autograd forbids in-place operations on views made inside a Function.
        return torch.ops.aten._unsafe_view.default(a, a.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *_, ctx.view, ctx.recompute, ctx.to = inputs
        ctx.save_for_backward(output)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        s = product = None
        if ctx.needs_input_grad[1]:
            try:
                (a,) = ctx.saved_tensors
            except RuntimeError as error:
                if ctx.recompute is None or not _overwritten(error):
                    raise
                a = ctx.recompute()
            a, dy_seen = ctx.view(a), ctx.view(dy.to(a.dtype))
            s = ops.channel_scores(a, dy_seen)
            if ctx.needs_input_grad[2]:
                product = a.to(s.dtype) * dy_seen
        return dy, *_delivered(ctx.to, s, product), None, None, None


class BatchNormAct(torch.autograd.Function):
    """Backward of a batch normalisation that has run already, with a gate z [N, C] on its affine output a.

    ``e`` is a gate [N, C, *S] there, or None, without an activation behind it: its gradient is a·dy. ``to`` is where
    both gradients are delivered instead, in compiled code, or None.
    ``y``, ``mean``, ``var`` and ``mask`` (or None) are what ``ops.batch_norm_act``, or torch's own forward, made of
    ``x`` without gradients; y is handed on, with the gradients of ``x``, ``residual``, ``weight``, ``bias`` and z.
    """

    @staticmethod
    def forward(
        x: Tensor, residual: Any, weight: Any, bias: Any, z: Any, e: Any, to: Any, y: Tensor, *_: Any
    ) -> Tensor:
        return torch.ops.aten._unsafe_view.default(y, y.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, residual, weight, bias, _, _, ctx.to, _, mean, var, mask, *settings = inputs
        _keep(ctx, x, residual, weight, bias, mean, var, output, mask, *settings)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = _saved(ctx)
        dx, dresidual, dweight, dbias, s = _gradients(ctx, dy, saved)
        product = None
        if ctx.needs_input_grad[5]:
            x, _, weight, bias, mean, var = saved
            product = _affine(x, weight, bias, mean, var, ctx.eps) * dy
        wanted = ctx.needs_input_grad
        gradients = (dx, dresidual, dweight, dbias, *_delivered(ctx.to, s, product))
        return *(g if needed else None for g, needed in zip(gradients, wanted, strict=False)), *[None] * 9


class FusedBatchNormAct(torch.autograd.Function):
    """y = act(batch_norm(x) + residual) as one operation, with a gate z [N, C] behind the affine map, or None.

    ``follow`` is called with the mean and variance that were used, before anything is kept for backward: a checkpoint
    may end a forward that it repeats right there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Any, weight: Any, bias: Any, z: Any, follow: Callable[[Tensor, Tensor], None],
        running_mean: Any, running_var: Any, training: bool, *settings: Any,
    ) -> Tensor:  # fmt: skip
        y, *made = ops.batch_norm_act(x, residual, weight, bias, running_mean, running_var, training, *settings)
        mean, var, mask = made
        follow(mean, var)
        _keep(ctx, x, residual, weight, bias, mean, var, y, mask, training, *settings)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        gradients = _gradients(ctx, dy, _saved(ctx))
        return *(g if needed else None for g, needed in zip(gradients, wanted, strict=False)), *[None] * 7


def attach(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``function.apply(*arguments)``, all of them given, without the look at its signature, which takes longest."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        output: Tensor = function.apply(*arguments)
        return output
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def _delivered(to: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The ``gradients`` of a gate's leaves, or those of its anchors, once they are delivered."""
    if to is None:
        return gradients
    deliver = torch.ops.taylorkern.deliver.default
    return tuple(None if g is None else deliver(g, at) for g, at in zip(gradients, to, strict=True))


def _keep(
    ctx: Any, x: Tensor, residual: Any, weight: Any, bias: Any, mean: Tensor, var: Tensor, y: Tensor,
    mask: Any, training: bool, eps: float, activation: str, slope: float,
) -> None:  # fmt: skip
    ctx.training, ctx.eps, ctx.activation, ctx.slope = training, eps, activation, slope
    told = ops.told(residual, activation, y, mask)
    ctx.told = told is not None
    ctx.save_for_backward(x, told, weight, bias, mean, var)


def gradients(
    dy: Tensor, saved: tuple[Tensor | None, ...], training: bool, eps: float, activation: int, slope: float, apart: bool
) -> tuple[Tensor | None, ...]:
    """What csrc/autograd.cpp leaves to Python, where a gradient or the moment is unusual: see ``_gradients``."""
    kept = SimpleNamespace(
        training=training, eps=eps, activation=ops.ACTIVATIONS[activation], slope=slope,
        told=saved[1] is not None, needs_input_grad=(True, apart),
    )  # fmt: skip
    return _once(kept, dy, saved)


def overwritten() -> None:
    """Raises the InplaceError of a normalisation that finds changed what it has kept."""
    raise InplaceError(
        "the input, output or weight of a scored batch normalisation was overwritten in place before backward, and its "
        "score needs the value; use the out-of-place form of that operation"
    )


def _saved(ctx: Any) -> Any:
    """What ``_keep`` has kept, taken once: a checkpoint makes it anew for everybody who asks."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if not _overwritten(error):
            raise
        overwritten()


def _gradients(ctx: Any, dy: Tensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """dx, dresidual, dweight, dbias and s of what was :func:`_saved`."""
    x, told, weight, bias, mean, var = saved
    assert x is not None and mean is not None and var is not None
    if told is not None and ctx.activation != "relu":
        told = told.bool()  # a hook on saved tensors may have made something else of the mask
    apart = ctx.told and ctx.needs_input_grad[1]  # else the residual's gradient is dy, or not wanted
    dx, dz, dweight, dbias, s = ops.batch_norm_act_backward(
        dy, x, told, weight, bias, mean, var, ctx.training, ctx.eps, ctx.activation, ctx.slope, apart
    )
    return dx, dz if ctx.told else dy, _as(dweight, weight), _as(dbias, bias), s


_once = differentiable_once(_gradients)


def _overwritten(error: RuntimeError) -> bool:
    return "modified by an inplace operation" in str(error)


def _as(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    if parameter is None or gradient.dtype is parameter.dtype:
        return gradient
    return gradient.to(parameter.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """A batch normalisation's output [N, C, *S] from its input and statistics, in the accumulator's dtype."""
    x = x.to(mean.dtype)
    return torch.nn.functional.batch_norm(x, mean, var, _as_like(weight, x), _as_like(bias, x), False, 0.0, eps)


def _as_like(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)
