"""Labels: one integer per index of every parameter dimension, and the evidence about which go together."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Axis = tuple[str, int]  # (parameter or buffer name, dim)


@dataclass(frozen=True, slots=True)
class Plane:
    """The labels of channels that were laid over several dimensions, such as parts, heads and their inner width."""

    dims: tuple[int, ...]
    labels: Tensor  # int64 [sizes of dims]

    def line(self, dim: int) -> Tensor:
        """The labels along ``dim`` at the beginning of every other dimension."""
        return self.rows(dim)[0]

    def rows(self, dim: int) -> Tensor:
        """One row of labels along ``dim`` for every place in the other dimensions."""
        at = self.dims.index(dim)
        return self.labels.movedim(at, -1).reshape(-1, self.labels.shape[at])


@dataclass(frozen=True, slots=True)
class Strip:
    """Labels along one dimension of a tensor, constant along the others.

    This is a label plane of the tensor's shape, kept as the only line in it that varies. 0 stands for no label.
    Where channels were laid over several dimensions they can go along ``dim`` only; ``plane`` has them all.
    """

    dim: int
    labels: Tensor  # int64 [size of dim]
    axes: frozenset[Axis] = frozenset()  # where the labels come from, as long as the tensor is nothing but weights
    plane: Plane | None = None

    def at(self, dim: int) -> "Strip":
        """The same labels along another dimension, of which alone they are then."""
        return Strip(dim, self.labels, self.axes)

    def relabelled(self, labels: Tensor, dim: int | None = None) -> "Strip":
        return Strip(self.dim if dim is None else dim, labels, self.axes)

    def moved(self, new: Callable[[int], int]) -> "Strip":
        """The same with every dimension d at ``new(d)``."""
        plane = self.plane and Plane(tuple(new(d) for d in self.plane.dims), self.plane.labels)
        return Strip(new(self.dim), self.labels, self.axes, plane)

    def on(self, plane: Plane) -> "Strip":
        """The same channels as far as they are in ``plane``."""
        return Strip(self.dim, plane.line(self.dim), self.axes, plane if len(plane.dims) > 1 else None)


@dataclass(frozen=True)
class Place:
    """What ran where: an operation, the path of the module that called it, and the line of code."""

    operation: str
    module: str
    line: str = ""

    def __str__(self) -> str:
        at = f" ({self.line})" if self.line else ""
        return f"{self.operation} in {self.module or 'the model'}{at}"


@dataclass(frozen=True)
class Frozen:
    """Channels that can't be cut because ``operation``, called in ``module``, would not survive it.

    ``line`` is where in the model's code, "file.py:12", as far as it is known.
    """

    operation: str
    module: str
    labels: int
    axis: Axis
    line: str = ""


@dataclass
class Ledger:
    """Collects evidence while a model is traced: labels that go together, and labels that can't be cut."""

    here: Place = Place("", "")
    _starts: dict[Axis, int] = field(default_factory=dict)
    _sizes: dict[Axis, int] = field(default_factory=dict)
    _count: int = 1  # label 0 stands for none
    _pairs: list[tuple[Tensor, Tensor, Place]] = field(default_factory=list)
    _forced: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _twins: list[tuple[Tensor, Tensor]] = field(default_factory=list)
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
            self._pairs.append((*_each_with_first(rows), self.here))
        return rows[0]

    def force(self, rows: Tensor) -> None:
        """The same for channels that only the form of the code keeps together, not what is computed with them."""
        self._forced.append(_each_with_first(rows))

    def twins(self, rows: Tensor) -> None:
        """The rows of ``rows`` [R, n], tied before, are never told apart any more."""
        self._twins.append(_each_with_first(rows))

    def freeze(self, strips: Iterable[Strip], cause: str | None = None) -> None:
        """These labels can't be cut because of ``cause``, by default the operation that runs."""
        place = Place(cause, self.here.module) if cause else self.here
        self._frozen += [(strip.labels, place) for strip in strips]

    def freeze_labels(self, labels: Tensor, place: Place) -> None:
        """These labels can't be cut because of what happens at ``place``."""
        self._frozen.append((labels, place))

    def freeze_quietly(self, strips: Iterable[Strip]) -> None:
        """Freeze what nobody expects to be cut, such as the rows and columns of a kernel."""
        self._frozen += [(strip.labels, None) for strip in strips]

    def alike(self, labels: Tensor) -> Tensor:
        """Which labels are ``labels`` or their twins, bool [labels + 1]."""
        root = _connected(self._count, *_ends(self._twins)) if len(labels) else torch.arange(self._count)
        found = torch.isin(root, root[labels[labels > 0]])
        found[0] = False
        return found

    def components(self) -> "Components":
        """Which labels go together, and what froze which of them."""
        a, b, owner = self._stacked_pairs()
        both = (a > 0) & (b > 0)
        loose = _connected(self._count, a[both], b[both])
        forced = [(loose, torch.arange(self._count)), *self._forced]
        root = _connected(self._count, *_ends(forced)) if self._forced else loose
        alone = (a > 0) ^ (b > 0)
        places = [place for _, _, place in self._pairs]
        both_ends = torch.maximum(a, b)
        unmatched = [(both_ends[alone & (owner == i)], places[i]) for i in owner[alone].unique().tolist()]
        frozen = [(labels[labels > 0], place) for labels, place in [*self._frozen, *unmatched]]
        stuck = torch.zeros(self._count, dtype=torch.bool)
        for labels, _ in frozen:
            stuck[root[labels]] = True
        stuck[0] = True
        firm = torch.zeros(self._count, dtype=torch.bool)
        for labels, _ in frozen:
            firm[loose[labels]] = True
        return Components(
            root, loose, stuck[root], firm[loose], frozen, list(self._starts), torch.tensor([*self._starts.values()])
        )

    def axes(self) -> dict[Axis, Tensor]:
        """The labels of every axis."""
        return {axis: torch.arange(start, start + self._sizes[axis]) for axis, start in self._starts.items()}

    def per_axis(self, values: Tensor) -> dict[Axis, Tensor]:
        """``values`` [labels + 1] split up by the axis that each label belongs to."""
        return {axis: values[start : start + self._sizes[axis]].clone() for axis, start in self._starts.items()}

    def _stacked_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        a, b = _ends([(a, b) for a, b, _ in self._pairs])
        lengths = torch.tensor([len(a) for a, _, _ in self._pairs], dtype=torch.int64)
        return a, b, torch.arange(len(lengths)).repeat_interleave(lengths)


