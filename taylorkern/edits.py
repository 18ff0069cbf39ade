"""Edits: changes of tensors, optimisers' states and attributes that are made together or not at all."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .slices import Indices, clear_, sliced
from .state import replace_data


@dataclass(frozen=True)
class Edit:
    """One change, and the one that takes it back. Whatever can fail has been done when it is made."""

    do: Callable[[], None]
    undo: Callable[[], None]


def replacing(tensor: Tensor, new: Tensor, keep: Indices) -> Edit:
    """``tensor`` holds ``new``, and its gradient what is kept of it."""
    old, grad = tensor.data, tensor.grad if tensor.is_leaf else None
    new_grad = sliced(grad, keep) if grad is not None and keep else grad
    return Edit(lambda: replace_data(tensor, new, new_grad), lambda: replace_data(tensor, old, grad))


def overwriting(tensor: Tensor, new: Tensor) -> Edit:
    """``new`` is written into the memory of ``tensor``."""
    old = tensor.detach().clone()
    return Edit(lambda: _write(tensor, new), lambda: _write(tensor, old))


def clearing(tensor: Tensor, zeros: Indices) -> Edit:
    """Nought at ``zeros``, in the memory of ``tensor``."""
    held = {dim: tensor.detach().index_select(dim, indices.to(tensor.device)) for dim, indices in zeros.items()}

    def undo() -> None:
        with torch.no_grad():
            for dim, values in held.items():
                tensor.index_copy_(dim, zeros[dim].to(tensor.device), values)

    return Edit(lambda: clear_(tensor, zeros), undo)


def item(mapping: dict[str, Any], key: str, new: Any) -> Edit:
    """``mapping[key]`` is ``new``."""
    old = mapping[key]
    return Edit(lambda: mapping.__setitem__(key, new), lambda: mapping.__setitem__(key, old))


def attribute(module: nn.Module, name: str, new: Any) -> Edit:
    """The module's attribute is ``new``."""
    old = getattr(module, name)
    return Edit(lambda: setattr(module, name, new), lambda: setattr(module, name, old))


_confirmations: list[Callable[[], None]] = []


@contextmanager
def confirmed(confirm: Callable[[], None]) -> Iterator[None]:
    """Within, ``confirm`` is called when edits have been made, which are undone where it raises."""
    _confirmations.append(confirm)
    try:
        yield
    finally:
        _confirmations.remove(confirm)


def perform(edits: Iterable[Edit], attributes: Callable[[], Iterable[tuple[nn.Module, str, Any]]] = list) -> None:
    """Make all edits, then give the modules the ``attributes`` that this asks for; all undone where one fails.

    So they are where one is not :func:`confirmed`.
    """
    done: list[Edit] = []
    try:
        for edit in edits:
            done.append(edit)
            edit.do()
        for module, name, value in attributes():
            done.append(attribute(module, name, value))
            done[-1].do()
        for confirm in _confirmations:
            confirm()
    except BaseException:
        for edit in reversed(done):
            edit.undo()
        raise


def _write(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)
