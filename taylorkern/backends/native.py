"""The C++ kernels for the CPU: compiled or loaded at the first use, never at import."""

import shlex
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import build, frame
from .toolchain import BuildError

# What isn't here, float16 above all, is served by the reference.
DTYPES = {dtype: code for dtype, code in frame.DTYPES.items() if dtype is not torch.float16}
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


def load() -> None:
    """Load the kernels, or compile them, unless a first use has; one warning says why not."""
    _library()


def autograd() -> tuple[ModuleType, tuple[int, ...]] | None:
    """The library of autograd functions, and the addresses of the kernels for it, once these have been loaded."""
    if not isinstance(_outcome, build.Library) or _outcome.autograd is None:
        return None
    return _outcome.autograd, _outcome.module.addresses


def channel_scores(a: Tensor, g: Tensor) -> Tensor:
    """``taylorkern::channel_scores`` of :mod:`taylorkern.ops`."""
    return frame.channel_scores(_Frame(a), a, g)


def batch_norm_act(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``taylorkern::batch_norm_act`` of :mod:`taylorkern.ops`."""
    return frame.batch_norm_act(_Frame(x), x, *rest)


def batch_norm_act_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``taylorkern::batch_norm_act_backward`` of :mod:`taylorkern.ops`."""
    return frame.batch_norm_act_backward(_Frame(x), dy, x, *rest)


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


class _Frame(frame.Frame):
    __slots__ = ()

    def beside(self, t: Tensor) -> bool:
        return t.is_cpu

    def call(self, kernel: str, *arguments: Tensor | float | None) -> None:
        """Run a kernel: tensors become addresses, 0 for none, and numbers stay what they are."""
        passed = [0 if t is None else t if isinstance(t, _NUMBERS) else t.data_ptr() for t in arguments]
        getattr(_kernels(), kernel)(*passed, *self.sizes(), self.layout, DTYPES[self.dtype], torch.get_num_threads())


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
