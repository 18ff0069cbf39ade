"""A run's two stages, with checkpoints of their own: before there is a pruner, and from then on."""

import copy
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

import taylorkern as tk
from taylorkern.checkpoints import Checkpoints
from taylorkern.errors import one_line

from . import randomness
from .checks import check_output
from .learner import Learner
from .progress import say
from .record import Record


class Stages:
    """Keeps the newest states of ``learner`` and a :class:`Record` in ``folder``; makes the pruner, once."""

    def __init__(self, folder: Path, learner: Learner) -> None:
        self._folder, self._learner = folder, learner
        self.pruner: tk.Pruner | None = None
        self._checkpoints = self._kept("dense")
        self._failed = False

    def load(self) -> Record:
        """Put the newest checkpoint back, of the later stage if there is one; a new record where there is none."""
        if any((self._folder / "pruned").glob("step-*")):
            self.begin_pruning()
        loaded = self._checkpoints.load()
        return Record() if loaded is None else Record.loads(loaded["record"])

    def save(self, record: Record) -> None:
        """Write a checkpoint. Where that fails, for want of room, say, the run goes on and the one before stays."""
        try:
            self._checkpoints.save(record.step, record=record.dumps())
            self._failed = False
        except OSError as error:
            if not self._failed:
                say(f"no checkpoint at step {record.step}: {one_line(error)}; the one before stays, training goes on")
            self._failed = True

    def rehearse(self) -> int:
        """How many units there are; raises what making the pruner will, before the training and not after it."""
        with randomness.kept():
            learner = self._learner
            check_output(learner.model, learner.example(), len(learner.data.classes))
            return len(_pruner(learner, copy.deepcopy(learner.model), None).scores.units)

    def begin_pruning(self) -> tk.Pruner:
        """Score from here on, and keep the pruner with the rest."""
        self.pruner = _pruner(self._learner, self._learner.model, self._learner.optimizer)
        self._checkpoints = self._kept("pruned")
        return self.pruner

    def _kept(self, stage: str) -> Checkpoints:
        learner = self._learner
        parts: dict[str, Any] = {"model": learner.model, "optimizer": learner.optimizer}
        if learner.scaler.is_enabled():
            parts["scaler"] = learner.scaler
        if self.pruner is not None:
            parts["pruner"] = self.pruner
        return Checkpoints(self._folder / stage, **parts)


def _pruner(learner: Learner, model: nn.Module, optimizer: Optimizer | None) -> tk.Pruner:
    settings = learner.settings
    return tk.Pruner(
        model.train(),
        learner.example(),
        optimizer=optimizer,
        scaler=learner.scaler if optimizer and learner.scaler.is_enabled() else None,
        criterion=settings.criterion,
        target=settings.target,
        of=settings.of,
        every=settings.every,
        step=settings.step or 1,
        compensate=settings.compensate,
        seed=settings.seed,
    )
