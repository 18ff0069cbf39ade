"""The one JSON of a device, which every piece's part goes into, and what is made of it all."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

from bench.gpu.bars import judged
from bench.readme import RESULTS
from taylorkern import files

Result = dict[str, Any]


def slug(device: str) -> str:
    """A file's name for a device.

    >>> slug("NVIDIA H100 80GB HBM3")
    'gpu-nvidia-h100-80gb-hbm3'
    """
    return "-".join(["gpu", *re.findall(r"[a-z0-9]+", device.lower())])


def place(device: str) -> Path:
    return RESULTS / f"{slug(device)}.json"


def merged(old: Result | None, device: str, quick: bool, parts: dict[str, dict[str, Any]]) -> Result:
    """``old`` with ``parts`` in the place of its own, and all bars judged anew.

    Raises SystemExit where ``old`` is of another device, or one is a trial and the other is not.
    """
    if old and (old["device"], old["quick"]) != (device, quick):
        was = f"{old['device']}{', a trial' * old['quick']}"
        raise SystemExit(f"the result there is of {was}, not of {device}{', a trial' * quick}: name another --json")
    today = datetime.date.today().isoformat()
    pieces = (old["pieces"] if old else {}) | {name: part | {"date": today} for name, part in parts.items()}
    return {"device": device, "quick": quick, "bars": judged({} if quick else pieces), "pieces": pieces}


def read(path: Path) -> Result | None:
    return json.loads(path.read_text()) if path.exists() else None


def write(path: Path, result: Result) -> None:
    files.replace(path, (json.dumps(result, indent=1) + "\n").encode())


def results(folder: Path = RESULTS) -> list[Result]:
    """All results of devices in ``folder``."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
