"""Batch normalisations that run, and are differentiated, in C++ from end to end; None for calls that it can't serve.

A function of ``taylorkern.autograd`` costs several times more in a network than by itself, for it runs on caches that a
kernel has just swept; and a GPU waits for it where tensors are small. csrc/autograd.cpp does the same without Python,
with the CPU's kernels and with CUDA C++ ones.
"""

from types import ModuleType
from typing import Any

from torch import Tensor

from . import autograd, backends
from .backends import cuda, native
from .ops import ACTIVATIONS

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
CUDA = 1  # as c10 numbers types of devices
_connected: ModuleType | None = None  # the library, once it has been told what to call
_knows_cuda = False  # and that once it has been told of the CUDA kernels


def library() -> ModuleType | None:
    """The library of autograd functions, after the first use of a kernel has loaded it."""
    return _connected or _connect()


def takes(layer: Any, x: Tensor) -> bool:
    """Whether nothing is unusual about ``layer`` on ``x``: tensors that a kernel serves, and nobody who watches."""
    found = library() if _waves(x) else None
    return found is not None and found.takes(x, *_channels(layer))


def fused(layer: Any, x: Tensor, residual: Tensor | None, z: Tensor | None, activation: str, slope: float) -> Any:
    """act(layer(x) + residual), with the gate z [N, C] on layer(x)."""
    waves, found = _waves(x), library()
    if waves is None or found is None:
        return None
    return found.fused(*_arguments(layer, x, residual, z), *waves, _CODES[activation], slope)


def gated(layer: Any, x: Tensor, z: Tensor) -> Any:
    """layer(x), torch's own to the bit, with the gate z [N, C]."""
    waves, found = _waves(x), library()
    if waves is None or found is None:
        return None
    return found.gated(*_arguments(layer, x, None, z), *waves)


def _waves(x: Any) -> tuple[int, int] | None:
    """What waves of channels may fill of the device's cache, forward and backward; None where others' kernels serve."""
    if getattr(x, "is_cpu", False):
        return 0, 0
    if not getattr(x, "is_cuda", False):
        return None
    serving = [backends.provider(operation, x) for operation in ("batch_norm_act", "batch_norm_act_backward")]
    forward, backward = (k.resident_bytes(x.device) if isinstance(k, cuda.Kernels) else None for k in serving)
    if forward is None or backward is None or not (_knows_cuda or _connect_cuda()):
        return None
    return forward, backward


def _connect_cuda() -> bool:
    """Tell the library of the CUDA kernels, which are loaded; the first call loads the library too."""
    global _knows_cuda
    native.load()
    found, addresses = library(), cuda.addresses()
    if found is None or addresses is None:
        return False
    found.connect_cuda(CUDA, *addresses)
    _knows_cuda = True
    return True


def _connect() -> ModuleType | None:
    global _connected
    if found := native.autograd():
        library, addresses = found
        library.connect(*addresses, autograd.gradients, autograd.overwritten)
        _connected = library
    return _connected


def _arguments(layer: Any, x: Tensor, residual: Tensor | None, z: Tensor | None) -> tuple[Any, ...]:
    """What the library wants to know: tensors, mode, eps, momentum, and the number of batches where they count."""
    training = layer.training
    weight, bias, mean, var = _channels(layer)
    tracks = layer.track_running_stats
    batch = bool(training or mean is None)
    if not (tracks or not training):
        mean = var = None
    batches = layer.num_batches_tracked if training and tracks else None
    return x, residual, weight, bias, mean, var, z, batch, layer.eps, layer.momentum, batches


def _channels(layer: Any) -> tuple[Tensor | None, ...]:
    """weight, bias, running_mean and running_var: from where nn.Module keeps them, for its attributes take longer."""
    parameters, buffers = layer._parameters, layer._buffers
    try:
        return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
    except KeyError:  # a tool has put something else in their place
        return layer.weight, layer.bias, layer.running_mean, layer.running_var
