"""Modes: whether units that are to go are cut at once, or masked and cut some day."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .copies import counterparts
from .coupling import Coupling, Unit
from .following import cut_and_follow, mask_and_follow
from .living import Living
from .masks import mask_of, masked_units


@dataclass(frozen=True)
class Subject:
    """A model, and what goes through its cuts and masks with it. Raises ValueError for a copy that is none."""

    model: nn.Module
    example_inputs: Any
    optimizers: tuple[Optimizer, ...]
    copies: tuple[nn.Module, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Any,
        optimizers: tuple[Optimizer, ...],
        copies: nn.Module | Iterable[nn.Module] | None,
    ) -> "Subject":
        return cls(model, example_inputs, optimizers, tuple(counterparts(model, copies)))

    def living(self, coupling: Coupling) -> Living:
        """The units of ``coupling`` that are not masked."""
        return Living(coupling, masked_units(self.model, coupling))

    def hold(self) -> None:
        """Whatever was loaded since the last call: what is masked is nought."""
        mask = mask_of(self.model)
        if mask is not None:
            mask.hold(self.model, self.copies)

    def cut(self, coupling: Coupling, removed: Tensor, gates: Tensor | None = None) -> list[Unit]:
        """Cut the units ``removed`` (indices), and all that are masked; returns them, in that order."""
        masked = masked_units(self.model, coupling)
        gone = torch.cat([removed, masked[~torch.isin(masked, removed)]])
        self._do(cut_and_follow, coupling, gone, gates)
        return [coupling.units[i] for i in gone.tolist()]

    def cut_only(self, coupling: Coupling, removed: Tensor) -> None:
        """Cut the units ``removed``; masked ones stay so."""
        self._do(cut_and_follow, coupling, removed, None)

    def mask(self, coupling: Coupling, removed: Tensor, gates: Tensor | None = None) -> list[Unit]:
        """Mask the units ``removed``, beside those that are masked already; returns them."""
        self._do(mask_and_follow, coupling, removed, gates)
        return [coupling.units[i] for i in removed.tolist()]

    def _do(self, follow: Callable[..., Any], coupling: Coupling, removed: Tensor, gates: Tensor | None) -> None:
        if len(removed) or gates is not None:
            follow(self.model, coupling, removed, self.example_inputs, self.optimizers, gates, self.copies)


Mode = Callable[[Subject, Coupling, Tensor, Tensor | None], list[Unit]]
MODES: dict[str, Mode] = {"cut": Subject.cut, "mask": Subject.mask}


def remove(mode: str, subject: Subject, living: Living, chosen: Tensor, gates: Tensor | None) -> list[Unit]:
    """Cut or mask the ``chosen`` units of the ``living`` ones, with the ``gates`` [L] of the others folded in."""
    whole = None
    if gates is not None:
        whole = torch.ones(len(living.whole.units), dtype=gates.dtype)
        whole[living.units] = gates.cpu()
    return MODES[mode](subject, living.whole, living.units[chosen], whole)


def check_mode(mode: str) -> None:
    """Raise ValueError for an unknown mode.

    >>> check_mode("mask")
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
