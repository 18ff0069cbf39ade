"""One cut to a target, by importances that somebody has, or by what the attached Scores say."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .coupling import Coupling, Unit
from .dense import Dense, check_target, check_whole
from .following import followed, known_coupling, listed
from .living import Judged
from .modes import Subject, check_mode, remove
from .recovery import Recovery
from .selection import Limits, ranked, selection
from .surgeon import COST_POWER, DAMPING
from .wrapped import refuse_wrapped


def prune(
    model: nn.Module,
    example_inputs: Any,
    importance: Tensor | None = None,
    *,
    criterion: str | None = None,
    target: float = 0.5,
    of: str = "flops",
    min_channels: int = 1,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    compensate: bool | None = None,
    damping: float = DAMPING,
    bound: float | None = None,
    cost_power: float = COST_POWER,
    mode: str = "cut",
    copies: nn.Module | Iterable[nn.Module] | None = None,
) -> list[Unit]:
    """Cut ``model`` once, least important units first, until ``target`` of its ``of`` is left; returns what went.

    ``importance`` [U] has one number per unit, in the order of the units of the ``Scores`` attached to the model, or
    without one of ``Scores(model, example_inputs).units``; ``of`` is "flops" (of the example inputs that found the
    units), "params" or "channels". In its place, ``criterion`` has the attached ``Scores`` decide: the name of any
    criterion, or "surgeon", which chooses a set by the curvature along all gates and has the channels that stay make
    up for it (see ``taylorkern.surgeon``). ``compensate`` turns that on for any choice, where the ``Scores`` keeps the
    curvature (``Scores(..., gram="auto")``), or off; ``damping`` and ``bound`` are its own. The surgeon
    divides a predicted increase by the cost saved to the power ``cost_power``: 1 weighs it in full, 0 not at all.

    ``mode`` "mask" leaves the shape of every tensor alone: the consumers' weights for the units become nought and are
    held there while training goes on, see ``taylorkern.masking``. Masked units keep their numbers, are not chosen again
    and count as gone; the next call with mode "cut" takes them away, with ``target=1.0`` them alone. ``copies``, one or
    several (``torch.optim.swa_utils.AveragedModel``), go through it with the model, see ``taylorkern.surgery.cut``.

    A ``Scores`` attached to the model follows the cut (starting anew where gates have moved, for what it holds is of
    others then), or is detached with a warning where its units are others. What
    the cut network computes is compared with the masked dense one, its gates multiplied, on the example inputs in
    evaluation mode, in float64 where the model runs in it; code that takes another branch for other inputs, or other
    numbers in training, is not seen.

    Raises ValueError for a target outside (0, 1] or out of reach, importances of the wrong length or NaN, a criterion
    without a ``Scores`` attached or without its statistics, a ``min_channels`` below 1, an unknown ``mode``, copies
    that are none, a curvature that is singular in spite of the damping; RuntimeError for a ``Scores`` without a single
    usable minibatch; and SurgeryError where the cut can't be verified or an optimiser can't go on. Everything is then
    as it was.

    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    >>> removed = prune(model, torch.rand(1, 1, 4, 4), torch.arange(8.0), target=0.5)
    >>> [unit.places for unit in removed]
    [(('0', 0),), (('0', 1),), (('0', 2),), (('0', 3),)]
    """
    check_target(target)
    check_whole("min_channels", min_channels)
    check_mode(mode)
    refuse_wrapped(model)
    if (importance is None) == (criterion is None):
        raise ValueError("pass either importance, one number per unit, or criterion, a name; not both and not neither")
    recovery = Recovery.of(criterion, compensate, damping, bound)
    scores = followed(model)
    if scores is None and (criterion is not None or recovery.wanted):
        raise ValueError(
            "no Scores with the units of this model is attached to it, to choose or to compensate by: make one with "
            "Scores(model, example_inputs, criteria=[...]), run minibatches with their backwards, then prune"
        )
    subject = Subject.of(model, example_inputs, listed(optimizer), copies)
    living = subject.living(known_coupling(model, example_inputs) if scores is None else scores.coupling)
    dense = Dense(model, living.coupling, of)
    limits = Limits(dense.meter, target * dense.total, min_channels)
    judged = None if scores is None else Judged(scores, living)
    if criterion is None:
        chosen = ranked(_checked(importance, living.whole)[living.units], living.coupling, limits)
    else:
        assert judged is not None
        chosen = selection(criterion, 0.0, damping, cost_power).choose(judged, limits)
    dense.check_reachable(living.coupling, target, min_channels, chosen)
    gates = None if judged is None else recovery.gates(judged, chosen)
    return remove(mode, subject, living, chosen, gates)


def _checked(importance: Any, coupling: Coupling) -> Tensor:
    """One float64 number per unit, or ValueError."""
    units = len(coupling.units)
    importance = torch.as_tensor(importance).detach().double().cpu()
    if importance.shape != (units,):
        raise ValueError(f"importance has shape {tuple(importance.shape)}, but this model has {units} units")
    if importance.isnan().any():
        raise ValueError(f"importance of unit {int(importance.isnan().nonzero()[0])} is NaN")
    return importance
