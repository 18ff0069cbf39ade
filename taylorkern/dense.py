"""Dense: what the network cost before any cut, which targets are shares of, and whether a target can be reached."""

import torch
from torch import Tensor, nn

from . import budget
from .coupling import Coupling


class Dense:
    """What a pruner must remember of the network it started from."""

    def __init__(self, model: nn.Module, coupling: Coupling, of: str) -> None:
        self.meter = budget.Meter(model, coupling, of)
        self.total = self.meter.total
        self.fingerprint = coupling.fingerprint
        self.of = of

    def check_reachable(
        self, coupling: Coupling, target: float, min_channels: int, order: Tensor | None = None
    ) -> None:
        units = len(coupling.units)
        order = budget.removable(torch.zeros(units), coupling, min_channels) if order is None else order
        kept = torch.ones(units, dtype=torch.bool)
        kept[order] = False
        least = self.meter(kept)
        if least > target * self.total:
            raise ValueError(
                f"target={target} of {self.of} can't be reached: with every unit that may go removed "
                f"(min_channels={min_channels}), {least / self.total:.4f} would be left"
            )


def check_target(target: float) -> None:
    """Raise ValueError for a target outside (0, 1]."""
    if not 0 < target <= 1:
        raise ValueError(f"target={target} is the part that is kept; it must be above 0 and at most 1")


def check_whole(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value} must be a whole number of at least 1")
