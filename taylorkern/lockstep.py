"""Lockstep: the minibatches of processes that take every step together, put together to those that the steps saw."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .minibatch import Values


class Lockstep:
    """Every minibatch's own values, in order, until those of all processes are put together.

    The loss of a step is the mean over processes of their losses, as ``DistributedDataParallel`` has it.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> logs = []
    >>> for G in (1.0, -3.0):
    ...     logs.append(Lockstep())
    ...     logs[-1].add(Values(G * one, one, one, None, {}, 8))
    >>> [values] = Lockstep.together([log.state_dict() for log in logs])
    >>> values.gate.item(), values.samples
    (-1.0, 16)
    """

    def __init__(self) -> None:
        self._values: list[Values] = []

    def add(self, values: Values) -> None:
        self._values.append(values)

    def keep(self, kept: Tensor) -> None:
        """Go on with the units ``kept`` [U'], indices, alone."""
        self._values = [values.mapped(lambda t: t[kept.to(t.device)]) for values in self._values]

    def reset(self, values: Iterable[Values] = ()) -> None:
        """Go on from these."""
        self._values = list(values)

    def extend(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Add those of a :meth:`state_dict`."""
        self._values += [Values(**values) for values in state]

    def state_dict(self) -> list[dict[str, Any]]:
        return [values.state_dict() for values in self._values]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self.reset(Values(**values) for values in state)

    @staticmethod
    def together(states: Sequence[Sequence[Mapping[str, Any]]]) -> list[Values]:
        """The i-th values of every process's :meth:`state_dict` as one minibatch's.

        Raises ValueError where not all have as many.
        """
        counts = [len(state) for state in states]
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes' minibatches don't match: they have {', '.join(map(str, counts))}, by rank. All must "
                "step alike and read scores alike, for reading ends a minibatch; or each prunes by itself, group=None"
            )
        return [_mean([Values(**values) for values in step]) for step in zip(*states, strict=True)]


def _mean(parts: Sequence[Values]) -> Values:
    """Of the mean of the parts' losses, whose samples are the minibatch's."""
    samples = sum(part.samples for part in parts)
    shares = [samples / (len(parts) * max(1, part.samples)) for part in parts]  # 1 where all have as many
    fishers = [part.fisher * share for part, share in zip(parts, shares, strict=True)]
    curved = [part.h for part in parts if part.h is not None]
    return Values(
        _average([part.gate for part in parts]),
        _average([part.bn_gate for part in parts]),
        _average(fishers),
        _average(curved) if curved else None,
        {name: _average([part.others[name] for part in parts]) for name in parts[0].others},
        samples,
    )


def _average(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([*tensors]).mean(0)
