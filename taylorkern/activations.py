"""The activations that can run in one operation with a batch normalisation, and each way of writing them."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """A call of an activation: the operation's name for it, LeakyReLU's slope, and whether it overwrites its input."""

    name: str
    slope: float = 0.0
    inplace: bool = False


Reader = Callable[[Any, tuple[Any, ...], dict[str, Any]], Activation | None]


def _called(name: str, overwrites: bool = False, /, **parameters: Any) -> Reader:
    """Reads a call f(x, …) of a function with ``parameters`` behind x, as they are by default."""

    def read(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Activation | None:
        given = dict(zip(parameters, arguments, strict=False))
        if len(arguments) > len(parameters) or options.keys() - (parameters.keys() - given.keys()):
            return None
        given = {**parameters, **given, **options}
        return _activation(name, given.get("negative_slope", 0.0), given.get("inplace", overwrites))

    return read


def _module(name: str, kind: Any, function: Callable, slope: str = "", **fixed: float) -> Reader:
    """Reads a module, its slope in the attribute ``slope``, that is this activation where ``fixed`` is as it is.

    Profilers and interpreters of networks put their own in the place of ``kind.forward`` and of the ``function`` of
    torch.nn.functional that it calls; then it is not this activation either.
    """
    forward = kind.forward

    def read(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Activation | None:
        own = kind.forward is forward and getattr(F, function.__name__) is function
        if not own or arguments or options:
            return None
        if fixed and any(getattr(module, key) != value for key, value in fixed.items()):
            return None
        return _activation(name, getattr(module, slope) if slope else 0.0, module.inplace)

    return read


def _activation(name: str, slope: Any, inplace: Any) -> Activation | None:
    return Activation(name, float(slope), bool(inplace)) if isinstance(slope, (int, float)) else None


# ``t.relu()`` and ``t.relu_()`` as functions of t.
relu, relu_ = operator.methodcaller("relu"), operator.methodcaller("relu_")
METHODS = ("relu", "relu_")

FUNCTIONS: dict[Callable, Reader] = {
    F.relu: _called("relu", inplace=False),
    **dict.fromkeys((torch.relu, Tensor.relu, relu), _called("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_, F.relu_, relu_), _called("relu", True)),
    F.relu6: _called("relu6", inplace=False),
    F.leaky_relu: _called("leaky_relu", negative_slope=0.01, inplace=False),
    F.leaky_relu_: _called("leaky_relu", True, negative_slope=0.01),
    F.silu: _called("silu", inplace=False),
    F.hardswish: _called("hardswish", inplace=False),
}
MODULES: dict[type[nn.Module], Reader] = {
    nn.ReLU: _module("relu", nn.ReLU, F.relu),
    nn.ReLU6: _module("relu6", nn.ReLU6, F.hardtanh, min_val=0.0, max_val=6.0),
    nn.LeakyReLU: _module("leaky_relu", nn.LeakyReLU, F.leaky_relu, slope="negative_slope"),
    nn.SiLU: _module("silu", nn.SiLU, F.silu),
    nn.Hardswish: _module("hardswish", nn.Hardswish, F.hardswish),
}
