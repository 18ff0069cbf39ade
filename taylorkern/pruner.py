"""The pruner: scores, a choice by them, cut to a budget, round after round. No tensor mathematics of its own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import budget
from .coupling import Unit
from .dense import Dense, check_target, check_whole
from .following import known_coupling, listed
from .living import Judged
from .masks import masked_units
from .modes import Subject, check_mode, remove
from .processes import Processes
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

    ``mode`` "mask" has rounds mask: no tensor changes its shape, and the network computes and trains as if it had been
    cut (see ``taylorkern.masking`` for what is not identical). Masked units keep their numbers, here and in ``scores``,
    are not chosen again and count as gone. :meth:`cut` then takes them away, whenever it is called; a round in mode
    "cut" does so as well, and :attr:`mode` may be changed between rounds.

    With ``optimizer`` a minibatch of the scores is what one of its steps sees, however many backwards that were;
    without, each forward is one. ``scaler`` (``torch.amp.GradScaler``) and ``reduction`` say how the loss is scaled and
    whether it is a mean or a sum, see ``Scores``; a step that the scaler skips does not count for a round.

    ``copies`` of the model, one or several (averages of its weights: ``torch.optim.swa_utils.AveragedModel``), go
    through everything with it; see ``taylorkern.surgery.cut`` for what makes a copy, and for the optimisers.

    Of several processes that train one model (``DistributedDataParallel``), each makes a pruner of the model inside,
    and all call :meth:`step` and :meth:`cut` alike. At the end of a round the statistics of all in ``group`` ("world",
    a process group of ``torch.distributed``, or None for this process by itself) are added up, and all remove the same
    units; if one fails or they would differ, all raise and nothing has changed. After a cut wrap the model anew,
    ``ddp = DistributedDataParallel(model)``: the old wrapper averages no gradient any more, which the first step
    afterwards notices, for then the parameters differ. In mode "mask" nothing needs to be wrapped again.

    Raises ValueError for a target outside (0, 1] or one that can't be reached, an unknown ``of``, criterion or mode,
    copies that are none, and whatever ``Scores`` refuses.

    To resume, build the dense model and the pruner as before, then in this order: ``pruner.load_state_dict`` (which
    repeats the cuts and masks), ``model.load_state_dict``, ``optimizer.load_state_dict`` and those of copies. To go on
    to another target, set :attr:`target` after that.

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
        mode: str = "cut",
        copies: nn.Module | Iterable[nn.Module] | None = None,
        group: Any = "world",
        scaler: Any = None,
        reduction: str = "mean",
    ) -> None:
        check_target(target)
        check_mode(mode)
        for name, value in (("every", every), ("step", step), ("min_channels", min_channels)):
            check_whole(name, value)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1)")
        if example_inputs is None:
            raise ValueError("pruning needs example_inputs: without them nobody knows which channels go together")
        self._processes, self._cut_lately = Processes(group), False
        self._selection = selection(criterion, momentum, damping, cost_power)
        self._recovery = Recovery.of(criterion, compensate, damping, bound)
        self._subject = Subject.of(model, example_inputs, listed(optimizer), copies)
        self.model, self.example_inputs, self.optimizers, self.mode = model, example_inputs, listed(optimizer), mode
        self.criterion, self.target, self.of = criterion, target, of
        self.every, self.round_step, self.momentum, self.min_channels = every, step, momentum, min_channels
        self._living = self._subject.living(known_coupling(model, example_inputs))
        self._settings = {
            "criterion": criterion, "target": target, "of": of, "every": every, "step": step, "momentum": momentum,
            "min_channels": min_channels, "seed": seed, "compensate": self._recovery.wanted, "damping": damping,
            "bound": bound, "cost_power": cost_power,
        }  # fmt: skip
        self._dense = Dense(model, self._living.coupling, of)
        self._dense.check_reachable(self._living.coupling, target, min_channels)
        wanted = gram if self._recovery.wanted else None
        self.scores = Scores(
            model, example_inputs, criteria=[criterion], seed=seed, gram=wanted, gram_budget=gram_budget,
            coupling=self._living.whole, optimizer=listed(optimizer) or None, scaler=scaler, reduction=reduction,
            lockstep=self._processes.several,
        )  # fmt: skip
        self._meter = self._dense.meter
        self._steps = 0

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        """The modules that are cut along: the copies, or what they wrap."""
        return self._subject.copies

    @property
    def kept(self) -> float:
        """The part of ``of`` that is left of the dense network's."""
        return self._meter.total / self._dense.total

    @property
    def done(self) -> bool:
        """Whether the target is met."""
        return self._meter.total <= self.target * self._dense.total

    def step(self) -> list[Unit]:
        """Call after every ``optimizer.step()``; returns the units cut or masked now, mostly none.

        Places of returned units are channel numbers from before a cut, and go on to be right where they are masked.
        Raises RuntimeError in a round without a single usable minibatch; with everything as it was, SurgeryError where
        a cut can't be verified or an optimiser can't go on, ValueError where the curvature is singular in spite of
        the damping or a folded gate overflows a weight's dtype, and RuntimeError where another process of the group
        fails or the processes differ.
        """
        self._subject.hold()
        counts = self.scores.step()
        if counts:
            self._check_wrapped_anew()
        if self.done and self.scores.lockstep:
            self.scores.reset()  # no round takes the minibatches any more, which are all kept
        if self.done or not counts:
            return []
        steps = self._steps + 1
        if steps % self.every:
            self._steps = steps
            return []
        with self._processes.together(self.model) as ballot, self._processes.reduced(self.scores):
            judged = Judged(self.scores, self._living)
            chosen = self._choose(judged)
            gates = self._recovery.gates(judged, chosen)
            ballot.same("choice", chosen, gates)
            units = remove(self.mode, self._subject, self._living, chosen, gates)
        self._selection.follow(self._living.without(chosen))
        self._look_again()
        self._cut_lately = self.mode == "cut"
        self.scores.reset()
        self._steps = steps  # only now: a step that was refused is to be tried again
        return units

    def cut(self) -> list[Unit]:
        """Really cut what is masked, verified like any cut; returns these units, none where none was masked.

        Their places are channel numbers from before. Rounds go on afterwards, in either mode. Raises SurgeryError, with
        everything as it was, where the cut can't be verified or an optimiser can't go on.
        """
        self._subject.hold()
        with self._processes.together(self.model):
            units = self._subject.cut(self._living.whole, torch.zeros(0, dtype=torch.int64))
        self._look_again()
        self._cut_lately |= bool(units)
        return units

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, for ``torch.save`` beside the model's and the optimiser's."""
        return {
            "fingerprint": self._dense.fingerprint,
            "settings": dict(self._settings),
            "kept": self.scores.coupling.dense.clone(),
            "masked": self.scores.coupling.dense[masked_units(self.model, self.scores.coupling)],
            "steps": self._steps,
            "smoothed": None if self._selection.smoothed is None else self._selection.smoothed.clone(),
            "scores": self.scores.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`: repeats its cuts and masks on this dense model, then restores the rest.

        Raises ValueError, and changes nothing, for a state of another model or of other settings, or where this model
        is not dense.
        """
        if state.get("fingerprint") != self._dense.fingerprint:
            raise ValueError("this pruner state belongs to another model or other example inputs")
        self._check_settings(state.get("settings", {}))
        self.scores.check_statistics(state["scores"])
        here, kept = self.scores.coupling.dense, state["kept"]
        masked = state.get("masked", kept[:0])
        living = kept[~torch.isin(kept, masked)]
        if not bool(torch.isin(kept, here).all() and torch.isin(living, here[self._living.units]).all()):
            raise ValueError("this model lacks units that the state still has; build the dense model anew")
        gone = (~torch.isin(here, kept)).nonzero().flatten()
        self._subject.cut_only(self.scores.coupling, gone)
        coupling = self.scores.coupling
        self._subject.mask(coupling, torch.isin(coupling.dense, masked).nonzero().flatten())
        self._look_again()
        self.scores.load_state_dict(state["scores"])
        self._steps, self._cut_lately = state["steps"], bool(len(gone))
        self._selection.smoothed = None if state["smoothed"] is None else state["smoothed"].clone()

    def _check_settings(self, then: Mapping[str, Any]) -> None:
        """Raise ValueError where this pruner was built otherwise than the one whose settings were ``then``."""
        here = self._settings
        others = [name for name, value in then.items() if name in here and here[name] != value]
        if others:
            raise ValueError(
                f"this pruner state is of one with {', '.join(f'{name}={then[name]!r}' for name in others)}, here "
                f"{', '.join(f'{name}={here[name]!r}' for name in others)}; build the pruner as then, and change its "
                "attributes (target, every, round_step, min_channels) after loading"
            )

    def _choose(self, judged: Judged) -> torch.Tensor:
        """Indices of the units that go in this round. Raises RuntimeError where none may."""
        limits = Limits(self._meter, self.target * self._dense.total, self.min_channels, self.round_step)
        chosen = self._selection.choose(judged, limits)
        if not len(chosen):
            raise RuntimeError(
                f"target={self.target} of {self.of} can't be reached: {self.kept:.3f} is left and no unit may go any "
                f"more (min_channels={self.min_channels}, criterion {self.criterion})"
            )
        return chosen

    def _check_wrapped_anew(self) -> None:
        """In the first step after a cut: raises RuntimeError where it has drawn the processes' parameters apart."""
        if self._cut_lately:
            self._processes.check_alike(self.model)
            self._cut_lately = False

    def _look_again(self) -> None:
        """Units have gone: which are left, and what they cost."""
        self._living = self._subject.living(self.scores.coupling)
        self._meter = budget.Meter(self.model, self._living.coupling, self.of)
