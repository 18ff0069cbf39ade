"""The Gram matrix over units, H = E_b[Σ r rᵀ] over a minibatch's rows r: whole, in blocks, or by a sample of rows.

With rows √N·s[n, :], s the minibatch's gate gradients sample by sample and unit by unit, H is the gates' empirical
Fisher, whose diagonal is the statistic ``fisher``; with the rows of ``Scores.curvature`` it is the Gauss-Newton
matrix, or an unbiased estimate of it, whose diagonal is the statistic ``curvature``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .coupling import Unit
from .statistics import own

NEEDING_GRAM = ("surgeon",)  # chooses sets by the matrix, so it is no criterion that gives one number per unit
FISHER, CURVATURE = "fisher", "curvature"
READABLE = ("full", "blocks")
# Rows are collected until there are so many, then folded in by one product: a pass in every step would disturb it.
_TOGETHER = 256
_STRIPE = 2048  # rows of a matrix that are made at a time, up to the diagonal: half the work of the whole product


@dataclass(frozen=True)
class Block:
    """A part of a matrix over units: ``units`` [k], int64, ascending; ``matrix`` [k, k], float64, symmetric."""

    units: Tensor
    matrix: Tensor


class Gram(ABC):
    """What is kept of the rows, from one ``source``: curvature's if there are any, Fisher's until then."""

    form: str

    def __init__(self, count: int) -> None:
        self.count = count  # of units
        self.source = FISHER
        self.device = torch.device("cpu")

    def wants(self, source: str) -> bool:
        """Whether rows from ``source`` would count now."""
        return source in (self.source, CURVATURE)

    def add(self, rows: Sequence[Tensor], finite: int | Tensor, source: str) -> None:
        """Add a minibatch's rows, [n, U] each in float64, unless ``finite`` is 0.

        The first ones from another source than those so far take their place. But in a reservoir, nobody waits for a
        GPU to tell ``finite``.
        """
        if source != self.source:
            self.reset()
            self.source = source
        if rows:
            self._move_to(rows[0].device)
        self._add(rows, finite)

    def reset(self) -> None:
        """Forget every row."""
        self.source = FISHER
        self._clear()

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Raise ValueError unless a :meth:`state_dict` of the same form is there."""
        found = None if state is None else state["form"]
        if found != self.form:
            held = "no Gram matrix" if found is None else f"a Gram matrix as {found!r}"
            raise ValueError(
                f"these scores hold {held}, and here it is kept as {self.form!r}; pass the same gram= "
                "(a pruner keeps one with criterion='surgeon' or compensate=True)"
            )

    @abstractmethod
    def blocks(self, units: Sequence[Unit], form: str, minibatches: int) -> list[Block]:
        """The mean over ``minibatches``, "full" or "blocks"; reading changes nothing."""

    @abstractmethod
    def keep(self, kept: Tensor) -> None:
        """Go on with the units ``kept`` [U'], sorted indices, alone."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Copies of everything."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, to the bit, from a :meth:`state_dict` that :meth:`check` lets pass."""

    @abstractmethod
    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what a :meth:`state_dict` that :meth:`check` lets pass holds. Where sources differ, one must be empty."""

    @abstractmethod
    def _add(self, rows: Sequence[Tensor], finite: int | Tensor) -> None: ...

    @abstractmethod
    def _clear(self) -> None: ...

    @abstractmethod
    def _move_to(self, device: torch.device) -> None: ...


class Sums(Gram):
    """Σ r rᵀ itself, in float64: one matrix over all units ("full"), or one per layer ("blocks").

    Only lower triangles are kept up to date. Rows wait until there are ``_TOGETHER``; reading adds those that wait to
    a copy, so whether anybody reads has no influence on bits.
    """

    def __init__(self, form: str, units: Sequence[Unit]) -> None:
        super().__init__(len(units))
        self.form = form
        self._parts = PARTITIONS[form](units)
        self._sums = [torch.zeros(len(part), len(part), dtype=torch.float64) for part in self._parts]
        self._waiting: list[Tensor] = []

    def blocks(self, units: Sequence[Unit], form: str, minibatches: int) -> list[Block]:
        if form == self.form:
            parts, sums = self._parts, [total.clone() for total in self._sums]
        elif self.form == "full":
            parts = [part.to(self.device) for part in PARTITIONS[form](units)]
            sums = [self._sums[0][part.unsqueeze(1), part] for part in parts]
        else:
            raise ValueError(
                f"the Gram matrix is kept as {self.form!r}, which lacks what {form!r} needs: make the scores with "
                f"gram={form!r}, or gram='reservoir', or read gram({self.form!r})"
            )
        _add_products(sums, parts, self._waiting)
        return [_block(part, total, minibatches) for part, total in zip(parts, sums, strict=True)]

    def keep(self, kept: Tensor) -> None:
        new = torch.full((self.count,), -1)
        new[kept.cpu()] = torch.arange(len(kept))
        new = new.to(self.device)
        left = [
            (part, total, (new[part] >= 0).nonzero().flatten())
            for part, total in zip(self._parts, self._sums, strict=True)
        ]
        left = [(part, total, there) for part, total, there in left if len(there)]
        self._sums = [total[there.unsqueeze(1), there] for _, total, there in left]
        self._parts = [new[part[there]] for part, _, there in left]
        self._waiting = [rows[:, kept.to(rows.device)] for rows in self._waiting]
        self.count = len(kept)

    def state_dict(self) -> dict[str, Any]:
        waiting = torch.cat([torch.zeros(0, self.count, dtype=torch.float64, device=self.device), *self._waiting])
        sums = [total.clone() for total in self._sums]
        return {"form": self.form, "source": self.source, "sums": sums, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = [total.clone() for total in state["sums"]]
        self._waiting = [state["waiting"].clone()]
        self.source = state["source"]
        self._move_to(self.device)

    def merge(self, state: Mapping[str, Any]) -> None:
        self._move_to(self.device)
        for total, more in zip(self._sums, state["sums"], strict=True):
            total += more.to(self.device)
        self._wait(state["waiting"].to(self.device, copy=True))
        self.source = CURVATURE if CURVATURE in (self.source, state["source"]) else FISHER

    def _add(self, rows: Sequence[Tensor], finite: int | Tensor) -> None:
        for some in rows:
            if isinstance(finite, Tensor):
                some = torch.where(finite.bool(), some, 0.0)
            elif not finite:
                return
            if some.is_cuda and torch.cuda.is_current_stream_capturing():
                _add_products(self._sums, self._parts, [some])  # each replay adds its own rows, and none that wait
            else:
                self._wait(some)

    def _wait(self, rows: Tensor) -> None:
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _TOGETHER:
            _add_products(self._sums, self._parts, self._waiting)
            self._waiting = []

    def _clear(self) -> None:
        for total in self._sums:
            total.zero_()
        self._waiting = []

    def _move_to(self, device: torch.device) -> None:
        self._sums = [own(total, device) for total in self._sums]
        self._parts = [part.to(device) for part in self._parts]
        self._waiting = [rows.to(device) for rows in self._waiting]
        self.device = device


class Reservoir(Gram):
    """A uniform sample of ``capacity`` rows without replacement (Vitter's algorithm R), in float64.

    H is estimated from it without bias, and exactly while every row has a place.
    """

    form = "reservoir"

    def __init__(self, units: Sequence[Unit], capacity: int, seed: int) -> None:
        super().__init__(len(units))
        self.capacity, self._seed, self._seen = capacity, seed, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = torch.zeros(capacity, self.count, dtype=torch.float64)

    def blocks(self, units: Sequence[Unit], form: str, minibatches: int) -> list[Block]:
        rows, device = self._sample(), self._rows.device
        parts = [part.to(device) for part in PARTITIONS[form](units)]
        sums = [torch.zeros(len(part), len(part), dtype=torch.float64, device=device) for part in parts]
        _add_products(sums, parts, [rows])
        stands_for = max(1, self._seen) / max(1, len(rows))  # a row of the sample, so many of those seen
        return [_block(part, total, minibatches / stands_for) for part, total in zip(parts, sums, strict=True)]

    def keep(self, kept: Tensor) -> None:
        self._rows = self._rows[:, kept.to(self.device)]
        self.count = len(kept)

    def check(self, state: Mapping[str, Any] | None) -> None:
        super().check(state)
        assert state is not None
        if state["capacity"] != self.capacity:
            raise ValueError(
                f"these scores hold a reservoir of {state['capacity']} rows, and here it has {self.capacity}; pass the "
                "same gram_rows="
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "source": self.source,
            "capacity": self.capacity,
            "rows": self._sample().clone(),
            "seen": self._seen,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._move_to(self.device)
        self._rows[: len(state["rows"])] = state["rows"].to(self.device)
        self._generator.set_state(state["generator"].cpu())
        self._seen, self.source = state["seen"], state["source"]

    def merge(self, state: Mapping[str, Any]) -> None:
        """The sample becomes one of both's rows together, in which each row seen has the same chance."""
        self._move_to(self.device)
        seen = self._seen + state["seen"]
        mine = self._hypergeometric(self._seen, state["seen"], min(self.capacity, seen))
        theirs = min(self.capacity, seen) - mine
        rows = torch.cat([self._some(self._sample(), mine), self._some(state["rows"].to(self.device), theirs)])
        self._rows[: len(rows)] = rows
        self._seen = seen
        self.source = CURVATURE if CURVATURE in (self.source, state["source"]) else FISHER

    def _add(self, rows: Sequence[Tensor], finite: int | Tensor) -> None:
        if not int(finite):
            return
        for some in rows:
            numbers = torch.arange(self._seen + 1, self._seen + len(some) + 1)
            slots = (torch.rand(len(some), dtype=torch.float64, generator=self._generator) * numbers).long()
            slots = torch.where(numbers <= self.capacity, numbers - 1, slots)
            last = {slot: i for i, slot in enumerate(slots.tolist()) if slot < self.capacity}
            slot, row = (
                torch.tensor(of, dtype=torch.int64, device=self.device) for of in (list(last), [*last.values()])
            )
            self._rows[slot] = some[row]
            self._seen += len(some)

    def _clear(self) -> None:
        self._generator.manual_seed(self._seed)
        self._seen = 0

    def _move_to(self, device: torch.device) -> None:
        self._rows, self.device = own(self._rows, device), device

    def _sample(self) -> Tensor:
        return self._rows[: self._seen]

    def _hypergeometric(self, first: int, second: int, drawn: int) -> int:
        """How many of ``drawn`` rows, taken of ``first`` and ``second`` together, are of the first."""
        found = 0
        chances = torch.rand(drawn, dtype=torch.float64, generator=self._generator).tolist()
        for i, chance in enumerate(chances):
            found += chance * (first + second - i) < first - found
        return found

    def _some(self, rows: Tensor, number: int) -> Tensor:
        chosen = torch.randperm(len(rows), generator=self._generator)[:number].sort().values
        return rows[chosen.to(rows.device)]


def _whole(units: Sequence[Unit]) -> list[Tensor]:
    return [torch.arange(len(units))]


def _by_layer(units: Sequence[Unit]) -> list[Tensor]:
    """Units whose first places are in the same layer together."""
    layers: dict[str, list[int]] = {}
    for u, unit in enumerate(units):
        layers.setdefault(unit.places[0][0], []).append(u)
    return [torch.tensor(part) for part in layers.values()]


PARTITIONS: dict[str, Callable[[Sequence[Unit]], list[Tensor]]] = {"full": _whole, "blocks": _by_layer}


@dataclass(frozen=True)
class _Form:
    numbers: Callable[[Sequence[Unit], int], int]  # float64 that are held, of units and rows
    make: Callable[[Sequence[Unit], int, int], Gram]  # of units, rows and a seed
    instead: str


FORMS = {
    "full": _Form(
        lambda units, rows: len(units) ** 2,
        lambda units, rows, seed: Sums("full", units),
        "gram='blocks' keeps the products within a layer alone, gram='reservoir' a sample of gram_rows rows",
    ),
    "blocks": _Form(
        lambda units, rows: sum(len(part) ** 2 for part in _by_layer(units)),
        lambda units, rows, seed: Sums("blocks", units),
        "gram='reservoir' keeps a sample of gram_rows rows",
    ),
    "reservoir": _Form(
        lambda units, rows: rows * len(units),
        lambda units, rows, seed: Reservoir(units, rows, seed),
        "pass fewer gram_rows",
    ),
}


def gram_matrix(form: str, units: Sequence[Unit], budget: int, rows: int, seed: int) -> Gram:
    """A Gram matrix over ``units`` kept in ``form``, empty; "auto" is "full" within ``budget`` bytes, else "blocks".

    Raises ValueError for an unknown form, or one that takes more than the budget.
    """
    if form not in ("auto", *FORMS):
        raise ValueError(f"gram={form!r} is not one of 'auto', {', '.join(map(repr, FORMS))}, or None for none")
    if form == "auto":
        form = within(units, budget)
    needed = 8 * FORMS[form].numbers(units, rows)
    if needed > budget:
        raise ValueError(
            f"gram={form!r} takes {needed} bytes for {len(units)} units, more than gram_budget={budget}; "
            f"{FORMS[form].instead}"
        )
    return FORMS[form].make(units, rows, seed)


def within(units: Sequence[Unit], budget: int) -> str:
    """Whether a matrix over ``units`` is to be "full", as it is within ``budget`` bytes, or "blocks"."""
    return "full" if 8 * len(units) ** 2 <= budget else "blocks"


def _add_products(sums: Sequence[Tensor], parts: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """To every matrix add the lower triangle of Σ r rᵀ over its part of the units, in place."""
    if not rows:
        return
    together = torch.cat(list(rows))
    for total, part in zip(sums, parts, strict=True):
        mine = together if len(part) == together.shape[1] else together.index_select(1, part)
        for start in range(0, len(part), _STRIPE):
            end = start + _STRIPE
            total[start:end, :end].addmm_(mine[:, start:end].T, mine[:, :end])


def _block(units: Tensor, total: Tensor, count: float) -> Block:
    """The mean, of a sum that is written to: its lower triangle is divided and mirrored."""
    total /= count
    for start in range(0, len(total), _STRIPE):
        end = start + _STRIPE
        total[start:end, end:] = total[end:, start:end].T
        corner = total[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return Block(units, total)
