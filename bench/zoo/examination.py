"""One network: coupled, cut at random, and compared with its masked dense self."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from taylorkern.coupling import Coupling, couple
from taylorkern.surgery import SurgeryError, cut
from taylorkern.widened import Widened

from .comparison import draw, error, masked_copy, outputs
from .families import FAMILIES

TOLERANCE = 1e-8
VISIBLE = 1e-4  # the least that a mask has to change, relative to the outputs, for the comparison to say anything
SHARE = 0.3
# Beyond this many parameters surgery's own verification, which holds a second copy, does not fit small machines.
VERIFIED_PARAMETERS = 250_000_000


@dataclass
class Row:
    """What came of one network. Shares are of 1; times in seconds; errors relative to each output's largest."""

    family: str
    network: str
    seed: int
    result: str = ""  # equal, differs, refused (by surgery, by name), nothing (can be cut) or failed
    note: str = ""  # why, unless equal
    stage: str = ""  # the last one begun
    parameters: int = 0
    left: int = 0  # parameters after the cut
    units: int = 0
    free_units: float = 0.0  # the share of units that can be cut
    free_channels: float = 0.0  # the share of channels that belong to one
    frozen_by: list[tuple[str, str, int]] = field(default_factory=list)  # operation, line, labels; without the ends
    warned: list[str] = field(default_factory=list)
    removed: int = 0
    error: float | None = None  # between cut and masked
    effect: float | None = None  # of the mask
    build_s: float = 0.0
    couple_s: float = 0.0
    cut_s: float = 0.0

    @property
    def sound(self) -> bool:
        """Equal to its masked self, or what stopped it has been named."""
        return self.result in ("equal", "refused", "nothing")


class Examination:
    """The stages of one network's examination, each of which can be the last."""

    model: nn.Module
    example: Any
    inputs: Any
    coupling: Coupling
    modes: tuple[bool, ...] = (False,)  # training or not
    dense: list[Tensor]  # its outputs in evaluation mode
    removed: Tensor
    masked: list[list[Tensor]]  # outputs per mode

    def __init__(self, family: str, network: str, seed: int) -> None:
        self.row = Row(family, network, seed)

    def build(self) -> None:
        network = FAMILIES[self.row.family].build(self.row.network, self.row.seed)
        self.model, self.example, self.inputs = network.model, network.example, network.inputs
        self.row.parameters = _parameters(self.model)

    def run(self) -> None:
        """The dense network, which has to compute finite numbers."""
        self.dense = self._outputs(self.model)[0]
        _require(bool(self.dense), "no tensor among the outputs")
        _require(all(bool(t.isfinite().all()) for t in self.dense), "non-finite outputs")
        _require(any(t.dtype == torch.float64 for t in self.dense), "no output in float64")

    def couple(self) -> None:
        start = time.perf_counter()
        self.coupling = coupling = couple(self.model, self.example)
        self.row.couple_s = time.perf_counter() - start
        self.modes = (False, True) if coupling.trained else (False,)
        self.row.units = len(coupling.units)
        channels = torch.cat([torch.zeros(0, dtype=torch.int64), *coupling.outputs.values()])
        self.row.free_channels = float((channels >= 0).double().mean()) if len(channels) else 0.0
        self.row.free_units = float(getattr(coupling, "free_units", self.row.free_channels))
        self.row.frozen_by = _frozen_by(coupling)
        if not coupling.units:
            self.row.result, self.row.note = "nothing", "no unit can be cut"

    def mask(self) -> None:
        self.removed = draw(self.coupling, SHARE)
        self.row.removed = len(self.removed)
        _require(len(self.removed) > 0, "nothing drawn")
        copy = masked_copy(self.model, self.coupling, self.removed)
        self.masked = self._outputs(copy)
        self.row.effect = error(self.dense, self.masked[0])

    def cut(self) -> None:
        verify = self.row.parameters < VERIFIED_PARAMETERS
        start = time.perf_counter()
        cut(self.model, self.coupling, self.removed, self.example, verify=verify)
        self.row.cut_s = time.perf_counter() - start
        self.row.left = _parameters(self.model)
        _require(self.row.left < self.row.parameters, "the cut took no parameter away")

    def compare(self) -> None:
        got = self._outputs(self.model)
        self.row.error = max(error(e, g) for e, g in zip(self.masked, got, strict=True))
        self.row.result = "equal" if self.row.error <= TOLERANCE else "differs"
        self.row.note = "" if self.row.result == "equal" else "runs, but is not its masked self"
        _require(float(self.row.effect or 0) > VISIBLE, f"the mask changes the outputs by only {self.row.effect:.0e}")

    def _outputs(self, model: nn.Module) -> list[list[Tensor]]:
        """Per mode."""
        with Widened():
            return [outputs(model, self.inputs, training) for training in self.modes]


def examine(family: str, name: str, seed: int = 0, begins: Callable[[str], None] = lambda stage: None) -> Row:
    """Build, couple, cut and compare one network; ``begins`` hears of each stage."""
    examination = Examination(family, name, seed)
    row, start = examination.row, time.perf_counter()
    stages = (examination.build, examination.run, examination.couple, examination.mask, examination.cut)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for stage in (*stages, examination.compare):
            row.stage = stage.__name__
            begins(row.stage)
            try:
                stage()
            except SurgeryError as refusal:
                row.result, row.note = "refused", _short(f"{refusal.operation or refusal} in {refusal.module or '?'}")
            except Exception as fault:
                row.result, row.note = "failed", _short(f"{type(fault).__name__}: {fault}")
            row.build_s = row.build_s or time.perf_counter() - start
            if row.result:
                break
    row.warned = list(dict.fromkeys(_short(str(w.message)) for w in warned if w.filename == __file__))
    return row


def _frozen_by(coupling: Coupling) -> list[tuple[str, str, int]]:
    """What froze most first, apart from the model's own inputs and outputs."""
    found: dict[tuple[str, str], int] = {}
    for f in coupling.frozen:
        if not f.operation.startswith("model "):
            place = f.operation, str(getattr(f, "line", ""))
            found[place] = found.get(place, 0) + f.labels
    if coupling.ungated:
        found["no place for a gate", ""] = sum(len(coupling.axes[axis]) for axis in coupling.ungated)
    return sorted(((*place, labels) for place, labels in found.items()), key=lambda item: -item[2])


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _short(text: str) -> str:
    """The first 300 characters, on one line."""
    return " ".join(text.split())[:300]
