"""Peers: the processes of one training, which go on or fail together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """The processes of ``group`` and this one's ``rank`` of ``size``.

    >>> Peers.of("world").size
    1
    """

    group: Any
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: Any) -> "Peers":
        """Of "world", a ``torch.distributed`` group, or None: this process by itself, as where no group is there.

        Raises ValueError where this process is not in the group.
        """
        if group is None or not (distributed.is_available() and distributed.is_initialized()):
            return cls(None)
        group = None if group == "world" else group
        rank = distributed.get_rank(group)
        if rank < 0:
            raise ValueError("this process is not in the group= that it was given")
        return cls(group, rank, distributed.get_world_size(group))

    def together(self, act: Callable[[], T]) -> list[T]:
        """What ``act`` returns in each of them, by rank; where it raises in one, all raise, OSError where that did."""
        if self.size == 1:
            return [act()]
        found: T | None = None
        error: Exception | None = None
        try:
            found = act()
        except Exception as raised:
            error = raised
        told = None if error is None else f"{type(error).__name__}: {error}"
        outcomes: list[Any] = [None] * self.size
        distributed.all_gather_object(outcomes, (found, told, isinstance(error, OSError)), group=self.group)
        if error is not None:
            raise error
        for rank, (_, told, of_system) in enumerate(outcomes):
            if told:
                raise (OSError if of_system else RuntimeError)(f"process {rank} of {self.size} failed: {told}")
        return [outcome for outcome, *_ in outcomes]
