"""Recovery: whether and how far the gates of the units that stay make up for those that go."""

from dataclasses import dataclass

from torch import Tensor

from . import surgeon
from .living import Judged
from .selection import SURGEON


@dataclass(frozen=True)
class Recovery:
    """Whether gates make up at all, with which damping, and by how much each may move from 1 (None: freely)."""

    wanted: bool
    damping: float = surgeon.DAMPING
    bound: float | None = None

    @classmethod
    def of(cls, criterion: str | None, compensate: bool | None, damping: float, bound: float | None) -> "Recovery":
        """With ``compensate`` None, wanted where the surgeon chooses. Raises ValueError for numbers without meaning."""
        surgeon.check(damping, bound)
        return cls(criterion == SURGEON if compensate is None else compensate, damping, bound)

    def gates(self, judged: Judged, removed: Tensor) -> Tensor | None:
        """z [L] (float64) for the loss of ``removed`` (indices), or None where nothing is to be made up.

        Gates that no weight can take up (``compensation.adjustable``) stay at 1.
        """
        if not self.wanted or not len(removed):
            return None
        return 1 + surgeon.shift(judged.gram(), removed, self.damping, self.bound, ~judged.adjustable())
