"""What fused code runs: batch normalisations that wait for the addition and activation behind them.

``start`` hands on a promise of a normalisation's output instead of the output, ``link`` and ``plus`` pass it along, and
``close`` runs the chain as one operation. Each decides anew in every call. Whatever stands in the way (no gradients, a
hook, an activation or input that no kernel knows) makes the promise a tensor, by the code that was written. Where code
in between raises, the normalisation has not run, and its running statistics have not moved.
"""

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import backends, direct, ops
from .activations import FUNCTIONS, MODULES, Activation, relu, relu_
from .autograd import InplaceError
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, fused_batch_norm, kept, promised, settle

__all__ = ["close", "link", "overwrite", "plus", "relu", "relu_", "start", "value"]  # what rewritten code calls

NORMALISATIONS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


class Deferred:
    """The output of ``layer`` on ``x`` [N, C, *S], plus ``residual`` if one came; it runs when it is needed."""

    __slots__ = ("__weakref__", "_output", "_version", "add", "layer", "residual", "x")

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.layer = layer
        self.x: Tensor | None = x
        self.residual: Tensor | None = None
        self.add: Callable[[Any, Any], Tensor] = operator.add
        self._output: Tensor | None = None  # once the layer has run, alone
        self._version = x._version
        promised(layer, self)

    def with_residual(self, residual: Tensor, inplace: bool) -> "Deferred":
        self.residual, self.add = residual, operator.iadd if inplace else operator.add
        return self

    def takes(self, other: Any, first: bool = False) -> bool:
        """Whether ``other`` can be this one's residual: no broadcasting, no change of dtype, and the only one.

        A sum has the strides of its ``first`` operand, the operation those of x.
        """
        x = self.x
        if x is None or self.residual is not None or type(other) not in _PLAIN or other.is_inference():
            return False
        alike = (other.shape, other.dtype, other.device) == (x.shape, x.dtype, x.device)
        return alike and torch.is_grad_enabled() and not (first and other.stride() != x.stride())

    def settle(self) -> None:
        """Run the layer, alone, if it has not run yet."""
        x, self.x = self.x, None
        if x is not None:
            kept(self.layer)
            self._check(x)
            with torch.enable_grad():  # as it was when the promise was given
                self._output = self.layer(x)

    def value(self) -> Tensor:
        """The tensor, as the code would have made it without fusion."""
        self.settle()
        output, residual = cast(Tensor, self._output), self.residual
        if residual is None:
            return output
        with torch.enable_grad():
            return self.add(output, residual)

    def activated(self, activation: Activation) -> Tensor | None:
        """The tensor with ``activation`` behind it, in one operation; None where that can't be, or not any more."""
        if self.x is None or (self.residual is not None and not ops.maskable(activation.name)):
            return None
        x, residual, self.x, self.residual = self.x, self.residual, None, None
        kept(self.layer)
        self._check(x)
        return fused_batch_norm(self.layer, self.layer.gate, x, residual, activation.name, activation.slope)

    def _check(self, x: Tensor) -> None:
        if x._version != self._version:
            raise InplaceError(
                f"the input of a fused {type(self.layer).__name__} was modified in place before the activation behind "
                "it ran; use the out-of-place form of that operation, or convert with fuse=False"
            )


def start(layer: Any, x: Any) -> Any:
    """``layer(x)``, as a promise where ``layer`` is, or ends in, a batch normalisation that can wait."""
    if type(layer) in NORMALISATIONS and _can_wait(layer, x):
        return Deferred(layer, x)
    if runs_its_children(layer) and _may_wait(x) and not hooked(layer):
        return through(layer, x)
    return layer(x)


def link(layer: Any, a: Any) -> Any:
    """``layer(a)``; an identity hands a promise on."""
    if isinstance(a, Deferred) and type(layer) is nn.Identity and not hooked(layer):
        return a
    return layer(value(a))


def plus(a: Any, b: Any, inplace: bool = False) -> Any:
    """``a + b``, or ``a += b``: a promise where one of them is a promise that takes the other as its residual."""
    if isinstance(a, Deferred) and a.takes(b):
        return a.with_residual(b, inplace)
    if isinstance(b, Deferred) and not inplace and b.takes(a, first=True):
        return b.with_residual(a, inplace)
    return (operator.iadd if inplace else operator.add)(value(a), value(b))


def close(activation: Any, a: Any, *arguments: Any, **options: Any) -> Any:
    """``activation(a, …)``: one operation where ``a`` is a promise and the activation is known."""
    if isinstance(a, Deferred):
        # Whether it overwrites its input does not matter: nobody else holds that.
        known = _known(activation, arguments, options)
        output = a.activated(known) if known is not None else None
        if output is not None:
            return output
    return activation(value(a), *arguments, **options)


