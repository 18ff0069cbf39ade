"""Virtual gates: leaves of ones that multiply nothing, and whose gradients are the scores."""

import warnings
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .blame import stacklevel
from .delivery import address, anchor
from .ops import accumulator

Key = tuple[Any, ...]
Addresses = tuple[Tensor, Tensor | None]  # of a gate's scores, and of its products a·dL/da where they are wanted


class Owner(Protocol):
    """What a gate tells, and asks, the ``Scores`` that asked for it."""

    @property
    def expects_forward(self) -> bool:
        """Whether a forward is to be told of even if no score has arrived since the last one."""

    def forward_begins(self) -> None: ...

    def forward_repeats(self) -> None: ...

    def backward_delivers(self) -> None: ...


def _no_gate() -> None:
    return None


class Gate:
    """The gate z [N, C] of one layer, for as long as the ``Scores`` that asked for it lives.

    A leaf is a stride-0 view of a single one, so it costs no memory; autograd puts s = dL/dz [N, C] into its
    ``.grad``. One leaf per shape: a layer that runs with several batch sizes in one step has several. Compiled code
    knows the :attr:`anchor` alone, and delivers (see ``taylorkern.delivery``).
    Copies and pickles of a gated layer carry no gate: a copied model (an EMA, a checkpoint) scores nothing.
    """

    def __init__(self, owner: Owner, every_element: bool = False) -> None:
        self.every_element = every_element  # whether a·dL/da itself is wanted as well, before the sum over S
        self._owner = weakref.ref(owner)
        self._leaves: dict[Key, Tensor] = {}
        self._elements: dict[Key, Tensor] = {}
        self.mailbox = Mailbox(self._owner)
        self.elements_mailbox = Mailbox(self._owner) if every_element else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_gate, ()

    def owner(self) -> Any:
        """The Scores that asked for this gate, if it is still there."""
        return self._owner()

    def wanted(self) -> bool:
        """Whether a forward now should take the gate; every forward asks, so that a new minibatch is noticed."""
        if torch.compiler.is_compiling():
            return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        owner = self._owner()
        if owner is None:
            return False
        arrived = any(z.grad is not None for z in self._leaves.values()) or self.mailbox.content
        if arrived or owner.expects_forward:
            (owner.forward_repeats if _inside_backward() else owner.forward_begins)()
        return torch.is_grad_enabled() and not _transformed()

    def leaf(self, samples: int, channels: int, like: Tensor) -> Tensor:
        """z [samples, channels] of ones on ``like``'s device, in the accumulator's dtype."""
        return _leaf(self._leaves, (samples, channels), like)

    def elements(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """A gate of ``shape`` [N, C, *S], whose gradient is a·dL/da, where one is wanted."""
        return _leaf(self._elements, shape, like) if self.every_element else None

    def leaves(self) -> list[Tensor]:
        """The leaves that forwards have taken lately."""
        return list(self._leaves.values())

    def anchors(self) -> tuple[Tensor, Tensor | None]:
        """What stands for :meth:`leaf` and :meth:`elements` in compiled code."""
        return self.mailbox.anchor, self.elements_mailbox.anchor if self.elements_mailbox else None

    def addresses(self) -> Addresses:
        """Where compiled code delivers the gradients of the two."""
        return self.mailbox.address, self.elements_mailbox.address if self.elements_mailbox else None

    def drain(self) -> list[Tensor]:
        """Take the scores s [N, C] that have arrived since the last call."""
        arrived, self._leaves = _drained(self._leaves)
        return arrived + self.mailbox.drain()

    def drain_elements(self) -> list[Tensor]:
        """Take the products a·dL/da [N, C, *S] that have arrived since the last call."""
        arrived, self._elements = _drained(self._elements)
        return arrived + (self.elements_mailbox.drain() if self.elements_mailbox else [])


class Mailbox:
    """Where compiled backwards deliver: :attr:`content` by shape, added up until it is drained."""

    def __init__(self, owner: "weakref.ref[Owner]") -> None:
        self._owner = owner
        self.content: dict[Key, Tensor] = {}
        self.address = address(self)
        self.anchor = anchor()
        self._node = torch.autograd.graph.get_gradient_edge(self.anchor).node

    def take(self, s: Tensor) -> None:
        """Add ``s``, in a backward that accumulates gradients; ``autograd.grad`` asks for others' alone."""
        owner = self._owner()
        if owner is None or not torch._C._will_engine_execute_node(self._node):
            return
        with torch.no_grad():
            owner.backward_delivers()
            key = (*s.shape, s.dtype, s.device)
            self.content[key] = self.content[key] + s if key in self.content else s

    def drain(self) -> list[Tensor]:
        """Take what has been delivered since the last call."""
        arrived, self.content = list(self.content.values()), {}
        return arrived


def _leaf(leaves: dict[Key, Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    key = (*shape, accumulator(like.dtype), like.device)
    if key not in leaves:
        one = torch.ones((), dtype=accumulator(like.dtype), device=like.device)
        leaves[key] = one.expand(shape).detach().requires_grad_()
    return leaves[key]


def _drained(leaves: dict[Key, Tensor]) -> tuple[list[Tensor], dict[Key, Tensor]]:
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


def _transformed() -> bool:
    """Whether this forward runs under ``torch.func``, whose gradients never come to a leaf; warns of it."""
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return False
    warnings.warn(
        "a scored network runs inside a torch.func transform (grad, vmap, jvp, ...) or with forward-mode gradients, "
        "which don't reach its gates: this forward is not scored, and computes what an unscored one does. Score with "
        "loss.backward()",
        stacklevel=stacklevel(),
    )
    return True
