"""Tally: what one Scores has added up since its last reset, and how that is saved, merged and reduced."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from .blame import stacklevel
from .gram import CURVATURE, FISHER, Block, Gram
from .lockstep import Lockstep
from .minibatch import Minibatch, Values
from .statistics import Statistics, gathered

FROM_CURVATURE = ("curvature", "change", "change_squared")  # of the minibatches that curvature() was called in
_FROM_SAMPLES = ("fisher", "fisher_change_squared")


class Tally:
    """Statistics of ``shapes`` for ``units`` units, a ``gram`` matrix over them or None, and what to say about them.

    ``layers`` are those that can score, ``summed`` says that losses are sums over samples, and ``lockstep`` that the
    i-th minibatches of all processes are to count as one.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], units: int, layers: Iterable[str], *, gram: Gram | None,
        lockstep: bool, summed: bool,
    ) -> None:  # fmt: skip
        self.statistics, self.gram = Statistics(shapes, units), gram
        self.lockstep = Lockstep() if lockstep else None
        self._layers, self._summed, self._units = frozenset(layers), summed, units
        self.reset()

    def reset(self) -> None:
        """Forget every minibatch so far."""
        self.statistics.reset(self._units)
        if self.gram:
            self.gram.reset()
        if self.lockstep:
            self.lockstep.reset()
        self.asked = 0  # calls of Scores.curvature
        self._processes = 1  # whose minibatches were put together
        self._silent = set(self._layers)
        self._uneven = ""

    def keep(self, kept: Tensor) -> None:
        """Go on with the units ``kept`` [U'], indices, alone."""
        self._units = len(kept)
        self.statistics.keep(kept)
        if self.gram:
            self.gram.keep(kept)
        if self.lockstep:
            self.lockstep.keep(kept)

    def rows_count(self, source: str) -> bool:
        """Whether a Gram matrix is kept that takes rows from ``source``."""
        return self.gram is not None and self.gram.wants(source)

    def add(
        self, minibatch: Minibatch, values: Values, rows: Callable[[Mapping[str, list[Tensor]]], list[Tensor]]
    ) -> None:
        """Add a minibatch, of these ``values``; ``rows`` makes those of a Gram matrix from what arrived in a part."""
        for part in minibatch.parts:
            self._silent.difference_update(part.arrived)
            self._uneven = self._uneven or _uneven(part.arrived)
        source = CURVATURE if minibatch.curved else FISHER
        found = minibatch.rows(rows) if self.rows_count(source) else []
        finite = self.statistics.add(values.statistics(), minibatch.curved)
        if self.lockstep:
            self.lockstep.add(values)
        if self.gram and self.rows_count(source):
            self.gram.add(found, finite, source)

    def mean(self, need: str) -> Tensor:
        """The statistic ``need`` per minibatch that it was added up over; warns where samples matter and are none.

        Raises RuntimeError where there is no such minibatch.
        """
        if self._summed or need in (*_FROM_SAMPLES, *FROM_CURVATURE):
            self._check_samples()
        return self.statistics.sums[need] / (self._curved() if need in FROM_CURVATURE else int(self.statistics.count))

    def blocks(self, read: Callable[[Gram, int], list[Block]]) -> list[Block]:
        """What ``read`` finds in the Gram matrix, told how many minibatches' rows are in it."""
        assert self.gram is not None
        self._check_samples()
        minibatches = self._curved() if self.gram.source == CURVATURE else int(self.statistics.count)
        return read(self.gram, minibatches * self._processes)

    def check_any(self, intact: bool) -> None:
        """Raise RuntimeError, with the reason, where no minibatch has been added; warn of layers that never scored.

        ``intact`` says whether the layers still carry the gates.
        """
        count, dropped = int(self.statistics.count), int(self.statistics.dropped)
        if count == 0 and dropped:
            raise RuntimeError(
                f"no score yet: all {dropped} minibatches had non-finite gradients and were dropped; look at the loss"
            )
        if count == 0 and not intact:
            raise RuntimeError(
                "no score yet, and none will come: the layers carry these gates no more, for the model was reverted, "
                "another Scores took over, or detach() was called; make a new Scores"
            )
        if count == 0:
            raise RuntimeError(
                "no score yet: no backward has reached a gate; run the model with gradients on, then loss.backward()"
            )
        if self._silent:
            warnings.warn(
                f"no gradient has reached the gates of {', '.join(sorted(self._silent))}: their channels score 0",
                stacklevel=stacklevel(),
            )

    def state_dict(self, fingerprint: str) -> dict[str, Any]:
        """All of it, for the model with this ``fingerprint``."""
        state = {
            "fingerprint": fingerprint,
            **self.statistics.state_dict(),
            "asked": self.asked,
            "silent": sorted(self._silent),
            "uneven": self._uneven,
            "processes": self._processes,
        }
        state |= {"lockstep": self.lockstep.state_dict()} if self.lockstep else {}
        return state | ({"gram": self.gram.state_dict()} if self.gram else {})

    def check_statistics(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless a :meth:`state_dict` holds everything that is added up here."""
        self.statistics.check(state)
        if self.gram:
            self.gram.check(state.get("gram"))
        if self.lockstep and "lockstep" not in state and state["minibatches"]:
            raise ValueError("these scores were not kept for several processes in lockstep; begin a round anew")

    def check(self, state: Mapping[str, Any], fingerprint: str) -> None:
        """Raise ValueError unless a :meth:`state_dict` is of the model with ``fingerprint`` and whole."""
        if state.get("fingerprint") != fingerprint:
            raise ValueError(
                "these scores belong to another model, or to this one before or after a cut: "
                f"fingerprint {state.get('fingerprint')!r}, here {fingerprint!r}"
            )
        self.check_statistics(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` that :meth:`check` lets pass."""
        self.statistics.load_state_dict(state)
        if self.gram:
            self.gram.load_state_dict(state["gram"])
        if self.lockstep:
            self.lockstep.load_state_dict(state.get("lockstep", []))
        self._processes = state.get("processes", 1)
        self.asked = state["asked"]
        self._silent, self._uneven = set(state["silent"]), state.get("uneven", "")

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a :meth:`state_dict` that :meth:`check` lets pass; ValueError for rows of two kinds, and no change."""
        if self.gram:
            self._check_sources(self.gram, state)
            self.gram.merge(state["gram"])
        if self.lockstep:
            self.lockstep.extend(state.get("lockstep", []))
        self.statistics.merge(state)
        self.asked += state["asked"]
        self._silent &= set(state["silent"])
        self._uneven = self._uneven or state.get("uneven", "")

    def all_reduce(self, fingerprint: str, group: Any) -> None:
        """Hold the minibatches of all processes in ``group``, merged by rank; see ``Scores.all_reduce``."""
        own = self.state_dict(fingerprint)
        states = gathered(own, group)
        try:
            for rank, state in enumerate(states):
                self.check(state, fingerprint)
                (self.merge if rank else self.load_state_dict)(state)
            if self.lockstep:
                self._in_lockstep(self.lockstep, [state.get("lockstep", []) for state in states])
        except ValueError:
            self.load_state_dict(own)
            raise

    def _in_lockstep(self, lockstep: Lockstep, logs: list[Any]) -> None:
        """Count the i-th minibatches of all ``logs`` as one."""
        values = Lockstep.together(logs)
        lockstep.reset(values)
        self.statistics.reset(self._units)
        for step in values:
            self.statistics.add(step.statistics(), step.h is not None)
        self._processes = len(logs)

    def _check_sources(self, gram: Gram, state: Mapping[str, Any]) -> None:
        sides = (gram.source, int(self.statistics.count)), (state["gram"]["source"], state["minibatches"])
        if len({source for source, minibatches in sides if source == CURVATURE or minibatches}) > 1:
            raise ValueError(
                f"rows of two kinds make no Gram matrix: {sides[1][0]!r} in these scores, {sides[0][0]!r} here; call "
                "scores.curvature in both or in neither"
            )

    def _check_samples(self) -> None:
        if self._uneven:
            warnings.warn(
                f"{self._uneven} in one minibatch: what a layer has first is taken for the samples, so h and the "
                "matrix over units are not those of the samples; give every layer [N, ...]",
                stacklevel=stacklevel(),
            )

    def _curved(self) -> int:
        if not int(self.statistics.curved):
            dropped = int(self.statistics.dropped)
            why = f"; {dropped} minibatches were dropped, for their gradients were not finite" if dropped else ""
            raise RuntimeError(
                "no curvature yet: call scores.curvature(logits, targets) after the forward and before "
                f"loss.backward(), with no other forward in between{why}"
            )
        return int(self.statistics.curved)


def _uneven(arrived: Mapping[str, list[Tensor]]) -> str:
    """Which two layers were given other numbers of samples, or "" where all are alike."""
    sizes = {layer: sorted({len(s) for s in scores}) for layer, scores in arrived.items()}
    first, *others = sizes
    other = next((layer for layer in others if sizes[layer] != sizes[first]), None)
    return "" if other is None else f"{first} was given {sizes[first]} samples and {other} {sizes[other]}"