def overwrite(activation: Any, a: Any, *arguments: Any, **options: Any) -> Any:
    """What the tensor ``a`` is after the statement ``activation(a, …)``, which may have overwritten it."""
    if isinstance(a, Deferred):
        known = _known(activation, arguments, options)
        output = a.activated(known) if known is not None and known.inplace else None
        if output is not None:
            return output
    tensor = value(a)
    activation(tensor, *arguments, **options)
    return tensor


def value(a: Any) -> Any:
    """``a``, or the tensor it promises."""
    return a.value() if isinstance(a, Deferred) else a


def through(layers: Any, x: Any) -> Any:
    """The output of an ``nn.Sequential``, a promise where its last layer's is one."""
    for layer in layers:
        x = _STEPS.get(type(layer), _started)(layer, x)
    return x


def _started(layer: Any, a: Any) -> Any:
    return start(layer, value(a))


_STEPS: dict[type[nn.Module], Callable[[Any, Any], Any]] = {nn.Identity: link, **dict.fromkeys(MODULES, close)}


def forward(self: nn.Sequential, input: Any) -> Any:
    """``nn.Sequential``'s forward, its chains fused."""
    return value(through(self, input))


def runs_its_children(layer: Any) -> bool:
    """Whether ``layer`` is an ``nn.Sequential`` that is called as torch's are, fused or not."""
    if not isinstance(layer, nn.Sequential):
        return False
    own, kind = vars(layer).get("forward"), type(layer)
    plain = kind.forward is _SEQUENTIAL and kind.__call__ is _CALL
    return plain and (own is None or getattr(own, "__func__", None) is forward)


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or _has_any_global_hook()
        or nn.Module.__call__ is not _CALL
    )


_PLAIN = (Tensor, nn.Parameter)
# What a tool may have replaced since, to see or to change what every module does.
_CALL, _SEQUENTIAL, _BATCH_NORM = nn.Module.__call__, nn.Sequential.forward, F.batch_norm


def _may_wait(x: Any) -> bool:
    """Whether anything may run later than it was called, on ``x``."""
    return type(x) in _PLAIN and not torch.compiler.is_compiling() and torch.is_grad_enabled() and not _watched()


def _can_wait(layer: Any, x: Any) -> bool:
    """Whether ``layer`` may run later, as part of one operation that a kernel serves."""
    if torch.compiler.is_compiling() or hooked(layer) or "forward" in vars(layer) or F.batch_norm is not _BATCH_NORM:
        return False
    if layer.gate is not None and layer.gate.every_element:
        return False
    # The first says at a glance what the second takes its time to find out.
    if not direct.takes(layer, x) and not (_may_wait(x) and _served(layer, x)):
        return False
    layer._check_input_dim(x)
    settle(layer)
    return True


def _served(layer: Any, x: Tensor) -> bool:
    """Whether a kernel serves ``layer`` on ``x``, in the way torch would."""
    if x.is_inference() or x.device.type not in backends.PROVIDERS:
        return False
    fits = x.dim() >= 2 and x.numel() > x.shape[1] and _dense(x) and _fits(layer, x)
    return fits and backends.provider("batch_norm_act", x) is not backends.reference


def _dense(x: Tensor) -> bool:
    """Whether torch's batch normalisation, too, would give its output the strides of ``x``."""
    memory_format = _CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (memory_format is not None and x.is_contiguous(memory_format=memory_format))


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _fits(layer: Any, x: Tensor) -> bool:
    """Whether torch would take the layer's tensors for this input; where not, its own error is the best."""
    dtypes = (x.dtype, torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else (x.dtype,)
    shape, device = x.shape[1:2], x.device
    return all(
        t is None or (type(t) in _PLAIN and t.shape == shape and t.dtype in dtypes and t.device == device)
        for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    )


def _watched() -> bool:
    """Whether somebody follows single operations, or differentiates otherwise than by backward."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (torch._C._len_torch_function_stack() and _followed())
    )


def _followed() -> bool:
    """Whether a mode sees the functions that are called, other than one that says where new tensors go."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _known(activation: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Activation | None:
    """The call ``activation(a, …)``, if it is one that has an operation and nothing else happens in it."""
    if isinstance(activation, nn.Module):
        plain = not hooked(activation) and "forward" not in vars(activation)
        read = MODULES.get(type(activation)) if plain else None
    else:
        try:
            read = FUNCTIONS.get(activation)
        except TypeError:  # a callable that can't be hashed
            read = None
    return None if read is None else read(activation, arguments, options)
