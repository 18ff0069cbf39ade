"""One call of an operation as the rules see it, and the table of rules."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .labels import Axis, Ledger, Strip

Strips = list[Strip]


@dataclass
class Carried:
    """What a tensor carries beside its numbers."""

    strips: Strips
    # The gateable layers whose output this is, and whether a zero of theirs is a zero here.
    makers: dict[str, bool] = field(default_factory=dict)
    is_view: bool = False


@dataclass
class Contraction:
    """A multiply-accumulate: its flops are proportional to the part kept of each vector of labels."""

    flops: int
    vectors: list[Tensor] = field(default_factory=list)


@dataclass
class Evidence:
    """What tracing gathers beside the ledger's labels."""

    consumers: set[Axis] = field(default_factory=set)
    filters: set[Axis] = field(default_factory=set)
    frontier: set[str] = field(default_factory=set)
    contractions: list[Contraction] = field(default_factory=list)


@dataclass
class Call:
    """One operation: its arguments by name, its outputs, and what the labelled arguments carry."""

    func: torch._ops.OpOverload
    arguments: dict[str, Any]
    outputs: list[Tensor]
    ledger: Ledger
    evidence: Evidence
    layer: str | None  # the gateable layer that is running
    shape: torch.Size  # of the first tensor, before an in-place operation could change it
    stride: tuple[int, ...]  # likewise
    carried: Callable[[Tensor], Carried | None]
    makers: dict[str, bool] = field(default_factory=dict)  # of the outputs
    vectors: list[Tensor] = field(default_factory=list)  # flops are proportional to the part kept of each

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def strips(self, tensor: Tensor | None) -> Strips:
        found = self.carried(tensor) if tensor is not None else None
        return found.strips if found else []

    def labelled(self) -> list[Tensor]:
        """The tensor arguments, in order, that carry anything."""
        return [t for t in self.tensors() if self.carried(t)]

    def tensors(self) -> list[Tensor]:
        return [t for t in tree_leaves(list(self.arguments.values())) if isinstance(t, Tensor)]

    def freeze(self, strips: Iterable[Strip]) -> None:
        self.ledger.freeze(strips)

    def freeze_along(self, strips: Strips, dims: Iterable[int]) -> Strips:
        """Freeze the strips along ``dims``. All are returned: even frozen labels tell later operations who they are."""
        stuck = set(dims)
        self.freeze(s for s in strips if s.dim in stuck)
        return strips

    def keep_unless(self, strips: Strips, dims: Iterable[int]) -> Strips:
        """The strips along other dimensions than ``dims``, which go or change; those along them freeze."""
        stuck = set(dims)
        return [s for s in self.freeze_along(strips, stuck) if s.dim not in stuck]

    def single(self, strips: Strips, dim: int) -> Strip | None:
        """The one strip along ``dim``, or None; where several lie over one another they freeze."""
        found = [s for s in strips if s.dim == dim]
        if len(found) > 1:
            self.freeze(found)
            return None
        return found[0] if found else None

    def consume(self) -> None:
        """The inputs' channels end here: whoever made them is the last place to put a gate."""
        self.evidence.frontier.update(self.makers)
        self.makers = {}

    def meet(self, members: Sequence[tuple[Sequence[int], Strips]], shape: Sequence[int]) -> Strips:
        """Tensors of the given shapes meet element by element, broadcast to ``shape``: unite what lies together."""
        met: Strips = []
        for dim, size in enumerate(shape):
            if size > 1:
                met += self._meet_along(
                    dim, [_along(m, dim, len(shape)) for m in members if _size(m, dim, shape) == size]
                )
        return met

    def _meet_along(self, dim: int, lines: list[Strips]) -> Strips:
        first = max(lines, key=len, default=[])
        if any(len(line) != len(first) for line in lines):
            self.freeze(s for line in lines for s in line)
            return [s.at(dim) for s in first]
        met = []
        for strips in zip(*lines, strict=True):
            for other in strips[1:]:
                self.ledger.unite(strips[0].labels, other.labels)
            weights = frozenset().union(*(s.axes for s in strips)) if all(s.axes for s in strips) else frozenset()
            met.append(Strip(dim, strips[0].labels, weights))
        return met


def _size(member: tuple[Sequence[int], Strips], dim: int, shape: Sequence[int]) -> int:
    own = dim - (len(shape) - len(member[0]))
    return member[0][own] if own >= 0 else 1


def _along(member: tuple[Sequence[int], Strips], dim: int, rank: int) -> Strips:
    return [s for s in member[1] if s.dim + rank - len(member[0]) == dim]


# A rule returns the strips of each output tensor; outputs beyond its list carry none.
Rule = Callable[[Call], list[Strips]]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations by name; it serves their in-place forms too."""

    def register(function: Rule) -> Rule:
        _RULES.update((f"aten::{name}", function) for name in names)
        return function

    return register


@cache
def rule_for(func: torch._ops.OpOverload) -> Rule | None:
    name = func._schema.name
    found = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    return _RULES["aten::add"] if found is None and torch.Tag.pointwise in func.tags else found


def not_understood(call: Call) -> list[Strips]:
    """Freeze everything that comes near an operation without a rule."""
    for tensor in call.labelled():
        call.freeze(call.strips(tensor))
    call.consume()
    return []


@cache
def signature(func: torch._ops.OpOverload) -> dict[str, Any]:
    """The names of an operation's arguments, in order, with their defaults."""
    return {a.name: a.default_value if a.has_default_value() else None for a in func._schema.arguments}


def wrapped(dim: int, rank: int) -> int:
    return dim % rank if rank else 0
