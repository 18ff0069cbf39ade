"""The pieces of the check, the most valuable first, and the share of the time that each gets."""

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu.device import DEVICES
from bench.gpu.task import Task


@dataclass(frozen=True)
class Piece:
    """``seconds`` of the usual budget; more or less of it where the budget is another."""

    seconds: int
    shows: str
    module: str


PIECES = {
    "facts": Piece(100, "the device, its copy bandwidth, what serves (builds the kernels)", "bench.gpu.facts"),
    "determinism": Piece(25, "100 runs with the same bits", "bench.gpu.determinism"),
    "precision": Piece(20, "s and gradients of bf16 and fp16 against float64", "bench.gpu.precision"),
    "operations": Piece(95, "every operation against eager and its rivals", "bench.gpu.operations"),
    "steps": Piece(80, "whole ResNet-50 training steps", "bench.gpu.steps"),
    "tests": Piece(80, "the tests that touch CUDA", "bench.gpu.testing"),
    "sanitizer": Piece(60, "compute-sanitizer's memcheck and racecheck", "bench.gpu.sanitizer"),
    "choice": Piece(20, "the fastest backend by operation, dtype, layout and size", "bench.gpu.choice"),
    "compiled": Piece(55, "training steps under torch.compile", "bench.gpu.compiled_steps"),
}
BUDGET = sum(piece.seconds for piece in PIECES.values())
MARGIN = 0.1  # of a piece's time, in which it should end by itself


def main() -> None:
    """Runs one piece in this process: python -m bench.gpu.pieces PIECE --device cuda --seconds 60 --part FILE"""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("piece", choices=list(PIECES))
    parser.add_argument("--device", choices=list(DEVICES), default="cuda")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--part", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = DEVICES[options.device]()
    task = Task(device, options.quick, options.seconds * (1 - MARGIN), options.part)
    task.tell(device=device.name())
    importlib.import_module(PIECES[options.piece].module).run(task)


if __name__ == "__main__":
    main()
