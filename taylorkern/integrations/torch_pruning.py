"""Scores as the importance that Torch-Pruning's pruners rank by, for those who keep their pruner."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..blame import stacklevel
from ..scores import Scores


class Importance(torch_pruning.importance.Importance):
    """Torch-Pruning's importance of a group, by criterion ``criterion`` of ``scores``.

    Called with a ``torch_pruning`` group, it returns one float64 number per index of the group's root [n]: the sum of
    the importances of the units that any of the channels coupled with this index belongs to (one unit, where both
    couple alike). An index with a channel that no unit holds is infinitely important. None, which Torch-Pruning takes
    for "leave this group alone", stands for a group without another index, and, with a warning, for one that names
    channels which are not there, or that a grouped convolution or a group normalisation takes part in: Torch-Pruning
    cuts within such groups, a unit is a whole one.
    Attention is judged by heads (``num_heads=..., prune_num_heads=True, prune_head_dims=False``): within a head every
    dimension is as important as the head.

    Torch-Pruning ranks what is infinite last, and still takes it where a ``pruning_ratio`` leaves nothing else: name
    layers that must stay in its ``ignored_layers``. It replaces parameters by new objects, so optimisers must be made
    anew, and ``scores`` counts other channels afterwards: ``scores.detach()`` before ``pruner.step()``; for another
    step make new ``Scores`` and a new ``Importance``, and set ``pruner.importance``.

    Calling raises ValueError for a group of a model that ``scores`` is not of, or one that was cut since, and what
    ``Scores.importance`` raises.

    >>> import torch_pruning
    >>> from taylorkern import Scores, convert
    >>> model = convert(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)))
    >>> x = torch.rand(8, 1, 4, 4)
    >>> scores = Scores(model, x)
    >>> model(x).square().mean().backward()
    >>> scores.detach()
    >>> torch_pruning.pruner.BasePruner(model, x, Importance(scores), pruning_ratio=0.5).step()
    >>> model[0].out_channels, model[3].in_features, model[3].out_features
    (3, 12, 2)
    """

    def __init__(self, scores: Scores, criterion: str = "taylor_fo") -> None:
        self.scores, self.criterion = scores, criterion

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        model = self.scores.model
        names: dict[Any, str] = {part: name for name, part in (*model.named_modules(), *model.named_parameters())}
        self._check(group, names)
        held = list(self._held(group, names))
        if reason := _unfit(group, held, names):
            warnings.warn(f"{reason}; the group is left alone", stacklevel=stacklevel())
            return None
        importance = self.scores.importance(self.criterion)
        position = {index: i for i, index in enumerate(group[0].idxs)}
        found: set[tuple[int, int]] = set()  # (position, unit)
        for item, units in held:
            pairs = zip(item.root_idxs, units[torch.tensor(item.idxs, dtype=torch.int64)].tolist(), strict=True)
            found.update((position[root], unit) for root, unit in pairs if root is not None)
        return _summed(found, importance, len(position))

    def _check(self, group: Any, names: dict[Any, str]) -> None:
        strange = next((t for dep, _ in group if _holds_weights(t := dep.target.module) and t not in names), None)
        if strange is not None:
            raise ValueError(
                f"the scores are of another model: the group holds {strange}, which {type(self.scores.model).__name__} "
                "does not; make Scores of the very model that the pruner has"
            )
        if not self.scores.coupling.fits(self.scores.model):
            raise ValueError(
                "the model was cut since these scores were made, and they count its channels from before; make new "
                "Scores and a new Importance, and set pruner.importance"
            )

    def _held(self, group: Any, names: dict[Any, str]) -> Iterator[tuple[Any, Tensor]]:
        """The layers in the group, each with the units of its channels, -1 for none."""
        for item in group:
            node, outwards = item.dep.target, group._DG.is_out_channel_pruning_fn(item.dep.handler)
            units = self._units(names[node.module], node, outwards) if node.module in names else None
            if units is not None:
                yield item, units

    def _units(self, name: str, node: Any, outwards: bool) -> Tensor | None:
        """The units of the outputs or inputs of a layer, or None where its parameters say nothing about them."""
        coupling = self.scores.coupling
        if outwards and name in coupling.outputs:
            return coupling.outputs[name]
        return coupling.axes.get(_axis(name, node, outwards))


def _axis(name: str, node: Any, outwards: bool) -> tuple[str, int]:
    """Which dimension of which parameter Torch-Pruning cuts."""
    if isinstance(node.module, nn.Parameter):
        return name, node.pruning_dim % node.module.dim()
    if isinstance(node.module, _ConvTransposeNd):
        return f"{name}.weight", 1 if outwards else 0
    if isinstance(node.module, (_ConvNd, nn.Linear)):
        return f"{name}.weight", 0 if outwards else 1
    return f"{name}.weight", 1 if isinstance(node.module, nn.Embedding) else 0


def _unfit(group: Any, held: list[tuple[Any, Tensor]], names: dict[Any, str]) -> str:
    """Why the scores can't judge the group, or nothing."""
    grouped = next((dep.target.module for dep, _ in group if _in_groups(dep.target.module)), None)
    if grouped is not None:
        return (
            f"{names[grouped]} goes by groups: Torch-Pruning cuts within them, the scores are of whole ones "
            "(taylorkern.prune cuts those)"
        )
    for item, units in held:
        if max(item.idxs, default=0) >= len(units):
            name = names[item.dep.target.module]
            return f"Torch-Pruning couples channel {max(item.idxs)} of {name}, which has {len(units)}"
    return ""


def _holds_weights(target: Any) -> bool:
    return isinstance(target, nn.Parameter) or any(True for _ in target.parameters())


def _in_groups(target: Any) -> bool:
    if isinstance(target, _ConvNd):
        return 1 < target.groups != target.out_channels
    return isinstance(target, nn.GroupNorm) and target.num_groups > 1


def _summed(found: set[tuple[int, int]], importance: Tensor, count: int) -> Tensor | None:
    """The importances of all units at each of ``count`` positions; infinite where there is none, or one that stays."""
    place, units = torch.tensor(sorted(found), dtype=torch.int64).view(-1, 2).T.to(importance.device)
    padded = torch.cat([importance, importance.new_full((1,), torch.inf)])  # index -1 finds the last entry
    judged = torch.zeros(count, dtype=torch.bool, device=importance.device).index_fill_(0, place, True)
    total = importance.new_zeros(count).index_add_(0, place, padded[units])
    total = torch.where(judged, total, torch.inf)
    return total if bool(total.isfinite().any()) else None
