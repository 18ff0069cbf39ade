"""Who takes part in the bench of operations: torch's own ways, timm's, and each of taylorkern's backends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench import operations as cpu
from bench.gpu import providers
from bench.gpu.device import Run
from bench.operations import BN, Case, ChannelScores, Operation, _parts
from taylorkern import backends

ALL = tuple(cpu.OPERATIONS)
NORMALISATIONS = tuple(name for name, op in cpu.OPERATIONS.items() if not isinstance(op, ChannelScores))


@dataclass(frozen=True)
class Contender:
    """A way of doing an operation: ``make`` gives the call that returns y and the gradients of ``case.leaves``.

    What raises one of ``refusals`` is told and left out; anything else ends the piece.
    """

    name: str
    make: Callable[[Operation, Case], Run]
    operations: tuple[str, ...] = ALL
    refusals: type[Exception] = NotImplementedError  # no backend for a dtype


def ours(name: str, kind: str, backend: Any = None) -> Contender:
    """taylorkern's, by the backend that the table chooses or by another."""

    def make(operation: Operation, case: Case) -> Run:
        if backend is None:
            return operation.ours(case)["whole"]
        with providers.serving(kind, backend):
            return providers.forced(kind, backend, operation.ours(case)["whole"])

    return Contender(name, make)


def taylorkerns(kind: str) -> list[Contender]:
    by_backend = [ours(f"ours by {backends.name(b)}", kind, b) for b in providers.listed(kind)]
    return [ours("ours", kind), *by_backend]


def eager(operation: Operation, case: Case) -> Run:
    return operation.eager(case)["whole"]


def native(operation: Operation, case: Case) -> Run:
    """Torch's own kernels of batch normalisation in the place of cuDNN's."""
    with WithoutCudnn():
        call = operation.eager(case)["whole"]

    def run() -> object:
        with WithoutCudnn():
            return call()

    return run


class WithoutCudnn:
    """Within, torch finds no cuDNN. ``torch.backends.cudnn.flags`` does more, and takes longer than a small kernel."""

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.enabled = self.before


def timm(operation: Operation, case: Case) -> Run:
    from timm.layers import BatchNormAct2d  # type: ignore[import-not-found]

    class Model(BN):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.bn = BatchNormAct2d(channels, act_layer=nn.ReLU)

    model = case.give(Model(case.weight.numel()))
    return _parts(model, case.inputs, case.leaves(model), case.dy)["whole"]


def compiled(backend: str) -> Contender:
    def make(operation: Operation, case: Case) -> Run:
        if isinstance(operation, ChannelScores):
            scores = torch.compile(lambda a, g: [(a * g).sum((2, 3))], backend=backend, dynamic=False)
            return lambda: scores(*case.inputs)
        model = case.give(operation.module(case.weight.numel()))
        under: Any = torch.compile(model, backend=backend, dynamic=False)
        return _parts(under, case.inputs, case.leaves(model), case.dy)["whole"]

    return Contender("compiled eager", make, refusals=Exception)


EAGER = Contender("eager", eager)
RIVALS = [
    Contender("eager, native batch norm", native, NORMALISATIONS),
    Contender("timm BatchNormAct2d", timm, ("BN+ReLU",), Exception),
]
