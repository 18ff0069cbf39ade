"""Following: a cut or a mask of a model together with all that looks at it: its optimisers, copies and Scores."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .attachment import attached
from .blame import stacklevel
from .coupling import Coupling, couple
from .masking import mask
from .masks import mask_of
from .scores import Scores
from .surgery import cut


def cut_and_follow(
    model: nn.Module,
    coupling: Coupling,
    removed: Tensor,
    example_inputs: Any,
    optimizers: Sequence[Optimizer],
    gates: Tensor | None = None,
    copies: Sequence[nn.Module] = (),
) -> Tensor:
    """Cut, fold in the ``gates`` [U] of the others, and let the Scores attached to the model follow.

    Returns the old indices of the kept units. A Scores whose units are others (``example_inputs=None``, or only a part
    of the model) can't follow and is detached. With ``gates`` the others start anew: what they hold is of gates that
    have moved.
    """
    watching = [scores for scores in attached(model) if scores.coupling.fingerprint == coupling.fingerprint]
    for scores in watching:
        scores.fold()
    others = [scores for scores in attached(model) if scores not in watching]
    for _ in others:  # before anything has changed: a warning may be an error here
        warnings.warn(
            "a Scores attached to the model counts other units than the cut, so it can't follow: the cut detaches it, "
            "and it holds the statistics from before",
            stacklevel=stacklevel(),
        )
    after = cut(model, coupling, removed, example_inputs, optimizers, gates=gates, copies=copies)
    stays = torch.ones(len(coupling.units), dtype=torch.bool)
    stays[removed] = False
    kept = stays.nonzero().flatten()
    for scores in watching:
        scores.rebind(after, kept)
        if gates is not None:
            scores.reset()
    for scores in others:
        scores.detach()
    return kept


def mask_and_follow(
    model: nn.Module,
    coupling: Coupling,
    masked: Tensor,
    example_inputs: Any,
    optimizers: Sequence[Optimizer],
    gates: Tensor | None = None,
    copies: Sequence[nn.Module] = (),
) -> None:
    """Mask, and fold in the ``gates`` [U] of the others. Attached Scores go on, with the same units.

    With ``gates`` they start anew: what they hold is of gates that have moved.
    """
    mask(model, coupling, masked, example_inputs, optimizers, gates=gates, copies=copies)
    for scores in attached(model) if gates is not None else ():
        scores.reset()


def followed(model: nn.Module) -> Scores | None:
    """An attached Scores that counts this model's units: after cuts it may count a layer's last, which couple won't."""
    found = (scores for scores in attached(model) if scores.model is model)
    return next((scores for scores in found if scores.coupling.consumers and scores.coupling.fits(model)), None)


def known_coupling(model: nn.Module, example_inputs: Any) -> Coupling:
    """The coupling by which units of the model are masked, or else a new one."""
    mask = mask_of(model)
    return couple(model, example_inputs) if mask is None else mask.coupling


def listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """The optimisers of an argument that is one, several or None."""
    if optimizer is None:
        return ()
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
