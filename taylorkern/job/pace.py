"""The pace of pruning: how many rounds, and how many units go in each, so that the target is reached in time."""

import math
from dataclasses import dataclass

from .settings import Settings

LEAST_ROUNDS = 8  # however short the epochs are


def rounds(settings: Settings, per_epoch: int) -> int:
    """How many are planned: those that ``prune_epochs`` have room for, and at least ``LEAST_ROUNDS``."""
    return max(LEAST_ROUNDS, int(settings.prune_epochs * per_epoch) // settings.every)


@dataclass(frozen=True)
class Pace:
    """After ``done`` of ``planned`` rounds, ``units`` of ``dense`` are left, and ``kept`` of the measure."""

    planned: int
    done: int
    dense: int
    units: int
    kept: float

    def units_now(self, settings: Settings) -> int:
        """How many units are to go in the next round; those that would be too many for the target stay in any case.

        At first FLOPs and parameters are taken to go with the square of the widths, then as the rounds so far had it.

        >>> asked = Settings("model", "data", target=0.25)
        >>> Pace(10, 0, 1000, 1000, 1.0).units_now(asked), Pace(10, 5, 1000, 800, 0.75).units_now(asked)
        (50, 80)
        """
        gone = self.dense - self.units
        if gone and self.kept < 1:
            left = (self.kept - settings.target) * gone / (1 - self.kept)
        else:
            left = self.dense * (1 - (settings.target if settings.of == "channels" else math.sqrt(settings.target)))
        return max(1, math.ceil(left / max(1, self.planned - self.done)))
