"""Running a model without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its first name; one that has several names appears once."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{name} is not initialised yet: run the model once, then couple it")
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within, the model may run in any mode; afterwards its modes, buffers and the random state are as before.

    So are its modules' other attributes, and lists and dictionaries among them, but not what is deeper inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    kept = [(module, _plain(module)) for module in model.modules()]
    devices = {t.device.index or 0 for t in model.parameters() if t.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for module, attributes in kept:
            _put_back(module, attributes)
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _plain(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attributes of ``module`` by name, each with a copy of what is in it if it is a list or a dictionary."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return {name: (value, copy(value) if type(value) in (list, dict) else None) for name, value in own.items()}


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in vars(module) if name not in _OF_EVERY_MODULE and name not in attributes]:
        del vars(module)[name]
    for name, (value, inside) in attributes.items():
        vars(module)[name] = value
        if inside is not None:
            value.clear()
            value.extend(inside) if isinstance(value, list) else value.update(inside)


def stand_in(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are others, on the same data; itself where it can't be copied.

    >>> layer = nn.Linear(2, 2)
    >>> other = stand_in(layer)
    >>> other.weight is layer.weight, other.weight.data_ptr() == layer.weight.data_ptr()
    (False, True)
    """
    named = named_tensors(model).values()
    aliases = {
        id(t): nn.Parameter(t.detach(), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach() for t in named
    }
    try:
        other = deepcopy(model, aliases)
    except Exception:  # whatever a module may hold
        return model
    for module in other.modules():
        module._compiled_call_impl = None  # it would run the original
    return other


def replace_data(tensor: Tensor, data: Tensor, gradient: Tensor | None = None) -> None:
    """Give a parameter or buffer other data and another gradient, of any shape, without changing its identity."""
    if tensor.is_leaf:
        tensor.grad = None
    # A living graph keeps the accumulator of the old shape, which torch replaces only where the dtype changes.
    passing = torch.float32 if data.dtype == torch.float16 else torch.float16
    tensor.data = torch.empty(0, dtype=passing, device=data.device)
    tensor.data = data
    if gradient is not None:
        tensor.grad = gradient
