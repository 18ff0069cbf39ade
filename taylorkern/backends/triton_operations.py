"""The kernels in Triton: imported and tried at the first use on a device, never at import, for Triton is optional."""

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import frame
from .native import Status

# What isn't here is served by the reference.
DTYPES = {dtype: code for dtype, code in frame.DTYPES.items() if dtype is not torch.float64}
OPERATIONS = ("channel_scores", "batch_norm_act", "batch_norm_act_backward")


@dataclass(frozen=True)
class Kernels:
    """The functions that launch kernels, and whether Triton's interpreter runs them, on tensors of any device."""

    launchers: dict[str, Callable[..., None]]
    interpreted: bool
    version: str


_lock = threading.Lock()
_found: dict[torch.device, str] = {}  # per device that was tried: why it can't serve, or nothing


def supports(operation: str, tensor: Tensor) -> bool:
    """Whether ``operation`` on tensors like this one is served here. The first yes on a device has tried a kernel."""
    known = operation in OPERATIONS and tensor.dtype in DTYPES
    plain = tensor.layout is torch.strided and not tensor.is_neg()
    return known and plain and tensor.dim() >= 2 and serves(tensor.device)


def serves(device: torch.device) -> bool:
    """Whether kernels run on this device."""
    reason = _found.get(device)
    if reason is None:
        with _lock:
            reason = _found.get(device)
            if reason is None:
                reason = _found[device] = _tried(device)
    return not reason


def status() -> Status:
    """What first uses have found, or would find; imports and compiles nothing."""
    if find_spec("triton") is None:
        return Status(False, "Triton isn't installed")
    failures = {str(device): reason for device, reason in _found.items() if reason and device.type == "cuda"}
    if failures:
        return Status(False, "; ".join(f"{device}: {reason}" for device, reason in failures.items()))
    if not _found and not torch.cuda.is_available():
        return Status(False, "no GPU is visible")
    if not any(not reason for reason in _found.values()):
        return Status(True, "not tried yet: the first use compiles")
    found = kernels()
    return Status(True, "interpreted" if found.interpreted else "compiled", {"triton": found.version})


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
    with _current(mean.device):
        kernels().launchers["follow"](running_mean, running_var, mean, var, momentum, unbias)


def follows(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Whether these are what :func:`follow` takes: [C] tensors of float32, on one device that was found to serve."""
    device, shape = mean.device, mean.shape
    return _found.get(device) == "" and all(
        t.dtype is torch.float32 and t.shape == shape and t.device == device and t.is_contiguous() and not t.is_neg()
        for t in (running_mean, running_var, var, mean)
    )


class _Frame(frame.Frame):
    __slots__ = ()

    def call(self, kernel: str, *arguments: Tensor | float | None) -> None:
        last = self.layout == frame.CHANNELS_LAST
        with _current(self.device):
            kernels().launchers[kernel](self.sizes(), last, *map(frame.aligned, arguments))


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def kernels() -> Kernels:
    """Imports them. Raises ImportError where there is no Triton."""
    import triton

    from . import triton_batch_norm, triton_batch_norm_backward, triton_formula, triton_scores

    launchers: dict[str, Callable[..., None]] = {
        "channel_scores": triton_scores.channel_scores,
        "batch_norm_act": triton_batch_norm.batch_norm_act,
        "batch_norm_act_backward": triton_batch_norm_backward.batch_norm_act_backward,
        "follow": triton_batch_norm.follow,
    }
    return Kernels(launchers, triton_formula.INTERPRETED, triton.__version__)


def _tried(device: torch.device) -> str:
    """Why the kernels don't serve on this device, or nothing."""
    try:
        found = kernels()
        if device.type != "cuda" and not found.interpreted:
            return "not a CUDA device"
        _try(found, device)
    except ImportError:
        return "Triton isn't installed"
    except Exception as error:  # of a compiler, a linker, a driver: Triton passes on what they raise
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"taylorkern: Triton's kernels don't run on {device}, so another backend serves, perhaps the slower "
            f"PyTorch reference: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return reason
    return ""


def _try(found: Kernels, device: torch.device) -> None:
    """Compile and launch a small kernel."""
    with torch.no_grad(), _current(device):
        numbers = [torch.zeros(1, dtype=torch.float32, device=device) for _ in range(4)]
        found.launchers["follow"](*numbers, 0.1, 1.0)
