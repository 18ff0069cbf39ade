"""What fused code runs: batch normalisations that wait for the addition and activation behind them.

``start`` hands on a promise of a normalisation's output instead of the output, ``link`` and ``plus`` pass it along, and
``close`` runs the chain as one operation. Each decides anew in every call. Whatever stands in the way (no gradients, a
hook, an activation or input that no kernel knows) makes the promise a tensor, by the code that was written.
"""

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from . import backends
from .autograd import InplaceError
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, fused_batch_norm, promised, settle

NORMALISATIONS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)

# ``t.relu()`` and ``t.relu_()`` as functions of t.
relu, relu_ = operator.methodcaller("relu"), operator.methodcaller("relu_")

# What can close a chain, and the operation's name for it.
MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu"}
FUNCTIONS: dict[Callable, str] = dict.fromkeys(
    (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, relu, relu_), "relu"
)
METHODS = ("relu", "relu_")


class Deferred:
    """The output of ``layer`` on ``x`` [N, C, *S], plus ``residual`` if one came; it runs when it is needed."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.layer = layer
        self.x: Tensor | None = x
        self.residual: Tensor | None = None
        self.add: Callable[[Any, Any], Tensor] = operator.add
        self._output: Tensor | None = None  # once the layer has run, alone
        self._read = [(x, x._version, "input")]
        promised(layer, self)

    def with_residual(self, residual: Tensor, inplace: bool) -> "Deferred":
        self.residual, self.add = residual, operator.iadd if inplace else operator.add
        self._read.append((residual, residual._version, "addend"))
        return self

    def takes(self, other: Any) -> bool:
        """Whether ``other`` can be this one's residual: no broadcasting, no change of dtype, and the first."""
        x = self.x
        if x is None or self.residual is not None or type(other) not in _PLAIN or other.is_inference():
            return False
        return (other.shape, other.dtype, other.device) == (x.shape, x.dtype, x.device)

    def settle(self) -> None:
        """Run the layer, alone, if it has not run yet."""
        x, self.x = self.x, None
        if x is not None:
            self._check()
            self._output, self._read = self.layer(x), self._read[1:]

    def value(self) -> Tensor:
        """The tensor, as the code would have made it without fusion."""
        self.settle()
        self._check()
        output, residual = cast(Tensor, self._output), self.residual
        return output if residual is None else self.add(output, residual)

    def activated(self, activation: str) -> Tensor | None:
        """The tensor with ``activation`` behind it, in one operation; None where the layer has run already."""
        if self.x is None:
            return None
        self._check()
        x, residual, self.x, self.residual, self._read = self.x, self.residual, None, None, []
        return fused_batch_norm(self.layer, self.layer.gate, x, residual, activation)

    def _check(self) -> None:
        for tensor, version, what in self._read:
            if tensor._version != version:
                raise InplaceError(
                    f"the {what} of a fused {type(self.layer).__name__} was modified in place before the activation "
                    "behind it ran; use the out-of-place form of that operation, or convert with fuse=False"
                )


def start(layer: Any, x: Any) -> Any:
    """``layer(x)``, as a promise where ``layer`` is, or ends in, a batch normalisation that can wait."""
    if type(layer) in NORMALISATIONS:
        return Deferred(layer, x) if _can_wait(layer, x) else layer(x)
    return through(layer, x) if runs_its_children(layer) and not hooked(layer) else layer(x)


def link(layer: Any, a: Any) -> Any:
    """``layer(a)``; an identity hands a promise on."""
    if isinstance(a, Deferred) and type(layer) is nn.Identity and not hooked(layer):
        return a
    return layer(value(a))


def plus(a: Any, b: Any, inplace: bool = False) -> Any:
    """``a + b``, or ``a += b``: a promise where one of them is a promise that takes the other as its residual."""
    if isinstance(a, Deferred) and a.takes(b):
        return a.with_residual(b, inplace)
    if isinstance(b, Deferred) and not inplace and b.takes(a):
        return b.with_residual(a, inplace)
    return (operator.iadd if inplace else operator.add)(value(a), value(b))


def close(activation: Any, a: Any, **options: Any) -> Any:
    """``activation(a, **options)``: one operation where ``a`` is a promise and the activation is known."""
    name = _known(activation) if isinstance(a, Deferred) else None
    # ``inplace`` is no more than a wish: nobody else holds the tensor that it would overwrite.
    if name is not None and options.keys() <= {"inplace"}:
        output = a.activated(name)
        if output is not None:
            return output
    return activation(value(a), **options)


def value(a: Any) -> Any:
    """``a``, or the tensor it promises."""
    return a.value() if isinstance(a, Deferred) else a


def through(layers: Any, x: Any) -> Any:
    """The output of an ``nn.Sequential``, a promise where its last layer's is one."""
    for layer in layers:
        if isinstance(x, Deferred):
            x = link(layer, x) if type(layer) is nn.Identity else close(layer, x)
        else:
            x = start(layer, x)
    return x


def forward(self: nn.Sequential, input: Any) -> Any:
    """``nn.Sequential``'s forward, its chains fused."""
    return value(through(self, input))


def runs_its_children(layer: Any) -> bool:
    """Whether ``layer`` is an ``nn.Sequential`` whose forward is torch's, fused or not."""
    own = vars(layer).get("forward") if isinstance(layer, nn.Sequential) else None
    plain = isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward
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
    )


_PLAIN = (Tensor, nn.Parameter)


def _can_wait(layer: Any, x: Any) -> bool:
    """Whether ``layer`` may run later, as part of one operation that a kernel serves."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or type(x) not in _PLAIN:
        return False
    if x.is_inference() or hooked(layer) or "forward" in vars(layer) or _watched():
        return False
    elements = layer.gate is not None and layer.gate.every_element
    fits = not elements and x.dim() >= 2 and x.numel() > x.shape[1] and _fits(layer, x)
    if not fits or x.device.type not in backends.PROVIDERS:
        return False
    layer._check_input_dim(x)
    settle(layer)
    return backends.provider("batch_norm_act", x) is not backends.reference


def _fits(layer: Any, x: Tensor) -> bool:
    """Whether torch would take the layer's tensors for this input; where not, its own error is the best."""
    dtypes = (x.dtype, torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else (x.dtype,)
    tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    return all(t is None or (len(t) == x.shape[1] and t.dtype in dtypes and t.device == x.device) for t in tensors)


def _watched() -> bool:
    """Whether somebody follows single operations, or differentiates otherwise than by backward."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _known(activation: Any) -> str | None:
    """The operation's name for ``activation``, if it has one and nothing else happens in a call of it."""
    if isinstance(activation, nn.Module):
        plain = not hooked(activation) and "forward" not in vars(activation)
        return MODULES.get(type(activation)) if plain else None
    try:
        return FUNCTIONS.get(activation)
    except TypeError:  # a callable that can't be hashed
        return None
