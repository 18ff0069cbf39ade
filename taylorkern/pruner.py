"""The pruner: scores, ranked by a criterion, cut to a budget, round after round. No tensor mathematics of its own."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import budget
from .coupling import Coupling, Unit, couple
from .criteria import criterion as known_criterion
from .layers import Gated
from .scores import Scores
from .surgery import cut


class Pruner:
    """The paper's procedure: score while training; every ``every`` steps remove the ``step`` least important units.

    It goes on until the part of ``of`` ("flops", "params" or "channels") that is left is ``target`` or less; every
    layer keeps at least ``min_channels``. ``momentum`` smooths importances over rounds (0: each round by itself, as
    the statistics start anew after each). ``optimizer`` (one or several) is cut along, state and all, so training
    goes on in it. ``seed`` is for criterion "random".

    Raises ValueError for a target outside (0, 1] or one that can't be reached, an unknown ``of`` or criterion, and
    whatever ``Scores`` refuses.

    To resume, build the dense model and the pruner as before, then in this order: ``pruner.load_state_dict`` (which
    repeats the cuts), ``model.load_state_dict``, ``optimizer.load_state_dict``.

    >>> from taylorkern import convert
    >>> model = convert(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)))
    >>> x = torch.rand(16, 1, 4, 4)
    >>> pruner = Pruner(model, x, target=0.5, every=1, step=2)
    >>> while not pruner.done:
    ...     model(x).square().mean().backward()
    ...     removed = pruner.step()
    >>> model[0].out_channels, pruner.kept
    (4, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        criterion: str = "taylor_fo",
        target: float = 0.5,
        of: str = "flops",
        every: int = 30,
        step: int = 100,
        momentum: float = 0.0,
        min_channels: int = 1,
        seed: int = 0,
    ) -> None:
        _check_target(target)
        known_criterion(criterion)
        for name, value in (("every", every), ("step", step), ("min_channels", min_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be a whole number of at least 1")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1)")
        if example_inputs is None:
            raise ValueError("pruning needs example_inputs: without them nobody knows which channels go together")
        self.model, self.example_inputs, self.optimizers = model, example_inputs, _optimizers(optimizer)
        self.criterion, self.target, self.of = criterion, target, of
        self.every, self.round_step, self.momentum, self.min_channels = every, step, momentum, min_channels
        self.scores = Scores(model, example_inputs, criteria=[criterion], seed=seed)
        try:
            self._dense = _Dense(model, self.scores.coupling, of)
            self._dense.check_reachable(self.scores.coupling, target, min_channels)
        except ValueError:
            self.scores.detach()
            raise
        self._meter = self._dense.meter
        self._steps = 0
        self._smoothed: Tensor | None = None

    @property
    def kept(self) -> float:
        """The part of ``of`` that is left of the dense network's."""
        return self._meter.total / self._dense.total

    @property
    def done(self) -> bool:
        """Whether the target is met."""
        return self._meter.total <= self.target * self._dense.total

    def step(self) -> list[Unit]:
        """Call after every ``optimizer.step()``; returns the units removed now, mostly none.

        Places of returned units are channel numbers from before this cut. Raises RuntimeError in a round without a
        single usable minibatch, and SurgeryError, with everything as it was, where a cut can't be verified.
        """
        if self.done:
            return []
        self._steps += 1
        if self._steps % self.every:
            return []
        smoothed = self._smooth(self.scores.importance(self.criterion))
        order = budget.removable(smoothed, self.scores.coupling, self.min_channels)
        goal = self.target * self._dense.total
        removed = budget.select(order, len(smoothed), self._meter, goal, self.round_step)
        if not len(removed):
            raise RuntimeError(
                f"target={self.target} of {self.of} can't be reached: {self.kept:.3f} is left and no unit may go any "
                f"more (min_channels={self.min_channels}, criterion {self.criterion})"
            )
        units = [self.scores.units[i] for i in removed.tolist()]
        self._cut(removed, smoothed)
        self.scores.reset()
        return units

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, for ``torch.save`` beside the model's and the optimiser's."""
        return {
            "fingerprint": self._dense.fingerprint,
            "kept": self.scores.coupling.dense.clone(),
            "steps": self._steps,
            "smoothed": None if self._smoothed is None else self._smoothed.clone(),
            "scores": self.scores.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`: repeats its cuts on this dense model and optimiser, then restores the rest.

        Raises ValueError, and changes nothing, for a state of another model or where this model is not dense.
        """
        if state.get("fingerprint") != self._dense.fingerprint:
            raise ValueError("this pruner state belongs to another model or other example inputs")
        self.scores.check_statistics(state["scores"])
        here, kept = self.scores.coupling.dense, state["kept"]
        gone = torch.tensor([i for i, dense in enumerate(here.tolist()) if dense not in set(kept.tolist())])
        if not set(kept.tolist()) <= set(here.tolist()):
            raise ValueError("this model lacks units that the state still has; build the dense model anew")
        if len(gone):
            self._cut(gone.long(), None)
        self.scores.load_state_dict(state["scores"])
        self._steps = state["steps"]
        self._smoothed = None if state["smoothed"] is None else state["smoothed"].clone()

    def _smooth(self, importance: Tensor) -> Tensor:
        importance = importance.cpu()
        if self.momentum == 0 or self._smoothed is None:
            return importance
        return self.momentum * self._smoothed + (1 - self.momentum) * importance

    def _cut(self, removed: Tensor, smoothed: Tensor | None) -> None:
        kept = cut_and_follow(self.model, self.scores.coupling, removed, self.example_inputs, self.optimizers)
        self._smoothed = None if smoothed is None else smoothed[kept]
        self._meter = budget.Meter(self.model, self.scores.coupling, self.of)


def prune(
    model: nn.Module,
    example_inputs: Any,
    importance: Tensor,
    *,
    target: float = 0.5,
    of: str = "flops",
    min_channels: int = 1,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> list[Unit]:
    """Cut ``model`` once, least important units first, until ``target`` of its ``of`` is left; returns what went.

    ``importance`` [U] has one number per unit, in the order of the units of the ``Scores`` attached to the model, or
    without one of ``Scores(model, example_inputs).units``; ``of`` is "flops" (of the example inputs that found the
    units), "params" or "channels". A ``Scores`` attached to the model follows the cut, or is detached with a warning
    where its units are others. What the cut network computes
    is compared with the masked dense one on the example inputs in evaluation mode, in float64 where the model runs in
    it; code that takes another branch for other inputs, or other numbers in training, is not seen.

    Raises ValueError for a target outside (0, 1] or out of reach, importances of the wrong length or NaN; and
    SurgeryError, with everything as it was, where the cut can't be verified.

    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    >>> removed = prune(model, torch.rand(1, 1, 4, 4), torch.arange(8.0), target=0.5)
    >>> [unit.places for unit in removed]
    [(('0', 0),), (('0', 1),), (('0', 2),), (('0', 3),)]
    """
    _check_target(target)
    coupling = _followed(model) or couple(model, example_inputs)
    units = len(coupling.units)
    importance = torch.as_tensor(importance).detach().double().cpu()
    if importance.shape != (units,):
        raise ValueError(f"importance has shape {tuple(importance.shape)}, but this model has {units} units")
    if importance.isnan().any():
        raise ValueError(f"importance of unit {int(importance.isnan().nonzero()[0])} is NaN")
    dense = _Dense(model, coupling, of)
    order = budget.removable(importance, coupling, min_channels)
    removed = budget.select(order, units, dense.meter, target * dense.total)
    dense.check_reachable(coupling, target, min_channels, order)
    gone = [coupling.units[i] for i in removed.tolist()]
    if gone:
        cut_and_follow(model, coupling, removed, example_inputs, _optimizers(optimizer))
    return gone


def cut_and_follow(
    model: nn.Module, coupling: Coupling, removed: Tensor, example_inputs: Any, optimizers: Sequence[Optimizer]
) -> Tensor:
    """Cut, and let the Scores attached to the model follow; returns the old indices of the kept units.

    One whose units are others (``example_inputs=None``, or only a part of the model) can't follow and is detached.
    """
    watching = [scores for scores in _attached(model) if scores.coupling.fingerprint == coupling.fingerprint]
    for scores in watching:
        scores.fold()
    others = [scores for scores in _attached(model) if scores not in watching]
    after = cut(model, coupling, removed, example_inputs, optimizers)
    stays = torch.ones(len(coupling.units), dtype=torch.bool)
    stays[removed] = False
    kept = stays.nonzero().flatten()
    for scores in watching:
        scores.rebind(after, kept)
    for scores in others:
        warnings.warn(
            "a Scores attached to the model counts other units than the cut, so it can't follow: it is detached, and "
            "holds the statistics from before the cut",
            stacklevel=3,
        )
        scores.detach()
    return kept


class _Dense:
    """What a pruner must remember of the network it started from."""

    def __init__(self, model: nn.Module, coupling: Coupling, of: str) -> None:
        self.meter = budget.Meter(model, coupling, of)
        self.total = self.meter.total
        self.fingerprint = coupling.fingerprint
        self.of = of

    def check_reachable(
        self, coupling: Coupling, target: float, min_channels: int, order: Tensor | None = None
    ) -> None:
        units = len(coupling.units)
        order = budget.removable(torch.zeros(units), coupling, min_channels) if order is None else order
        kept = torch.ones(units, dtype=torch.bool)
        kept[order] = False
        least = self.meter(kept) / self.total
        if least > target:
            raise ValueError(
                f"target={target} of {self.of} can't be reached: with every unit that may go removed "
                f"(min_channels={min_channels}), {least:.4f} would be left"
            )


def _attached(model: nn.Module) -> list[Scores]:
    owners = (module.gate.owner() for module in model.modules() if isinstance(module, Gated) and module.gate)
    return list({id(owner): owner for owner in owners if owner is not None}.values())


def _followed(model: nn.Module) -> Coupling | None:
    """The coupling of an attached Scores: after cuts it may count the last unit of a layer, which couple does not."""
    couplings = (scores.coupling for scores in _attached(model) if scores.model is model)
    return next((coupling for coupling in couplings if coupling.consumers and coupling.fits(model)), None)


def _check_target(target: float) -> None:
    if not 0 < target <= 1:
        raise ValueError(f"target={target} is the part that is kept; it must be above 0 and at most 1")


def _optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    if optimizer is None:
        return ()
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
