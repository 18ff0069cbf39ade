"""Folding: how the gate gradients of some layers' channels, sample by sample, add up to sums over units."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from .backends import native
from .coupling import Coupling

BLOCK = 2**17  # elements that are widened to float64 at a time, to stay in cache: 1 MiB
_LAUNCHES = 2**24  # the same on other devices, where a launch costs more than memory does: 128 MiB

_FOLDINGS = 8  # kept at most: networks that skip layers at random have others in every minibatch


def block(device: torch.device) -> int:
    """How many elements to widen to float64 at a time."""
    return BLOCK if device.type == "cpu" else _LAUNCHES


class Folding:
    """Adds up s [N, P], the gate gradients of P channels, by units: Σ_n s[n, u] and Σ_n s[n, u]².

    s may come in pieces, [N, C] each, whose channels follow one another. ``units`` [P] holds each channel's unit, below
    ``count`` or -1 for none. In every sample the channels of a unit are added in the order they have there before
    anything is squared, in float64 and without atomics: the same s gives the same bits. Indices are made once and
    live on ``device``.

    >>> folding = Folding(torch.tensor([0, 1, 0, -1]), 3)
    >>> [sums.tolist() for sums in folding(torch.tensor([[1.0, 2.0, 3.0, 9.0], [1.0, 0.5, -1.0, 9.0]]))]
    [[4.0, 2.5, 0.0], [16.0, 4.25, 0.0]]
    """

    def __init__(self, units: Tensor, count: int, device: torch.device | None = None) -> None:
        self.count = count
        self._of_channels = units.cpu()
        self._runs: dict[tuple[int, ...], Tensor] = {}  # by the widths of the pieces
        numbers = torch.bincount(units + 1, minlength=count + 1)  # of channels, those of no unit first
        starts = numbers.cumsum(0)[:-1]
        numbers = numbers[1:]
        by_unit = units.argsort(stable=True)
        # Units with more channels come first, so that the ones that a further channel is added to are a beginning.
        order = numbers.argsort(descending=True, stable=True)
        rounds = [order[: int((numbers > i).sum())] for i in range(int(numbers.max()) if count else 0)]
        self._columns = [by_unit[starts[those] + i].to(device) for i, those in enumerate(rounds)]
        self._here = len(rounds[0]) if rounds else 0  # units that have a channel
        # Where a unit is in that order; behind all of them if it has none. Gathering needs no deterministic mode.
        places = torch.full((count,), self._here)
        places[order[: self._here]] = torch.arange(self._here)
        self._places = places.to(device)

    def __call__(self, *pieces: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_n s[n, u] and Σ_n s[n, u]², [count] each in float64; 0 for a unit without a channel here."""
        if native.folds(pieces):
            sums, squares = native.fold(pieces, self._runs_in(pieces), self.count)
            return sums, squares
        return self._by_torch(torch.cat(pieces, dim=1))

    def rows(self, *pieces: Tensor) -> Tensor:
        """s[n, u] itself, [N, count] in float64: what the sums are made of, added in the same order.

        >>> Folding(torch.tensor([0, 1, 0, -1]), 3).rows(torch.tensor([[1.0, 2.0, 3.0, 9.0]])).tolist()
        [[4.0, 2.0, 0.0]]
        """
        s = torch.cat(pieces, dim=1)
        return self._in_order(self._blocks(s), s.new_zeros(len(s), 1, dtype=torch.float64))

    def _runs_in(self, pieces: tuple[Tensor, ...]) -> Tensor:
        widths = tuple(piece.shape[1] for piece in pieces)
        if widths not in self._runs:
            self._runs[widths] = runs(self._of_channels, widths)
        return self._runs[widths]

    def _by_torch(self, s: Tensor) -> tuple[Tensor, Tensor]:
        blocks = [torch.stack([rows.sum(0), rows.square_().sum(0)]) for rows in self._blocks(s)]
        found = self._in_order(blocks, s.new_zeros(2, 1, dtype=torch.float64))
        return found[0], found[1]

    def _blocks(self, s: Tensor) -> Iterator[Tensor]:
        """s[n, u] [N, width] for one run of units after the other, in this object's order; each may be written to."""
        width = max(1, block(s.device) // max(1, len(s)))
        for start, end in pairwise([*range(0, self._here, width), self._here]):
            first, *more = [columns[start:end] for columns in self._columns if len(columns) > start]
            rows = s.index_select(1, first).double()
            for columns in more:
                rows[:, : len(columns)].add_(s.index_select(1, columns))
            yield rows

    def _in_order(self, blocks: Iterable[Tensor], none: Tensor) -> Tensor:
        """Columns of all units, from those of :meth:`_blocks`; ``none`` [., 1] for a unit without a channel here."""
        return torch.cat([*blocks, none], dim=1).index_select(1, self._places)


class LayersFolding:
    """The same for the scores of a coupling's layers, as they arrive: several batch sizes, not always all layers."""

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        self._foldings: dict[tuple[tuple[str, ...], torch.device], Folding] = {}

    def gradients(self, arrived: Mapping[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
        """G = Σ_n s[n, u] and mean_n s̃² with s̃ = N·s, [U] each; s[n, u] is the sum over the unit's places.

        ``arrived`` has s [N, C] by layer. Only scores of one batch size can be summed sample by sample.
        """
        gate = fisher = torch.zeros((), dtype=torch.float64)  # goes with every device
        for samples, scores, folding in self._groups(arrived):
            sums, squares = folding(*scores)
            gate, fisher = gate + sums, fisher + samples * squares
        return gate, fisher

    def rows(self, arrived: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """√N·s [N, U] of each batch size: their squares, summed over n, are mean_n s̃²."""
        return [folding.rows(*scores).mul_(samples**0.5) for samples, scores, folding in self._groups(arrived)]

    def _groups(self, arrived: Mapping[str, list[Tensor]]) -> Iterator[tuple[int, list[Tensor], Folding]]:
        groups: dict[int, list[tuple[str, Tensor]]] = {}
        for layer, scores in arrived.items():
            for s in scores:
                groups.setdefault(s.shape[0], []).append((layer, s))
        for samples, pieces in groups.items():
            scores = [s for _, s in pieces]
            yield samples, scores, self._folding(tuple(layer for layer, _ in pieces), scores[0].device)

    def _folding(self, layers: tuple[str, ...], device: torch.device) -> Folding:
        """How the channels of ``layers`` add up, kept for the minibatches to come: mostly the same layers score."""
        key = (layers, device)
        if key not in self._foldings:
            if len(self._foldings) == _FOLDINGS:
                self._foldings.clear()
            units = torch.cat([self._coupling.layers[layer] for layer in layers])
            self._foldings[key] = Folding(units, len(self._coupling.units), device)
        return self._foldings[key]


def runs(units: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Runs of channels with consecutive units: rows of piece, first channel in it, first unit and length (int64).

    ``units`` [P] holds the channels' units, -1 for none; ``widths`` are the channels of each piece, P together.

    >>> runs(torch.tensor([4, 5, 6, -1, 0, 1]), (2, 4)).tolist()
    [[0, 0, 4, 2], [1, 0, 6, 1], [1, 2, 0, 2]]
    """
    sizes = torch.tensor(widths, dtype=torch.int64)
    piece = torch.repeat_interleave(torch.arange(len(widths)), sizes)
    channel = torch.arange(len(units)) - (sizes.cumsum(0) - sizes)[piece]
    begins = torch.ones(len(units), dtype=torch.bool)
    begins[1:] = (units[1:] != units[:-1] + 1) | (piece[1:] != piece[:-1]) | (units[:-1] < 0)
    first = begins.nonzero().flatten()
    length = torch.diff(first, append=torch.tensor([len(units)]))
    found = torch.stack([piece[first], channel[first], units[first], length], dim=1)
    return found[units[first] >= 0].contiguous()
