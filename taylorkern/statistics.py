"""Statistics: sums over minibatches of values per unit, where the scores arrive, and how many minibatches they hold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import backends

_COUNTS = {"minibatches": "count", "curved": "curved", "dropped": "dropped"}  # in a state: here


class Statistics:
    """Sums of values per unit, float64: [units, *shape] for each name and shape in ``shapes``.

    A minibatch is added whole or, where one of its numbers is not finite, dropped whole; the counts tell. Everything
    lives on the device where minibatches come from, and stays in its memory there.

    >>> statistics = Statistics({"gate": ()}, 2)
    >>> for value in (1.0, torch.nan, 3.0):
    ...     added = statistics.add({"gate": torch.full((2,), value, dtype=torch.float64)})
    >>> statistics.sums["gate"].tolist(), int(statistics.count), int(statistics.dropped)
    ([4.0, 4.0], 2, 1)
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], units: int) -> None:
        self._shapes = dict(shapes)
        self.device = torch.device("cpu")  # where the last minibatch came from
        self.reset(units)

    def reset(self, units: int) -> None:
        """Nought everywhere, for ``units`` units. Moving waits for a GPU, so everything stays where it is."""
        self.sums = {
            name: torch.zeros(units, *shape, dtype=torch.float64, device=self.device)
            for name, shape in self._shapes.items()
        }
        self.count, self.curved, self.dropped = (  # minibatches: in the sums, those of them with a curvature, left out
            torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(3)
        )

    def add(self, minibatch: Mapping[str, Tensor], curved: bool = False) -> int | Tensor:
        """Add a minibatch's values of these names, on one device; 1, or 0 where it was dropped, perhaps as a tensor."""
        self._move_to(next(iter(minibatch.values())).device)
        totals = [self.sums[name] for name in minibatch]
        found, finite = backends.accumulate(totals, [*minibatch.values()])
        if found is not totals:
            # Into the same memory: where a CUDA graph has captured this, the next replay adds to it.
            torch._foreach_copy_(totals, list(found))
        self.count += finite
        if curved:
            self.curved += finite
        self.dropped += 1 - finite
        return finite

    def keep(self, kept: Tensor) -> None:
        """Go on with the units ``kept`` [U'], indices, alone."""
        self.sums = {name: total[kept.to(total.device)] for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Copies of the sums, and the counts as numbers."""
        counts = {name: int(getattr(self, count)) for name, count in _COUNTS.items()}
        return {"sums": {name: total.clone() for name, total in self.sums.items()}, **counts}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless the :meth:`state_dict` ``state`` holds every statistic there is here."""
        missing = set(self._shapes) - set(state["sums"])
        if missing:
            raise ValueError(f"these scores lack the statistics {sorted(missing)}; pass the same criteria= as then")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` that :meth:`check` lets pass."""
        self.sums = {name: state["sums"][name].clone() for name in self._shapes}
        for name, count in _COUNTS.items():
            setattr(self, count, torch.tensor(state[name]))

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what a :meth:`state_dict` that :meth:`check` lets pass holds; sums stay in their memory."""
        self._move_to(self.device)
        for name, total in self.sums.items():
            total += state["sums"][name].to(self.device)
        for name, count in _COUNTS.items():
            getattr(self, count).add_(state[name])

    def _move_to(self, device: torch.device) -> None:
        self.sums = {name: own(total, device) for name, total in self.sums.items()}
        self.count, self.curved, self.dropped = (
            own(number, device) for number in (self.count, self.curved, self.dropped)
        )
        self.device = device


def own(total: Tensor, device: torch.device) -> Tensor:
    """``total`` on ``device``, where it may be written to at any time: not as an inference tensor."""
    return total.to(device, copy=total.is_inference())


def gathered(state: Mapping[str, Any], group: Any = None) -> list[dict[str, Any]]:
    """The ``state`` of every process in ``group``, by rank, on the CPU; RuntimeError where there is no such group."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("no process group is there: call torch.distributed.init_process_group first")
    if distributed.get_rank(group) < 0:
        raise RuntimeError("this process is not in the group that the scores are reduced over")
    states: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(states, _on_cpu(state), group=group)
    return states


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, Mapping):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else state
