"""Moments: what optimisers keep of every element of a parameter (momentum, Adam's averages), cut or cleared alike."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from .edits import Edit, clearing, item
from .slices import Indices, sliced
from .verification import SurgeryError

Names = Mapping[Tensor, str]

# One direction for all parameters together, from a history that none of their elements can leave.
_TOGETHER = (torch.optim.LBFGS,)


def cut_moments(optimizers: Iterable[Optimizer], keeps: Mapping[Tensor, Indices], names: Names) -> list[Edit]:
    """The edits that cut the states of the parameters in ``keeps`` to the indices that stay.

    A state may be of the parameter's shape, in any dtype and layout, or one number, and any nest of these. Raises
    SurgeryError, with the parameter's name, for another.
    """
    return [
        item(moment.state, moment.key, moment.mapped(lambda t, keep=keeps[moment.parameter]: sliced(t, keep)))
        for moment in _moments(optimizers, keeps, names)
        if moment.elements()
    ]


def clear_moments(optimizers: Iterable[Optimizer], zeros: Mapping[Tensor, Indices], names: Names) -> list[Edit]:
    """The edits that set the same states to nought at the indices ``zeros``. Raises SurgeryError likewise."""
    return [
        clearing(tensor, zeros[moment.parameter])
        for moment in _moments(optimizers, zeros, names)
        for tensor in moment.elements()
    ]


@dataclass(frozen=True)
class _Moment:
    """One entry of an optimiser's state of one parameter."""

    parameter: Tensor
    state: dict[str, Any]
    key: str

    def elements(self) -> list[Tensor]:
        """The tensors in it that have a number for every element of the parameter."""
        return [t for t in tree_leaves(self.state[self.key]) if self._per_element(t)]

    def mapped(self, change: Any) -> Any:
        """What it would be with each of those changed."""
        return tree_map(lambda leaf: change(leaf) if self._per_element(leaf) else leaf, self.state[self.key])

    def unclear(self) -> list[Tensor]:
        """The tensors in it that are neither per element nor one number."""
        found = [t for t in tree_leaves(self.state[self.key]) if isinstance(t, Tensor)]
        return [t for t in found if t.numel() != 1 and not self._per_element(t)]

    def _per_element(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.shape == self.parameter.shape


def _moments(optimizers: Iterable[Optimizer], concerned: Mapping[Tensor, Any], names: Names) -> Iterator[_Moment]:
    """Every entry about a parameter in ``concerned``, of the optimisers that have any such parameter."""
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p in concerned for p in parameters):
            # All are checked: an optimiser that keeps flat vectors of all parameters has them with the first.
            moments = [_Moment(p, s, key) for p in parameters for s in [optimizer.state.get(p, {})] for key in s]
            for moment in moments:
                _check(moment, optimizer, names.get(moment.parameter, "a parameter of another model"))
            yield from (moment for moment in moments if moment.parameter in concerned)


def _check(moment: _Moment, optimizer: Optimizer, name: str) -> None:
    what, unclear = f"{type(optimizer).__name__}'s {moment.key!r} of {name}", moment.unclear()
    if isinstance(optimizer, _TOGETHER):
        raise SurgeryError(
            f"{what} is about all parameters together, so nothing can be taken out of it: start a fresh optimiser "
            "after the cut, or give this one no parameter that loses channels"
        )
    if unclear:
        raise SurgeryError(
            f"{what} has shape {tuple(unclear[0].shape)}, neither the parameter's {tuple(moment.parameter.shape)} nor "
            "one number: its elements can't be told apart, so it can't be cut. If it comes from a file, load the "
            "pruner's state before the optimiser's; otherwise start a fresh optimiser after the cut"
        )
