"""Labels: one integer per index of every parameter dimension, and the evidence about which go together."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Axis = tuple[str, int]  # (parameter or buffer name, dim)


@dataclass(frozen=True, slots=True)
class Strip:
    """Labels along one dimension of a tensor, constant along the others.

    This is a label plane of the tensor's shape, kept as the only line in it that varies. 0 stands for no label.
    """

    dim: int
    labels: Tensor  # int64 [size of dim]
    axes: frozenset[Axis] = frozenset()  # where the labels come from, as long as the tensor is nothing but weights

    def at(self, dim: int) -> "Strip":
        return Strip(dim, self.labels, self.axes)

    def relabelled(self, labels: Tensor, dim: int | None = None) -> "Strip":
        return Strip(self.dim if dim is None else dim, labels, self.axes)


@dataclass(frozen=True)
class Place:
    """What ran where: an operation and the path of the module that called it."""

    operation: str
    module: str

    def __str__(self) -> str:
        return f"{self.operation} in {self.module or 'the model'}"


@dataclass(frozen=True)
class Frozen:
    """Channels that can't be cut because ``operation``, called in ``module``, would not survive it."""

    operation: str
    module: str
    labels: int
    axis: Axis


@dataclass
class Ledger:
    """Collects evidence while a model is traced: labels that go together, and labels that can't be cut."""

    here: Place = Place("", "")
    _starts: dict[Axis, int] = field(default_factory=dict)
    _sizes: dict[Axis, int] = field(default_factory=dict)
    _count: int = 1  # label 0 stands for none
    _pairs: list[tuple[Tensor, Tensor, Place]] = field(default_factory=list)
    _frozen: list[tuple[Tensor, Place | None]] = field(default_factory=list)

    def strips(self, name: str, tensor: Tensor) -> list[Strip]:
        """New labels for every dimension of ``tensor`` that could be cut."""
        return [self._strip((name, dim), size) for dim, size in enumerate(tensor.shape) if size > 1]

    def _strip(self, axis: Axis, size: int) -> Strip:
        self._starts[axis], self._sizes[axis] = self._count, size
        self._count += size
        return Strip(axis[1], torch.arange(self._count - size, self._count), frozenset([axis]))

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Index by index, the labels of ``a`` and ``b`` are removed together; one that meets no label stays."""
        if a is not b:
            self._pairs.append((a, b, self.here))

    def tie(self, rows: Tensor) -> Tensor:
        """Unite the rows of ``rows`` [R, n], whose labels then stand for one another; returns the first."""
        if len(rows) > 1:
            self.unite(rows[:1].expand(len(rows) - 1, -1).reshape(-1), rows[1:].reshape(-1))
        return rows[0]

    def freeze(self, strips: Iterable[Strip], cause: str | None = None) -> None:
        """These labels can't be cut because of ``cause``, by default the operation that runs."""
        place = Place(cause or self.here.operation, self.here.module)
        self._frozen += [(strip.labels, place) for strip in strips]

    def freeze_quietly(self, strips: Iterable[Strip]) -> None:
        """Freeze what nobody expects to be cut, such as the rows and columns of a kernel."""
        self._frozen += [(strip.labels, None) for strip in strips]

    def components(self) -> tuple[Tensor, list[Frozen]]:
        """The component of every label [labels + 1], 0 where it is frozen, and what froze them."""
        a, b, owner = self._stacked_pairs()
        both = (a > 0) & (b > 0)
        root = _connected(self._count, a[both], b[both])
        alone = (a > 0) ^ (b > 0)
        places = [place for _, _, place in self._pairs]
        both_ends = torch.maximum(a, b)
        unmatched = [(both_ends[alone & (owner == i)], places[i]) for i in owner[alone].unique().tolist()]
        frozen = [(labels[labels > 0], place) for labels, place in [*self._frozen, *unmatched]]
        stuck = torch.zeros(self._count, dtype=torch.bool)
        for labels, _ in frozen:
            stuck[root[labels]] = True
        stuck[0] = True
        return root.masked_fill(stuck[root], 0), self._named(frozen)

    def per_axis(self, values: Tensor) -> dict[Axis, Tensor]:
        """``values`` [labels + 1] split up by the axis that each label belongs to."""
        return {axis: values[start : start + self._sizes[axis]].clone() for axis, start in self._starts.items()}

    def _stacked_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros(0, dtype=torch.int64)
        a = torch.cat([none, *(a for a, _, _ in self._pairs)])
        b = torch.cat([none, *(b for _, b, _ in self._pairs)])
        lengths = torch.tensor([len(a) for a, _, _ in self._pairs], dtype=torch.int64)
        return a, b, torch.arange(len(lengths)).repeat_interleave(lengths)

    def _named(self, frozen: Iterable[tuple[Tensor, Place | None]]) -> list[Frozen]:
        found: dict[Place, list[Tensor]] = {}
        for labels, place in frozen:
            if place is not None and len(labels):
                found.setdefault(place, []).append(labels)
        starts = torch.tensor(list(self._starts.values()), dtype=torch.int64)
        axes = list(self._starts)
        named = []
        for place, pieces in found.items():
            labels = torch.cat(pieces).unique()
            axis = axes[int(torch.searchsorted(starts, labels[0], right=True)) - 1]
            named.append(Frozen(place.operation, place.module, len(labels), axis))
        return named


def _connected(count: int, a: Tensor, b: Tensor) -> Tensor:
    """The smallest label in every label's component [count]: neighbours exchange minima, then pointers jump."""
    root = torch.arange(count)
    while True:
        low = torch.minimum(root[a], root[b])
        lower = root.clone()
        for ends in (a, b, root[a], root[b]):
            lower.scatter_reduce_(0, ends, low, "amin")
        while not torch.equal(hop := lower[lower], lower):
            lower = hop
        if torch.equal(lower, root):
            return root
        root = lower
