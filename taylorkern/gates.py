"""Virtual gates: leaves of ones that multiply nothing, and whose gradients are the scores."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ops import accumulator

if TYPE_CHECKING:
    from .scores import Scores


def _no_gate() -> None:
    return None


class Gate:
    """The gate z [N, C] of one layer, for as long as the ``Scores`` that asked for it lives.

    A leaf is a stride-0 view of a single one, so it costs no memory; autograd puts s = dL/dz [N, C] into its
    ``.grad``. One leaf per shape: a layer that runs with several batch sizes in one step has several.
    Copies and pickles of a gated layer carry no gate: a copied model (an EMA, a checkpoint) scores nothing.
    """

    def __init__(self, owner: "Scores", every_element: bool = False) -> None:
        self.every_element = every_element  # whether a·dL/da itself is wanted as well, before the sum over S
        self._owner = weakref.ref(owner)
        self._leaves: dict[tuple[Any, ...], Tensor] = {}
        self._elements: dict[tuple[Any, ...], Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_gate, ()

    def owner(self) -> "Scores | None":
        """The Scores that asked for this gate, if it is still there."""
        return self._owner()

    def wanted(self) -> bool:
        """Whether a forward now should take the gate; every forward asks, so that a new minibatch is noticed."""
        owner = self._owner()
        if owner is None:
            return False
        arrived = any(z.grad is not None for z in self._leaves.values())
        if (arrived or owner.curvature_waits) and not _inside_backward():
            owner.fold()
            if torch.is_grad_enabled():
                owner.forget_curvature()  # of a forward that no backward followed
        return torch.is_grad_enabled()

    def leaf(self, samples: int, channels: int, like: Tensor) -> Tensor:
        """z [samples, channels] of ones on ``like``'s device, in the accumulator's dtype."""
        return _leaf(self._leaves, (samples, channels), like)

    def elements(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """A gate of ``shape`` [N, C, *S], whose gradient is a·dL/da, where one is wanted."""
        return _leaf(self._elements, shape, like) if self.every_element else None

    def leaves(self) -> list[Tensor]:
        """The leaves that forwards have taken lately."""
        return list(self._leaves.values())

    def drain(self) -> list[Tensor]:
        """Take the scores s [N, C] that have arrived since the last call."""
        arrived, self._leaves = _drained(self._leaves)
        return arrived

    def drain_elements(self) -> list[Tensor]:
        """Take the products a·dL/da [N, C, *S] that have arrived since the last call."""
        arrived, self._elements = _drained(self._elements)
        return arrived


def _leaf(leaves: dict[tuple[Any, ...], Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    key = (*shape, accumulator(like.dtype), like.device)
    if key not in leaves:
        one = torch.ones((), dtype=accumulator(like.dtype), device=like.device)
        leaves[key] = one.expand(shape).detach().requires_grad_()
    return leaves[key]


def _drained(leaves: dict[tuple[Any, ...], Tensor]) -> tuple[list[Tensor], dict[tuple[Any, ...], Tensor]]:
    """The gradients that have arrived, taken, and the leaves that are still of use."""
    arrived = [z.grad.detach() for z in leaves.values() if z.grad is not None]
    if arrived:
        leaves = {key: z for key, z in leaves.items() if z.grad is not None}
    for z in leaves.values():
        z.grad = None
    return arrived, leaves


def _inside_backward() -> bool:
    """Activation checkpointing runs forwards during backward; they belong to the minibatch under way."""
    return torch._C._current_graph_task_id() != -1
