"""What a run was asked for, kept beside its results: the same command goes on, another one is refused."""

import hashlib
import json
import shlex
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from taylorkern.errors import CommandError
from taylorkern.files import replace

FILE = "settings.json"
FREE = ("out", "workers", "checkpoint_every", "tensorboard")  # that may change, for they don't change the result
RATES = {("sgd", True): 0.05, ("sgd", False): 0.01, ("adamw", True): 1e-3, ("adamw", False): 1e-4}  # by training or not
DECAY = {"sgd": 5e-4, "adamw": 0.05}


@dataclass(frozen=True)
class Settings:
    """The options of ``taylorkern prune``; None is what is decided by the others, see the properties."""

    model: str
    data: str
    weights: str | None = None
    size: int = 64
    batch: int = 64
    workers: int = 2
    val_share: float = 0.2
    augment: bool = False
    criterion: str = "taylor_fo"
    target: float = 0.5
    of: str = "flops"
    every: int = 10
    step: int | None = None
    prune_epochs: float = 1.0
    compensate: bool | None = None
    epochs: int | None = None
    finetune_epochs: int = 3
    optimizer: str = "sgd"
    lr: float | None = None
    weight_decay: float | None = None
    amp: str = "off"
    channels_last: bool = False
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    out: str = "prune-out"
    checkpoint_every: int = 50
    tensorboard: bool = False

    @classmethod
    def of_options(cls, options: Namespace) -> "Settings":
        """Those among a command line's options."""
        given = {field.name: getattr(options, field.name) for field in fields(cls) if hasattr(options, field.name)}
        return cls(**given)

    @property
    def training_epochs(self) -> int:
        """Before pruning."""
        return self.epochs if self.epochs is not None else (0 if self.weights else 3)

    @property
    def peak(self) -> float:
        """The learning rate."""
        return self.lr if self.lr is not None else RATES[self.optimizer, self.training_epochs > 0]

    @property
    def decay(self) -> float:
        """The weight decay."""
        return self.weight_decay if self.weight_decay is not None else DECAY[self.optimizer]

    @property
    def command(self) -> str:
        """The command that makes this result again."""
        words = ["taylorkern", "prune"]
        for field in fields(self):
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if value == field.default and field.default is not MISSING:
                continue
            words += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
        return shlex.join(words)


def keep(folder: Path, settings: Settings, data_digest: str) -> None:
    """Write the settings into ``folder``, or compare them with those that are there.

    Raises CommandError, naming the differences, where the folder belongs to another command, or the data, the weights
    or the file of FILE.py:FUNCTION (not what that imports) changed since, and OSError where it can't be written.
    """
    asked = {**asdict(settings), "data digest": data_digest, "weights digest": _digest(settings.weights)}
    files = {f"{name} file digest": _digest(_file(getattr(settings, name))) for name in ("model", "data")}
    path = folder / FILE
    if not path.exists():
        replace(path, (json.dumps(asked | files, indent=2) + "\n").encode())
        return
    there = _read(path)
    asked |= {name: digest for name, digest in files.items() if name in there}  # a run of before lacks them
    different = [name for name in asked if name not in FREE and there.get(name) != asked[name]]
    if different:
        told = "; ".join(_told(name, there.get(name), asked[name]) for name in different)
        raise CommandError(
            f"{folder} belongs to another run: {told}; give the same options to go on with it, --restart to throw it "
            "away, or another --out"
        )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise CommandError(f"{path} is damaged; --restart throws the run away, or take another --out") from error
    return there if isinstance(there, dict) else {}


def _told(name: str, there: Any, here: Any) -> str:
    if name.endswith("digest"):
        return f"the files of --{name.split()[0]} have changed since it began"
    return f"--{name.replace('_', '-')} is {there} there and {here} here"


def _file(named: str) -> str | None:
    """The file of FILE.py:FUNCTION."""
    file, _, function = named.rpartition(":")
    return file if function and file.endswith(".py") else None


def _digest(file: str | None) -> str | None:
    if file is None or not Path(file).is_file():
        return None
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
