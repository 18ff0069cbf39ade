"""One call of a kernel: its sizes and layout, every tensor brought into them, and the memory that it writes to.

Kernels take dense memory; PyTorch's tensors have any strides. The backends whose kernels follow ``csrc/ops.h`` share
what is here, and say in a subclass how they call a kernel.
"""

from math import prod

import torch
from torch import Tensor

from ..ops import ACTIVATIONS, masked

# The codes of ops.h
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CHANNELS_FIRST, CHANNELS_LAST = 0, 1
ALIGNMENT = 16  # bytes
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


class Frame:
    """One call's sizes and layout, those of one tensor [N, C, *S]; every other tensor is brought into them.

    It runs four times per layer and step, on caches that a kernel has just swept: every attribute counts.
    """

    __slots__ = ("acc", "device", "dtype", "layout", "like", "shape", "strided")

    def __init__(self, x: Tensor) -> None:
        self.like, self.shape, self.dtype, self.device = x, x.shape, x.dtype, x.device
        self.acc = torch.float64 if x.dtype is torch.float64 else torch.float32
        layout = layout_of(x)
        self.strided = layout is None  # in neither layout: outputs take the strides that empty_like gives
        self.layout = _layout_like(x) if layout is None else layout

    def call(self, kernel: str, *arguments: Tensor | float | None) -> None:
        """Run a kernel on dense tensors [N, C, S], [C] and [N, C], in the order that its binding has."""
        raise NotImplementedError

    def beside(self, t: Tensor) -> bool:
        """Whether ``t`` is where the first tensor is."""
        return t.device == self.device

    def sizes(self) -> tuple[int, int, int]:
        """N, C and S."""
        N, C, *S = self.shape
        return N, C, prod(S)

    def dense(self, name: str, t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        """``t`` in the frame's layout and dtype, or another: itself if it is so already."""
        if t is None:
            return None
        if t.shape != self.shape or not self.beside(t):
            raise self._refusal(name, t, self.shape)
        wanted = dtype or self.dtype
        if t.dtype is not wanted or t.is_neg():
            t = t.to(wanted).resolve_neg()
        return t if _is_dense(t, self.layout) else self._fresh(dtype).copy_(t)

    def vector(self, name: str, v: Tensor | None) -> Tensor | None:
        """A [C] tensor in the accumulator's dtype."""
        return None if v is None else self.required_vector(name, v)

    def required_vector(self, name: str, v: Tensor | None) -> Tensor:
        if v is None:
            raise ValueError(f"{name} is None where training is False")
        if v.shape != self.shape[1:2] or not self.beside(v):
            raise self._refusal(name, v, self.shape[1:2])
        if v.dtype is self.acc and v.is_contiguous() and not v.is_neg():
            return v
        return v.to(self.acc).resolve_neg().contiguous()

    def output(self, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for the kernel to write a tensor like the first one to, in its dtype or another."""
        return self._fresh(dtype) if self.strided else torch.empty_like(self.like, dtype=dtype)

    def given(self, out: Tensor) -> Tensor:
        """An output with the strides that ``torch.empty_like`` of the first tensor has."""
        return torch.empty_like(self.like, dtype=out.dtype).copy_(out) if self.strided else out

    def per_sample(self) -> Tensor:
        return torch.empty(self.shape[:2], dtype=self.acc, device=self.device)

    def per_channel(self) -> Tensor:
        return torch.empty(self.shape[1], dtype=self.acc, device=self.device)

    def _refusal(self, name: str, t: Tensor, shape: torch.Size) -> ValueError:
        needed = f"{tuple(shape)} on {self.device}"
        return ValueError(f"{name} has shape {tuple(t.shape)} on {t.device}; needed: {needed}")

    def _fresh(self, dtype: torch.dtype | None = None) -> Tensor:
        N, C, *S = self.shape
        if self.layout == CHANNELS_FIRST:
            return self.like.new_empty((N, C, *S), dtype=dtype)
        return self.like.new_empty((N, *S, C), dtype=dtype).movedim(-1, 1)


def channel_scores(frame: Frame, a: Tensor, g: Tensor) -> Tensor:
    """``taylorkern::channel_scores`` of :mod:`taylorkern.ops`."""
    s = frame.per_sample()
    frame.call("channel_scores", frame.dense("a", a), frame.dense("g", g), s)
    return s


def batch_norm_act(
    frame: Frame,
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
    """``taylorkern::batch_norm_act`` of :mod:`taylorkern.ops`."""
    y = frame.output()
    mask = frame.output(torch.bool) if masked(residual, activation) else None
    mean, var = frame.per_channel(), frame.per_channel()
    if not training:
        mean.copy_(frame.required_vector("running_mean", running_mean))
        var.copy_(frame.required_vector("running_var", running_var))
    frame.call(
        "batch_norm_act",
        frame.dense("x", x),
        frame.dense("residual", residual),
        frame.vector("weight", weight),
        frame.vector("bias", bias),
        y,
        mask,
        mean,
        var,
        eps,
        training,
        ACTIVATION_CODES[activation],
        slope,
    )
    return frame.given(y), mean, var, x.new_empty(0, dtype=torch.bool) if mask is None else frame.given(mask)


def batch_norm_act_backward(
    frame: Frame,
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
    """``taylorkern::batch_norm_act_backward`` of :mod:`taylorkern.ops`."""
    mask, y = (mask, None) if mask is None or mask.dtype is torch.bool else (None, mask)
    dx = frame.output()
    dresidual = frame.output() if residual_grad else None
    dweight, dbias, s = frame.per_channel(), frame.per_channel(), frame.per_sample()
    frame.call(
        "batch_norm_act_backward",
        frame.dense("dy", dy),
        frame.dense("x", x),
        frame.dense("mask", mask, torch.bool),
        frame.dense("y", y),
        frame.vector("weight", weight),
        frame.vector("bias", bias),
        frame.vector("mean", mean),
        frame.vector("var", var),
        dx,
        dresidual,
        dweight,
        dbias,
        s,
        eps,
        training,
        ACTIVATION_CODES[activation],
        slope,
    )
    return frame.given(dx), x.new_empty(0) if dresidual is None else frame.given(dresidual), dweight, dbias, s


def aligned(argument: Tensor | float | None) -> Tensor | float | None:
    """A tensor that starts at a multiple of 16 bytes, as torch's own do.

    GPUs' kernels read 16 bytes at once there, and for other addresses sums would be taken in another order.
    """
    if isinstance(argument, Tensor) and argument.data_ptr() % ALIGNMENT:
        return argument.clone()
    return argument


def layout_of(t: Tensor) -> int | None:
    """The layout that ``t`` is dense in; where both are the same memory, the one with the longer inner loop."""
    if t.is_contiguous():
        return CHANNELS_LAST if prod(t.shape[2:]) == 1 else CHANNELS_FIRST
    return CHANNELS_LAST if _is_dense(t, CHANNELS_LAST) else None


def _is_dense(t: Tensor, layout: int) -> bool:
    if layout == CHANNELS_FIRST:
        return t.is_contiguous()
    if t.dim() == 4:
        return t.is_contiguous(memory_format=torch.channels_last)
    return t.movedim(1, -1).is_contiguous()


def _layout_like(t: Tensor) -> int:
    """The layout that torch would give a copy of ``t``, or the first where that is neither."""
    layout = layout_of(torch.empty_like(t))
    return CHANNELS_FIRST if layout is None else layout
