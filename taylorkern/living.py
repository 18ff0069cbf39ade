"""Living: the units of a model that are not masked, numbered and judged as if the others had been cut."""

import torch
from torch import Tensor

from .compensation import adjustable
from .coupling import Coupling
from .gram import Block
from .scores import Scores


class Living:
    """The units of ``coupling`` but the ``masked`` ones (indices): ``units`` [L] are their indices, ascending.

    ``coupling`` is theirs alone, the one after a cut, with units 0..L-1.

    >>> from torch import nn
    >>> from taylorkern.coupling import couple
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> living = Living(couple(model, torch.rand(1, 2)), torch.tensor([1]))
    >>> living.units.tolist(), living.coupling.units[1].places, living.without(torch.tensor([2])).tolist()
    ([0, 2, 3], (('0', 1),), [0, 1])
    """

    def __init__(self, coupling: Coupling, masked: Tensor) -> None:
        self.whole = coupling
        self.units = coupling.staying(masked)[:-1].nonzero().flatten()
        self.coupling = coupling.keep(self.units) if len(masked) else coupling

    def without(self, removed: Tensor) -> Tensor:
        """What is left of 0..L-1, ascending, without the ``removed`` ones of them."""
        return self.coupling.staying(removed)[:-1].nonzero().flatten()


class Judged:
    """What ``scores`` say of the ``living`` units; every [L] is in their order."""

    def __init__(self, scores: Scores, living: Living) -> None:
        self._scores, self._living = scores, living
        self.coupling = living.coupling

    def importance(self, name: str) -> Tensor:
        """[L], see ``Scores.importance``."""
        return self._scores.importance(name).cpu()[self._living.units]

    def gram(self) -> list[Block]:
        """The Gram matrix over them, see ``Scores.gram``."""
        blocks = self._scores.gram()
        if self.coupling is self._living.whole:
            return blocks
        new = torch.full((len(self._living.whole.units),), -1)
        new[self._living.units] = torch.arange(len(self._living.units))
        found = [_restricted(block, new[block.units.cpu()]) for block in blocks]
        return [block for block in found if len(block.units)]

    def adjustable(self) -> Tensor:
        """Whose gates may be folded in, [L] bool, see ``compensation.adjustable``."""
        return adjustable(self._scores.model, self._living.whole)[self._living.units]


def _restricted(block: Block, new: Tensor) -> Block:
    """The part of ``block`` whose units have a number in ``new`` [k], which they get; the others' is -1."""
    rows = (new >= 0).nonzero().flatten()
    at = rows.to(block.matrix.device)
    return Block(new[rows], block.matrix.index_select(0, at).index_select(1, at))
