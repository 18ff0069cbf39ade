"""The pruner: scores, a choice by them, cut to a budget, round after round. No tensor mathematics of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import budget
from .coupling import Unit, couple
from .dense import Dense, check_target, check_whole
from .following import cut_and_follow, listed
from .recovery import Recovery
from .scores import Scores
from .selection import Limits, selection
from .surgeon import COST_POWER, DAMPING


class Pruner:
    """The paper's procedure: score while training; every ``every`` steps remove the ``step`` least important units.

    It goes on until the part of ``of`` ("flops", "params" or "channels") that is left is ``target`` or less; every
    layer keeps at least ``min_channels``. ``momentum`` smooths importances over rounds (0: each round by itself, as
    the statistics start anew after each). ``optimizer`` (one or several) is cut along, state and all, so training
    goes on in it. ``seed`` is for criterion "random".

    Criterion "surgeon" chooses whole sets by the curvature along all gates, which the backwards give as they come, or
    better where ``pruner.scores.curvature`` is called (see ``taylorkern.surgeon``). ``compensate`` has the channels
    that stay make up for those that go, in the weights and at no cost when the network runs: by default where the
    surgeon chooses, on request with any criterion. ``damping`` and ``bound`` are for it: how much the curvature's
    diagonal is raised, relative to its mean, and how far a gate may move from 1. The surgeon divides a predicted
    increase by the cost saved to the power ``cost_power``: 1 weighs it in full, 0 not at all. ``gram`` and
    ``gram_budget`` are how the curvature is kept, see ``Scores``.

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
        compensate: bool | None = None,
        damping: float = DAMPING,
        bound: float | None = None,
        cost_power: float = COST_POWER,
        gram: str = "auto",
        gram_budget: int = 2**31,
    ) -> None:
        check_target(target)
        for name, value in (("every", every), ("step", step), ("min_channels", min_channels)):
            check_whole(name, value)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1)")
        if example_inputs is None:
            raise ValueError("pruning needs example_inputs: without them nobody knows which channels go together")
        self._selection = selection(criterion, momentum, damping, cost_power)
        self._recovery = Recovery.of(criterion, compensate, damping, bound)
        self.model, self.example_inputs, self.optimizers = model, example_inputs, listed(optimizer)
        self.criterion, self.target, self.of = criterion, target, of
        self.every, self.round_step, self.momentum, self.min_channels = every, step, momentum, min_channels
        coupling = couple(model, example_inputs)
        self._dense = Dense(model, coupling, of)
        self._dense.check_reachable(coupling, target, min_channels)
        wanted = gram if self._recovery.wanted else None
        self.scores = Scores(
            model, example_inputs, criteria=[criterion], seed=seed, gram=wanted, gram_budget=gram_budget,
            coupling=coupling,
        )  # fmt: skip
        self._meter = self._dense.meter
        self._steps = 0

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
        single usable minibatch; with everything as it was, SurgeryError where a cut can't be verified, and ValueError
        where the curvature is singular in spite of the damping or a folded gate overflows a weight's dtype.
        """
        if self.done:
            return []
        self._steps += 1
        if self._steps % self.every:
            return []
        limits = Limits(self._meter, self.target * self._dense.total, self.min_channels, self.round_step)
        removed = self._selection.choose(self.scores, limits)
        if not len(removed):
            raise RuntimeError(
                f"target={self.target} of {self.of} can't be reached: {self.kept:.3f} is left and no unit may go any "
                f"more (min_channels={self.min_channels}, criterion {self.criterion})"
            )
        units = [self.scores.units[i] for i in removed.tolist()]
        self._selection.follow(self._cut(removed, self._recovery.gates(self.scores, removed)))
        self.scores.reset()
        return units

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, for ``torch.save`` beside the model's and the optimiser's."""
        return {
            "fingerprint": self._dense.fingerprint,
            "kept": self.scores.coupling.dense.clone(),
            "steps": self._steps,
            "smoothed": None if self._selection.smoothed is None else self._selection.smoothed.clone(),
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
        self._selection.smoothed = None if state["smoothed"] is None else state["smoothed"].clone()

    def _cut(self, removed: Tensor, gates: Tensor | None) -> Tensor:
        kept = cut_and_follow(self.model, self.scores.coupling, removed, self.example_inputs, self.optimizers, gates)
        self._meter = budget.Meter(self.model, self.scores.coupling, self.of)
        return kept
