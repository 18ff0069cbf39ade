"""Folding: how the gate gradients of some layers' channels, sample by sample, add up to sums over units."""

from itertools import pairwise

import torch
from torch import Tensor

from .backends import native

BLOCK = 2**17  # elements that are widened to float64 at a time, to stay in cache: 1 MiB
_LAUNCHES = 2**24  # the same on other devices, where a launch costs more than memory does: 128 MiB


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

    def _runs_in(self, pieces: tuple[Tensor, ...]) -> Tensor:
        widths = tuple(piece.shape[1] for piece in pieces)
        if widths not in self._runs:
            self._runs[widths] = runs(self._of_channels, widths)
        return self._runs[widths]

    def _by_torch(self, s: Tensor) -> tuple[Tensor, Tensor]:
        width = max(1, block(s.device) // max(1, len(s)))
        ends = [*range(0, self._here, width), self._here]
        none = s.new_zeros(2, 1, dtype=torch.float64)
        found = torch.cat([*(self._block(s, start, end) for start, end in pairwise(ends)), none], dim=1)
        found = found.index_select(1, self._places)
        return found[0], found[1]

    def _block(self, s: Tensor, start: int, end: int) -> Tensor:
        """Both sums [2, end - start] for a run of units, in this object's order."""
        first, *more = [columns[start:end] for columns in self._columns if len(columns) > start]
        rows = s.index_select(1, first).double()  # [N, end - start]
        for columns in more:
            rows[:, : len(columns)].add_(s.index_select(1, columns))
        return torch.stack([rows.sum(0), rows.square_().sum(0)])


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
