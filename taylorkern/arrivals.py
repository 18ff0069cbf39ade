"""Arrivals: what comes to the gates of one Scores, set apart by forwards, until a minibatch of it is taken."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .attachment import Attachment
from .boundary import Boundary, Told
from .coupling import Coupling
from .minibatch import Minibatch, Part
from .outputs import OutputShares
from .scaling import LossScale


class Arrivals:
    """Parts of the minibatch under way, and what has arrived at the gates since its last forward.

    ``summed`` says that the loss is a sum over samples; ``begins`` and ``ends`` are told of the optimisers' steps.
    ``shares`` makes a statistic of every element of the outputs, or is None.
    """

    def __init__(
        self, attachment: Attachment, optimizer: Optimizer | Iterable[Optimizer] | None, scaler: Any, summed: bool,
        shares: OutputShares | None, begins: Told, ends: Told,
    ) -> None:  # fmt: skip
        self.h: Tensor | None = None  # curvature [U] of the last forward
        self.rows: list[Tensor] = []  # those whose squares it is, if they are kept
        self.scale, self._boundary = LossScale(scaler), Boundary(optimizer, begins, ends)
        self._attachment, self._summed, self._shares = attachment, summed, shares
        self._parts: list[Part] = []
        self._backward: int | None = None  # that has delivered from compiled code since the last forward
        self._repeats = False  # whether its graph is kept for another one

    @property
    def expects_forward(self) -> bool:
        """Whether the next forward is to be told of even if no score has arrived."""
        return self.h is not None or self.scale.unknown

    def close(self, coupling: Coupling) -> None:
        """Set apart what the last forward's backwards have brought: what arrives from now on is another one's."""
        arrived = self._attachment.drain()
        if not arrived:
            return
        shares = None
        if self._shares:
            with torch.inference_mode(False), torch.no_grad():
                device = next(iter(arrived.values()))[0].device
                shares = self._shares(self._attachment.drain_elements(), coupling, device)
        self._parts.append(Part(arrived, self.h, self.rows, shares))
        self.forget_curvature()
        self._backward = None

    def ended(self) -> bool:
        """Whether a forward that begins now is another minibatch's than what was set apart."""
        return bool(self._parts) and (self._boundary.between_forwards or self.scale.fell())

    def begin(self) -> None:
        """A forward begins: a curvature that no backward followed is gone."""
        if torch.is_grad_enabled():
            self.forget_curvature()
            self.scale.note()

    def unseen_forward(self) -> bool:
        """In compiled code, whether there was a forward since the last backward, as there is if its graph is gone."""
        return self._backward is not None and not self._repeats

    def another_backward(self) -> bool:
        """Whether the backward that delivers now has not done so before."""
        return torch._C._current_graph_task_id() != self._backward

    def note_backward(self) -> None:
        """Remember the backward that delivers now."""
        self._backward = torch._C._current_graph_task_id()
        self._repeats = torch._C._autograd._get_current_graph_task_keep_graph()
        self.scale.note()

    def unstepped(self) -> bool:
        """Whether something was set apart that no optimiser's step has ended, though one would have told."""
        return bool(self._parts) and self._boundary.hooked

    def take(self) -> Minibatch | None:
        """What was set apart, as a minibatch; None where nothing was."""
        parts, self._parts = self._parts, []
        if not parts:
            return None
        factor = self.scale.factor()
        self.scale.end()
        return Minibatch(parts, factor, self._summed)

    def forget_curvature(self) -> None:
        self.h, self.rows = None, []

    def discard(self) -> None:
        """Forget what has arrived."""
        self._attachment.drain()
        self._attachment.drain_elements()
        self.forget_curvature()
        self._parts, self._backward = [], None
        self.scale.end()

    def detach(self) -> None:
        """Hear of no optimiser any more."""
        self._boundary.remove()
