"""The C++ kernels for the CPU: compiled or loaded at the first use, never at import."""

import shlex
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from ..ops import ACTIVATIONS, masked
from . import build
from .toolchain import BuildError

# The codes of ops.h. What isn't here, float16 above all, is served by the reference.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
CHANNELS_FIRST, CHANNELS_LAST = 0, 1
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
OPERATIONS = ("channel_scores", "batch_norm_act", "batch_norm_act_backward")

ORIGINS = {
    "package": "loaded, built ahead of time into the package",
    "cache": "loaded from the cache",
    "compiled": "compiled by this process, into the cache",
    "private": "loaded for this process alone: the cache can't be used",
}


@dataclass(frozen=True)
class Status:
    """Whether the kernels can serve, why, and what the doctor may want to print."""

    usable: bool
    reason: str
    detail: dict[str, str] = field(default_factory=dict)


_lock = threading.Lock()
_outcome: build.Library | BuildError | None = None  # None before the first use


def supports(operation: str, tensor: Tensor) -> bool:
    """Whether ``operation`` on tensors like this one is served here. The first yes has loaded the kernels."""
    known = operation in OPERATIONS and tensor.dtype in DTYPES and tensor.is_cpu
    plain = tensor.layout is torch.strided and not tensor.is_neg()
    return known and plain and tensor.dim() >= 2 and isinstance(_outcome or _library(), build.Library)


def status() -> Status:
    """What a first use has found, or would find; compiles and loads nothing."""
    if isinstance(_outcome, BuildError):
        return Status(False, str(_outcome))
    if _outcome is None:
        return _foreseen()
    module = _outcome.module
    vectors = f"{8 * module.register_bytes} bit{', fused multiply-add' if module.fma else ''}"
    caller = "C++" if _outcome.autograd else "Python"
    detail = {"path": str(_outcome.path), "compiler": module.compiler, "vectors": vectors, "called from": caller}
    return Status(True, ORIGINS[_outcome.origin], detail)


def autograd() -> tuple[ModuleType, tuple[int, ...]] | None:
    """The library of autograd functions, and the addresses of the kernels for it, once these have been loaded."""
    if not isinstance(_outcome, build.Library) or _outcome.autograd is None:
        return None
    return _outcome.autograd, _outcome.module.addresses


def channel_scores(a: Tensor, g: Tensor) -> Tensor:
    """``taylorkern::channel_scores`` of :mod:`taylorkern.ops`."""
    frame = _Frame(a)
    s = frame.per_sample()
    frame.call("channel_scores", frame.dense("a", a), frame.dense("g", g), s)
    return s


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
    """``taylorkern::batch_norm_act`` of :mod:`taylorkern.ops`."""
    frame = _Frame(x)
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
        _ACTIVATION_CODES[activation],
        slope,
    )
    return frame.given(y), mean, var, x.new_empty(0, dtype=torch.bool) if mask is None else frame.given(mask)


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
    """``taylorkern::batch_norm_act_backward`` of :mod:`taylorkern.ops`."""
    frame = _Frame(x)
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
        _ACTIVATION_CODES[activation],
        slope,
    )
    return frame.given(dx), x.new_empty(0) if dresidual is None else frame.given(dresidual), dweight, dbias, s


def follow(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbias: float
) -> None:
    """See :func:`taylorkern.backends.follow`."""
    _kernels().follow(
        mean.data_ptr(), var.data_ptr(), running_mean.data_ptr(), running_var.data_ptr(), momentum, unbias,
        len(mean), DTYPES[mean.dtype],
    )  # fmt: skip


