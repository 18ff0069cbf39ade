"""The job: train, score and prune, fine-tune, save, measure; and go on with it wherever it stopped."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import taylorkern as tk
from taylorkern.errors import CommandError, one_line
from taylorkern.files import replace, unfinished
from taylorkern.selection import selection

from . import outcome, sources, summary, weights_file
from . import settings as kept_settings
from .data import Data, open_data
from .evaluation import evaluate
from .learner import Learner
from .outcome import HISTORY, NETWORK, REPORT, SUMMARY
from .phases import Phases
from .progress import say
from .record import Record
from .settings import Settings
from .stages import Stages

WAIT = 15.0  # seconds for the loaders of a run that was killed to notice


def run(settings: Settings, restart: bool = False) -> dict[str, Any]:
    """Do the whole job in the folder ``settings.out``, or what is left of it; returns the summary.

    ``restart`` throws away what the folder holds of a run, once the new one is known to begin. Raises CommandError
    where the job can't be done, with what to do, and that or StoreError where its results can't be written; what was
    reached stays.
    """
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=WAIT):
            for _, partial in unfinished(out):
                partial.unlink(missing_ok=True)
            return _go_on(settings, out, restart)
    except Timeout as error:
        raise CommandError(f"another run is at work in {out}; wait for it, or take another --out") from error
    except OSError as error:
        where = "" if error.filename else f"{out} can't be written: "  # writes that fail for want of room name no file
        raise CommandError(f"{where}{one_line(error)}; once that is mended, the same command goes on") from error


def _go_on(settings: Settings, out: Path, restart: bool) -> dict[str, Any]:
    outcome.check_own(out, restart)
    selection(settings.criterion)
    data = open_data(settings)
    model = sources.network(settings.model, len(data.classes), settings.seed)
    if settings.weights:
        path = Path(settings.weights)
        weights_file.put(path, weights_file.read(path), model)
    if not restart:
        kept_settings.keep(out, settings, data.digest)
        if done := outcome.finished(out):
            say(f"{out} holds the finished run; --restart does it again")
            return done
    for warning in data.warnings:
        say(f"warning: {warning}")
    return _worked(settings, data, Learner(model, data, settings), out, restart)


def _worked(settings: Settings, data: Data, learner: Learner, out: Path, restart: bool) -> dict[str, Any]:
    stages = Stages(out / outcome.CHECKPOINTS, learner)
    record = Record() if restart else stages.load()
    if not record.step:
        record.units = stages.rehearse()
    if restart:  # now that all that can be known to fail has not
        outcome.clear(out)
        kept_settings.keep(out, settings, data.digest)
    if record.step:
        say(f"going on in {out} at step {record.step}, phase {record.phase}")
    with _board(settings, out) as board:
        phases = Phases(learner, stages, record, out / HISTORY, board)
        phases.run()
        result = _finish(learner, phases, record, out)
        if board:
            board.widths(result["widths"]["dense"], result["widths"]["pruned"])
    replace(out / SUMMARY, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _finish(learner: Learner, phases: Phases, record: Record, out: Path) -> dict[str, Any]:
    """Write the results but for the summary, which comes last: it says that the others are whole."""
    from . import html

    settings, classes = learner.settings, len(learner.data.classes)
    phases.write_history()
    tk.save(learner.model, out / NETWORK)
    dense, fresh = (sources.network(settings.model, classes, settings.seed).to(learner.device) for _ in range(2))
    pruned = tk.load(out / NETWORK, fresh)
    quality = evaluate(learner, learner.data.val(), phases.note, pruned)
    result = summary.summarise(learner, record, dense, pruned, quality)
    result["warnings"] += learner.data.unmeasured(record.skipped)
    html.write(result, out / REPORT)
    return result


def _board(settings: Settings, out: Path) -> AbstractContextManager[Any]:
    if not settings.tensorboard:
        return nullcontext()
    from .board import Board

    return Board(out / outcome.TENSORBOARD)
