"""Delivery: how compiled code hands scores to gates, for a leaf of the batch's shape can't be made inside a graph.

``deliver`` is an operation in a compiled backward. It takes a gate's gradient to the gate itself, by address, and
returns nought, the gradient of the gate's anchor: a number that stands in the graph for all the leaves there might be.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .ops import library


class Receiver(Protocol):
    """Whom scores are delivered to."""

    def take(self, s: Tensor) -> None: ...


_receivers: "WeakValueDictionary[int, Receiver]" = WeakValueDictionary()
_numbers = itertools.count()
_collected: list[dict[int, list[Tensor]]] = []

# Its effect is outside of the graph, so no recording of kernels may stand in for a call. It writes nothing to ``to``,
# but says so, for two calls with the same arguments, of a layer that runs twice, are not to be made one.
library.define(
    "deliver(Tensor s, Tensor(a!) to) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
)


def address(receiver: Receiver) -> Tensor:
    """A number that nobody else in this process has, for ``deliver`` to find ``receiver`` by while it lives.

    It is a tensor, for code is compiled once for all values of one, but anew for every number.
    """
    number = next(_numbers)
    _receivers[number] = receiver
    return torch.tensor(number)


@contextmanager
def collected() -> Iterator[dict[int, list[Tensor]]]:
    """Within, what is delivered goes into the dictionary, by address, and to no receiver."""
    found: dict[int, list[Tensor]] = {}
    _collected.append(found)
    try:
        yield found
    finally:
        _collected.remove(found)


def anchor() -> Tensor:
    """A leaf without elements to it: what is delivered in its name has a gradient of nought."""
    return torch.ones((), requires_grad=True)


def _deliver(s: Tensor, to: Tensor) -> Tensor:
    receiver = _receivers.get(number := int(to))
    if _collected:
        _collected[-1].setdefault(number, []).append(s.clone())
    elif receiver is not None:
        receiver.take(s.clone())  # compiled code goes on to use its memory
    return torch.zeros(())


library.impl("deliver", _deliver, "CompositeExplicitAutograd")


@torch.library.register_fake("taylorkern::deliver", lib=library)
def _(s: Tensor, to: Tensor) -> Tensor:
    return torch.empty(())