def follows(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Whether these are what :func:`follow` takes: [C] tensors of one dtype, in the processor's memory."""
    dtype, shape = mean.dtype, mean.shape
    return isinstance(_outcome, build.Library) and all(
        t.dtype is dtype and t.shape == shape and t.is_cpu and t.is_contiguous() and not t.is_neg()
        for t in (running_mean, running_var, var, mean)
    )


def folds(pieces: Sequence[Tensor]) -> bool:
    """Whether these are what :func:`fold` takes: [N, C] tensors of one accumulator's dtype, on the CPU."""
    dtype = pieces[0].dtype
    return isinstance(_outcome, build.Library) and all(
        type(t) is Tensor
        and len(t) == len(pieces[0])
        and t.dtype is dtype
        and dtype in _ACCUMULATORS
        and t.is_cpu
        and t.is_contiguous()
        and not t.is_neg()
        for t in pieces
    )


def fold(pieces: Sequence[Tensor], runs: Tensor, count: int) -> Tensor:
    """Σ_n t[n, u] and Σ_n t[n, u]², [2, count] in float64, where t sums s over the channels of a unit.

    ``pieces`` are s, [N, C] each; ``runs`` [R, 4] (int64) are runs of channels: piece, first channel, first unit and
    length.
    """
    found = torch.empty(2, count, dtype=torch.float64)
    s, channels = [t.data_ptr() for t in pieces], [t.shape[1] for t in pieces]
    _kernels().fold(
        s, channels, runs.data_ptr(), found[0].data_ptr(), found[1].data_ptr(), len(pieces[0]), count, len(runs),
        DTYPES[pieces[0].dtype], torch.get_num_threads(),
    )  # fmt: skip
    return found


def accumulates(totals: Sequence[Tensor], more: Sequence[Tensor]) -> bool:
    """Whether these are what :func:`accumulate` takes: as many float64 tensors of the same shapes, on the CPU."""
    return (
        isinstance(_outcome, build.Library)
        and [t.shape for t in totals] == [t.shape for t in more]
        and all(
            type(t) is Tensor and t.dtype is torch.float64 and t.is_cpu and t.is_contiguous() and not t.is_neg()
            for t in (*totals, *more)
        )
    )


def accumulate(totals: Sequence[Tensor], more: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    """See :func:`taylorkern.backends.accumulate`."""
    to, numbers = [t.data_ptr() for t in totals], [t.numel() for t in totals]
    added: bool = _kernels().accumulate(to, [t.data_ptr() for t in more], numbers)
    return totals, int(added)


_ACCUMULATORS = (torch.float32, torch.float64)


class _Frame:
    """One call's sizes and layout, those of one tensor [N, C, *S]; every other tensor is brought into them.

    It runs four times per layer and step, on caches that a kernel has just swept: every attribute counts.
    """

    __slots__ = ("acc", "dtype", "layout", "like", "shape", "strided")

    def __init__(self, x: Tensor) -> None:
        self.like, self.shape, self.dtype = x, x.shape, x.dtype
        self.acc = torch.float64 if x.dtype is torch.float64 else torch.float32
        layout = _layout(x)
        self.strided = layout is None  # in neither layout: outputs take the strides that empty_like gives
        self.layout = _layout_like(x) if layout is None else layout

    def dense(self, name: str, t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        """``t`` in the frame's layout and dtype, or another: itself if it is so already."""
        if t is None:
            return None
        if t.shape != self.shape or not t.is_cpu:
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
        if v.shape != self.shape[1:2] or not v.is_cpu:
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
        return torch.empty(self.shape[:2], dtype=self.acc, device="cpu")

    def per_channel(self) -> Tensor:
        return torch.empty(self.shape[1], dtype=self.acc, device="cpu")

    def call(self, kernel: str, *arguments: Tensor | float | None) -> None:
        """Run a kernel: tensors become addresses, 0 for none, and numbers stay what they are."""
        N, C, *S = self.shape
        passed = [0 if t is None else t if isinstance(t, _NUMBERS) else t.data_ptr() for t in arguments]
        getattr(_kernels(), kernel)(*passed, N, C, prod(S), self.layout, DTYPES[self.dtype], torch.get_num_threads())

    def _refusal(self, name: str, t: Tensor, shape: torch.Size) -> ValueError:
        needed = f"{tuple(shape)} on {self.like.device}"
        return ValueError(f"{name} has shape {tuple(t.shape)} on {t.device}; needed: {needed}")

    def _fresh(self, dtype: torch.dtype | None = None) -> Tensor:
        N, C, *S = self.shape
        if self.layout == CHANNELS_FIRST:
            return self.like.new_empty((N, C, *S), dtype=dtype)
        return self.like.new_empty((N, *S, C), dtype=dtype).movedim(-1, 1)


def _is_dense(t: Tensor, layout: int) -> bool:
    if layout == CHANNELS_FIRST:
        return t.is_contiguous()
    if t.dim() == 4:
        return t.is_contiguous(memory_format=torch.channels_last)
    return t.movedim(1, -1).is_contiguous()


def _layout(t: Tensor) -> int | None:
    """The layout that ``t`` is dense in; where both are the same memory, the one with the longer inner loop."""
    if t.is_contiguous():
        return CHANNELS_LAST if prod(t.shape[2:]) == 1 else CHANNELS_FIRST
    return CHANNELS_LAST if _is_dense(t, CHANNELS_LAST) else None


def _layout_like(t: Tensor) -> int:
    """The layout that torch would give a copy of ``t``, or the first where that is neither."""
    layout = _layout(torch.empty_like(t))
    return CHANNELS_FIRST if layout is None else layout


_NUMBERS = (int, float)  # bool too


def _library() -> build.Library | BuildError:
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                _outcome = _loaded()
    return _outcome


def _loaded() -> build.Library | BuildError:
    try:
        return build.load()
    except BuildError as error:
        warnings.warn(
            f"taylorkern: no CPU kernels, so the slower PyTorch reference serves: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return error


def _kernels() -> ModuleType:
    outcome = _outcome or _library()
    if isinstance(outcome, BuildError):
        raise outcome
    return outcome.module


def _foreseen() -> Status:
    wanted = build.Wanted.here()
    if found := wanted.locate():
        return Status(True, f"built, not loaded yet ({found[1]})", {"path": str(found[0])})
    if wanted.missing:
        return Status(False, str(wanted.missing))
    where = {"cache": str(build.cache_root()), "compiler": shlex.join(wanted.tools.compiler)}
    return Status(True, "not built yet: the first use compiles", where)
