"""One call of an operation as the rules see it, and the table of rules."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .labels import Axis, Ledger, Place, Plane, Strip

Strips = list[Strip]


@dataclass
class Carried:
    """What a tensor carries beside its numbers."""

    strips: Strips
    # The gateable layers whose output this is, and whether a zero of theirs is a zero here.
    makers: dict[str, bool] = field(default_factory=dict)
    is_view: bool = False
    # Labels of the channels of both factors that a product of activations is made of.
    mixed: tuple[Tensor, ...] = ()
    # Labels that freeze as soon as anything is done with this tensor, and where they were lost.
    owed: tuple[tuple[Tensor, Place], ...] = ()


@dataclass
class Contraction:
    """A multiply-accumulate: its flops are proportional to the part kept of each vector of labels."""

    flops: int
    vectors: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Split:
    """A dimension of labelled channels laid over ``options`` new ones, one of which can become shorter."""

    site: str
    options: int
    labels: Tensor


@dataclass(frozen=True)
class Number:
    """A size that the code of ``module`` hands to an operation: that of a line of labels."""

    module: str
    labels: Tensor


@dataclass
class Evidence:
    """What tracing gathers beside the ledger's labels."""

    contracted: set[Axis] = field(default_factory=set)
    consumers: set[Axis] = field(default_factory=set)  # those of them that can mask what is contracted
    filters: set[Axis] = field(default_factory=set)
    frontier: set[str] = field(default_factory=set)
    contractions: list[Contraction] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    inner: list[Tensor] = field(default_factory=list)  # labels that decide where attention looks, not what it carries


@dataclass
class Call:
    """One operation: its arguments by name, its outputs, and what the labelled arguments carry."""

    func: torch._ops.OpOverload
    arguments: dict[str, Any]
    inputs: list[Tensor]  # the tensor arguments, in order
    outputs: list[Tensor]
    ledger: Ledger
    evidence: Evidence
    layer: str | None  # the gateable layer that is running
    shape: torch.Size  # of the first tensor, before an in-place operation could change it
    stride: tuple[int, ...]  # likewise
    carried: Callable[[Tensor], Carried | None]
    choices: Mapping[str, int] = field(default_factory=dict)  # site of a split → which of its options is taken
    owned: frozenset[int] = frozenset()  # sizes that attributes of the running module hold
    makers: dict[str, bool] = field(default_factory=dict)  # of the outputs
    mixed: tuple[Tensor, ...] = ()  # of the outputs
    owed: list[tuple[Tensor, Place]] = field(default_factory=list)  # by the outputs
    counts: dict[str, Tensor] = field(default_factory=dict)  # argument → labels that it is the number of
    vectors: list[Tensor] = field(default_factory=list)  # flops are proportional to the part kept of each

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def strips(self, tensor: Tensor | None) -> Strips:
        """The labels of ``tensor``, each line by itself: what was laid over several dimensions stays together."""
        return [self.strip_of(strip) for strip in self.laid(tensor)]

    def laid(self, tensor: Tensor | None) -> Strips:
        """The labels of ``tensor`` with the planes that they lie in."""
        found = self.carried(tensor) if tensor is not None else None
        return found.strips if found else []

    def strip_of(self, strip: Strip) -> Strip:
        """``strip`` without its plane."""
        if strip.plane is not None:
            self.ledger.twins(strip.plane.rows(strip.dim))
        return strip.at(strip.dim)

    def labelled(self) -> list[Tensor]:
        """The tensor arguments, in order, that carry anything."""
        return [t for t in self.inputs if self.carried(t)]

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

    def owe(self, strips: Strips, dims: Iterable[int]) -> Strips:
        """As :meth:`keep_unless`, but what goes freezes only if the outputs are used for anything."""
        gone = set(dims)
        self.owed += [(s.labels, self.ledger.here) for s in strips if s.dim in gone]
        return [s for s in strips if s.dim not in gone]

    def single(self, strips: Strips, dim: int) -> Strip | None:
        """The one strip along ``dim``, or None; where several lie over one another they freeze."""
        found = [s for s in strips if s.dim == dim]
        if len(found) > 1:
            self.freeze(found)
            return None
        return found[0] if found else None

    def choose(self, options: list[int], plane: Plane) -> int:
        """Which dimension of ``plane`` the channels can go along; all others are tied. With no option left they stay.

        Options are tried one after the other, the same in all that the line of code splits.
        """
        site = f"{self.ledger.here.line or self.ledger.here.module}:{len(options)}"
        turn = self.choices.get(site, 0)
        stays = options[min(turn, len(options) - 1)]
        self.evidence.splits.append(Split(site, len(options), plane.labels))
        self.ledger.force(plane.rows(stays))
        if turn >= len(options):
            self.freeze([Strip(stays, plane.line(stays))])
        return stays

    def count(self, argument: str, labels: Tensor) -> None:
        """The number given as ``argument`` is that of ``labels``: it must follow them."""
        self.counts[argument] = labels
        self.number(labels)

    def number(self, labels: Tensor) -> None:
        """The running module hands the length of ``labels`` to this operation."""
        self.evidence.numbers.append(Number(self.ledger.here.module, labels))

    def lose_mixed(self) -> None:
        """A zero of what goes in is none of what comes out, so products in it only say where to look."""
        self.evidence.inner += self.mixed
        self.mixed = ()

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
            # Where they meet what has no labels they stay for good, and so does what is made of both.
            return [s.at(dim) for s in first] if all(lines) else []
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


def varying(t: Tensor, call: Call) -> Sequence[int]:
    """The shape of ``t``, with 1 for a dimension that it was only expanded along: there it fits whatever stays."""
    if call.carried(t) or 0 not in t.stride():
        return t.shape
    return [1 if step == 0 else size for size, step in zip(t.shape, t.stride(), strict=True)]