@dataclass(frozen=True)
class Components:
    """The sets of labels that go together: tensors [labels + 1], where label 0 stands for none."""

    root: Tensor  # the component of every label
    loose: Tensor  # the same but for what only the form of the code keeps together
    stuck: Tensor  # whether it is frozen
    firm: Tensor  # whether it is, however the code's splits are taken
    _frozen: list[tuple[Tensor, Place | None]]
    _axes: list[Axis]
    _starts: Tensor  # the first label of each of them

    def named(self, channels: Tensor) -> list[Frozen]:
        """What froze labels that go with the labels ``channels``, whatever is of no interest left out."""
        of_interest = torch.isin(self.loose, self.loose[channels])
        of_interest[0] = False
        found: dict[Place, list[Tensor]] = {}
        for labels, place in self._frozen:
            labels = labels[of_interest[labels]]
            if place is not None and len(labels):
                found.setdefault(place, []).append(labels)
        named = []
        for place, pieces in found.items():
            labels = torch.cat(pieces).unique()
            axis = self._axes[int(torch.searchsorted(self._starts, labels[0], right=True)) - 1]
            named.append(Frozen(place.operation, place.module, len(labels), axis, place.line))
        return named


def _each_with_first(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of every row's labels with those of the first."""
    return rows[:1].expand(len(rows) - 1, -1).reshape(-1), rows[1:].reshape(-1)


def _ends(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *(a for a, _ in pairs)]), torch.cat([none, *(b for _, b in pairs)])


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
