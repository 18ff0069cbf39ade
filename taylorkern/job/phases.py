"""The phases of a run: training, pruning and fine-tuning, each from wherever it stopped to its end."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import taylorkern as tk
from taylorkern.budget import Meter
from taylorkern.errors import CommandError, one_line
from taylorkern.files import replace

from . import ranks, schedule
from .evaluation import PER_ROUND, evaluate
from .learner import Learner
from .loader import Minibatch, Skip
from .pace import Pace, rounds
from .progress import Progress, say, say_skipped
from .record import Record
from .stages import Stages

LEAST_IMAGES = 2  # that batch normalisation can take statistics over


class Phases:
    """Drives ``learner`` through the phases of ``record``; checkpoints go to ``stages``, points to ``history``."""

    def __init__(self, learner: Learner, stages: Stages, record: Record, history: Path, board: Any = None) -> None:
        self._learner, self._stages, self._record = learner, stages, record
        self._history, self._board = history, board
        self._settings, self._data = learner.settings, learner.data
        self._ranks: dict[str, list[float]] = {}
        self._stream: Iterator[Minibatch] | None = None

    def run(self) -> None:
        """Everything that is left to do."""
        self._note_history()
        works: dict[str, Callable[[], None]] = {
            "train": self._train,
            "prune": self._prune,
            "finetune": self._finetune,
        }
        while self._record.phase in works:
            works[self._record.phase]()
        self._stream = None

    def note(self, skipped: list[Skip]) -> None:
        """Files that could not be read, each told and counted once."""
        known = self._record.skipped
        for file, why in skipped:
            if file not in known:
                say_skipped(file, why, len(known))
                known[file] = why

    def write_history(self) -> None:
        """All points so far, in the place of what the file held. Raises OSError where that can't be done."""
        lines = "".join(json.dumps(point) + "\n" for point in self._record.history)
        replace(self._history, lines.encode())

    def _train(self) -> None:
        steps = self._settings.training_epochs * self._data.per_epoch
        self._learner.compiled(True)
        with self._bar(steps) as bar:
            while self._record.phase_step < steps:
                bar.step(self._learn(steps))
                self._epoch_ends(bar)
        self._learner.compiled(False)
        self._record.dense = self._evaluate()
        for warning in self._data.unmeasured(self._record.skipped):
            say(f"warning: {warning}")
        self._stages.begin_pruning()
        self._record.next_phase()
        self._add(self._record.dense)
        self._stages.save(self._record)

    def _prune(self) -> None:
        pruner = self._pruner
        planned = rounds(self._settings, self._data.per_epoch)
        steps = planned * self._settings.every
        with self._bar(steps) as bar:
            while not pruner.done:
                bar.step(self._learn(steps, pruner.scores))
                if self._rank_and_step(pruner, planned):
                    bar.part(1.0 if pruner.done else (1 - pruner.kept) / (1 - self._settings.target))
                    bar.point(self._add(self._evaluate(PER_ROUND)))
                self._save_at_times()
        self._record.next_phase()
        self._stages.save(self._record)

    def _finetune(self) -> None:
        steps = self._settings.finetune_epochs * self._data.per_epoch
        self._pruner.scores.detach()
        self._learner.compiled(True)
        with self._bar(steps) as bar:
            while self._record.phase_step < steps:
                bar.step(self._learn(steps))
                self._epoch_ends(bar)
        self._learner.compiled(False)
        self._record.next_phase()
        self._stages.save(self._record)

    @property
    def _pruner(self) -> tk.Pruner:
        assert self._stages.pruner is not None
        return self._stages.pruner

    def _bar(self, steps: int) -> Progress:
        return Progress(self._record.phase, steps, self._record.phase_step)

    def _learn(self, steps: int, scores: tk.Scores | None = None) -> float | None:
        """One minibatch; returns its loss, None where too little of it could be read."""
        record, settings = self._record, self._settings
        if self._stream is None:
            self._stream = self._data.train(record.step)
        images, labels, skipped = next(self._stream)
        self.note(skipped)
        loss = None
        if len(labels) >= min(LEAST_IMAGES, self._data.batch):
            rate = schedule.rate(record.phase, settings.peak, record.phase_step, steps)
            loss = self._learner.learn(images, labels, rate, scores, record.step)
            self._check(loss)
            record.loss_sum, record.loss_count = record.loss_sum + loss, record.loss_count + 1
        record.empty += loss is None
        record.step, record.phase_step = record.step + 1, record.phase_step + 1
        return loss

    def _check(self, loss: float) -> None:
        """Raise CommandError where training has diverged.

        With fp16 a step without a finite loss is skipped and the scale halved, so that has to last.
        """
        if not math.isfinite(loss) and self._learner.scaler.get_scale() <= 1:
            record = self._record
            raise CommandError(
                f"the loss is {loss} at step {record.step}, phase {record.phase}: training has diverged; --restart "
                f"with a lower --lr than {self._settings.peak}; the checkpoint before this stays till then"
            )

    def _rank_and_step(self, pruner: tk.Pruner, planned: int) -> bool:
        """Whether this was a round; the ranks that the first one goes by are kept."""
        record, settings = self._record, self._settings
        if not record.ranks and record.phase_step >= settings.every and pruner.scores.minibatches:
            self._ranks = ranks.by_layer(pruner.scores, settings.criterion)
        if settings.step is None:
            pace = Pace(planned, record.rounds, record.units, len(pruner.scores.units), pruner.kept)
            pruner.round_step = pace.units_now(settings)
        dropped = pruner.scores.dropped
        if not pruner.step():
            return False
        record.dropped, record.rounds = record.dropped + dropped, record.rounds + 1
        record.ranks = record.ranks or self._ranks
        return True

    def _epoch_ends(self, bar: Progress) -> None:
        if self._record.phase_step % self._data.per_epoch == 0:
            bar.point(self._add(self._evaluate()))
        self._save_at_times()

    def _save_at_times(self) -> None:
        if self._record.step % self._settings.checkpoint_every == 0:
            self._stages.save(self._record)

    def _evaluate(self, most: int | None = None) -> dict[str, float]:
        return evaluate(self._learner, self._data.val(most), self.note)

    def _add(self, quality: dict[str, float]) -> dict[str, Any]:
        """A point of the history."""
        record, pruner = self._record, self._stages.pruner
        train_loss = record.take_loss()
        if train_loss is None and record.phase_step:
            raise CommandError("no training image of the last minibatches can be read; look at the files named above")
        point = {
            "phase": record.phase,
            "step": record.step,
            "epoch": record.step / self._data.per_epoch,
            **quality,
            "train_loss": train_loss,
            "flops_kept": self._flops_kept(),
            "channels": len(pruner.scores.units) if pruner else record.units,
            "lr": self._learner.optimizer.param_groups[0]["lr"],
        }
        record.history.append(point)
        self._note_history()
        return point

    def _flops_kept(self) -> float:
        pruner = self._stages.pruner
        if pruner is None:
            return 1.0
        flops = Meter(pruner.model, pruner.scores.coupling, "flops").total
        self._record.flops = self._record.flops or flops
        return flops / self._record.flops

    def _note_history(self) -> None:
        """The file follows; where there is no room for it, the end of the run writes it again."""
        try:
            self.write_history()
        except OSError as error:
            say(f"{self._history} can't be written now: {one_line(error)}")
        if self._board is not None:
            self._board.follow(self._record.history)
