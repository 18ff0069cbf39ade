"""The files that a run leaves in its folder: whether they are a run's, whole, and taking them away again."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from taylorkern.errors import CommandError, listing
from taylorkern.files import unfinished

from .board import FILES as EVENTS
from .progress import say
from .settings import FILE as SETTINGS

SUMMARY, REPORT, NETWORK, HISTORY = "summary.json", "report.html", "pruned.safetensors", "history.jsonl"
RESULTS = (SUMMARY, REPORT, NETWORK, HISTORY)
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
STAGES = ("dense", "pruned")  # with checkpoints of their own
STATES = "step-*.pt"


def check_own(out: Path, restart: bool) -> None:
    """Raise CommandError where ``out`` holds files that would be written over, and no run's settings beside them."""
    if (out / SETTINGS).exists():
        return
    strange = [name for name in (*RESULTS, CHECKPOINTS, TENSORBOARD) if (out / name).exists()]
    if restart and TENSORBOARD in strange:
        raise CommandError(f"{out} holds another's {TENSORBOARD}, which --restart leaves alone; take another --out")
    if strange and not restart:
        raise CommandError(f"{out} holds another's {strange[0]}; take another --out, or --restart to overwrite it")


def finished(out: Path) -> dict[str, Any] | None:
    """The summary of the run that ``out`` holds, None where something is left to do.

    Raises CommandError where the summary is damaged, or other results are gone and there is no checkpoint to make them
    from.
    """
    summary = out / SUMMARY
    if not summary.is_file():
        return None
    if lost := [name for name in RESULTS if not (out / name).is_file()]:
        if not any((out / CHECKPOINTS).glob(f"*/{STATES}")):
            told = f"{out} lacks {listing(lost)} of a finished run, and has no checkpoint to make that from"
            raise CommandError(f"{told}; --restart does the run again")
        say(f"{out} lacks {listing(lost)} of a finished run; the results are made again from the last checkpoint")
        return None
    return _read(summary)


def _read(summary: Path) -> dict[str, Any]:
    try:
        told = json.loads(summary.read_text())
    except ValueError:
        told = None
    if not isinstance(told, dict) or "pruned" not in told:
        raise CommandError(
            f"{summary} is damaged; remove it and the same command makes it again from the last checkpoint, or "
            "--restart does the run again"
        )
    return told


def clear(out: Path) -> None:
    """Take away what a run leaves, and no file of another name; raises OSError where that can't be done.

    The summary goes first and the settings last, so that what an interruption leaves is a run that is cleared again.
    """
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    for stage in STAGES:
        _empty(out / CHECKPOINTS / stage, STATES)
    _empty(out / CHECKPOINTS)
    _empty(out / TENSORBOARD, EVENTS)
    (out / SETTINGS).unlink(missing_ok=True)


def _empty(folder: Path, pattern: str | None = None) -> None:
    """Remove the files of ``pattern``, whole or half written, and the folder itself where nothing else is in it."""
    if pattern is not None:
        for file in [*folder.glob(pattern), *(partial for _, partial in unfinished(folder))]:
            file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
