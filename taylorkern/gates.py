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

    def __init__(self, owner: "Scores") -> None:
        self._owner = weakref.ref(owner)
        self._leaves: dict[tuple[Any, ...], Tensor] = {}

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
        key = (samples, channels, accumulator(like.dtype), like.device)
        if key not in self._leaves:
            one = torch.ones((), dtype=key[2], device=like.device)
            self._leaves[key] = one.expand(samples, channels).detach().requires_grad_()
        return self._leaves[key]

    def leaves(self) -> list[Tensor]:
        """The leaves that forwards have taken lately."""
        return list(self._leaves.values())

    def drain(self) -> list[Tensor]:
        """Take the scores s [N, C] that have arrived since the last call."""
        arrived = [z.grad.detach() for z in self._leaves.values() if z.grad is not None]
        if arrived:
            self._leaves = {key: z for key, z in self._leaves.items() if z.grad is not None}
        for z in self._leaves.values():
            z.grad = None
        return arrived


def _inside_backward() -> bool:
    """Activation checkpointing runs forwards during backward; they belong to the minibatch under way."""
    return torch._C._current_graph_task_id() != -1
