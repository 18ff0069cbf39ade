"""Example inputs: how a model is run on them, and what comes out."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Call ``model`` on ``example_inputs``: a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    >>> run(nn.Identity(), torch.ones(2)).tolist(), run(nn.Identity(), (torch.ones(2),)).tolist()
    ([1.0, 1.0], [1.0, 1.0])
    """
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nested structure of mappings, sequences and dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) or type(value).__module__ == "types":
        yield from tensors(vars(value))


def converted(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)  # of the same class: some are read by attribute
        for key, item in value.items():
            changed[key] = converted(item, change)
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(converted(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(converted(item, change) for item in value)
    return value


def copied(example_inputs: Any) -> Any:
    """The same example in tensors of its own, for a model that overwrites its inputs."""
    return converted(example_inputs, Tensor.clone)


def repeated(example_inputs: Any) -> Any:
    """The same example with every batch of one repeated to two, for layers that need two samples in training."""

    def twice(t: Tensor) -> Tensor:
        return t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() and t.shape[0] == 1 else t

    return converted(example_inputs, twice)


def in_float64(example_inputs: Any) -> Any:
    """The same example with every floating-point tensor in float64."""
    return converted(example_inputs, lambda t: t.to(torch.float64) if t.is_floating_point() else t)
