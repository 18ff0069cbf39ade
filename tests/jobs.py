"""Runs of ``taylorkern prune`` on a tiny network and few images, and what two of them must have in common."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

NETWORK = Path(__file__).with_name("job_network.py")
SHORT = (
    "--size 8 --batch 16 --workers 0 --epochs 2 --prune-epochs 2 --finetune-epochs 2 --every 4 --target 0.6 "
    "--lr 0.05 --checkpoint-every 3 --device cpu"
).split()
TAKES_TIME = {"latency_ms", "seconds", "rate", "time"}  # keys whose numbers no two runs share
SAME = ("images", "classes", "widths", "history", "ranks", "dropped", "dense", "pruned")


def arguments(data: Path | str, out: Path | str, *options: str) -> list[str]:
    """Of the command ``taylorkern``; ``options`` come last, so that they win."""
    return ["prune", "--model", f"{NETWORK}:build", "--data", str(data), "--out", str(out), *SHORT, *options]


def start(command: list[str], log: Path) -> subprocess.Popen:
    """The command in a group of processes of its own; all that it says is added to ``log``."""
    with log.open("ab") as told:
        return subprocess.Popen(
            [sys.executable, "-m", "taylorkern", *command],
            stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True, env=dict(os.environ),
        )  # fmt: skip


def differences(one: Path, other: Path) -> list[str]:
    """What two finished folders don't share, beside times: the network's bytes, the history, the other results."""
    found = []
    if (one / "pruned.safetensors").read_bytes() != (other / "pruned.safetensors").read_bytes():
        found.append("pruned.safetensors")
    if _lines(one) != _lines(other):
        found.append("history.jsonl")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    return found + [key for key in SAME if _timeless(summaries[0].get(key)) != _timeless(summaries[1].get(key))]


def _lines(folder: Path) -> list[Any]:
    return [_timeless(json.loads(line)) for line in (folder / "history.jsonl").read_text().splitlines()]


def _timeless(value: Any) -> Any:
    """``value`` without what is measured by a clock; as text, in which NaN equals NaN."""
    return json.dumps(_without(value), sort_keys=True)


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in TAKES_TIME}
    return [_without(inner) for inner in value] if isinstance(value, list) else value
