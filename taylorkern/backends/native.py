"""The C++ kernels for the CPU: compiled or loaded at the first use, never at import."""

import shlex
import threading
import warnings
from dataclasses import dataclass, field
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from ..ops import ACTIVATIONS
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
    detail = {"path": str(_outcome.path), "compiler": module.compiler, "vectors": vectors}
    return Status(True, ORIGINS[_outcome.origin], detail)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``taylorkern::batch_norm_act`` of :mod:`taylorkern.ops`."""
    frame = _Frame(x)
    y = frame.output()
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
        mean,
        var,
        eps,
        training,
        _ACTIVATION_CODES[activation],
        slope,
    )
    return frame.given(y), mean, var


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
    """``taylorkern::batch_norm_act_backward`` of :mod:`taylorkern.ops`."""
    frame = _Frame(x)
    dx = frame.output()
    dresidual = frame.output() if residual_grad else None
    dweight, dbias, s = frame.per_channel(), frame.per_channel(), frame.per_sample()
    frame.call(
        "batch_norm_act_backward",
        frame.dense("dy", dy),
        frame.dense("x", x),
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

    def dense(self, name: str, t: Tensor | None) -> Tensor | None:
        """``t`` in the frame's dtype and layout: itself if it is so already."""
        if t is None:
            return None
        if t.shape != self.shape or not t.is_cpu:
            raise self._refusal(name, t, self.shape)
        if t.dtype is not self.dtype or t.is_neg():
            t = t.to(self.dtype).resolve_neg()
        return t if _is_dense(t, self.layout) else self._fresh().copy_(t)

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

    def output(self) -> Tensor:
        """Memory for the kernel to write a tensor like the first one to."""
        return self._fresh() if self.strided else torch.empty_like(self.like)

    def given(self, out: Tensor) -> Tensor:
        """An output with the strides that ``torch.empty_like`` of the first tensor has."""
        return torch.empty_like(self.like).copy_(out) if self.strided else out

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

    def _fresh(self) -> Tensor:
        N, C, *S = self.shape
        if self.layout == CHANNELS_FIRST:
            return self.like.new_empty(N, C, *S)
        return self.like.new_empty(N, *S, C).movedim(-1, 1)


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
