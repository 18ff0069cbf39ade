"""Piece ``precision``: outputs, gradients and s of narrow dtypes at most twice as far from float64 as torch's own.

"Torch's own" multiplies gates of ones into eager's result, and so finds s by plain autograd.
"""

from typing import Any

import torch

from bench import operations as cpu
from bench.gpu import providers
from bench.gpu.task import FoundError, Task
from bench.pairs import WrongError
from taylorkern import backends

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = [(32, 64, 56, 56), (32, 512, 7, 7), (7, 33, 13, 9)]


def run(task: Task) -> None:
    wrong: list[str] = []
    for backend in providers.listed(task.device.kind):
        for shape in SHAPES[-1:] if task.quick else SHAPES:
            for dtype in DTYPES:
                for layout in cpu.LAYOUTS:
                    if task.overdue():
                        task.leave(f"{backends.name(backend)} {shape} {dtype} {layout}")
                        continue
                    task.add(rows := [_row(task, backend, shape, dtype, layout, name) for name in cpu.OPERATIONS])
                    wrong += [row["wrong"] for row in rows if "wrong" in row]
    if wrong:
        raise FoundError("; ".join(wrong))


def _row(
    task: Task, backend: Any, shape: tuple[int, int, int, int], dtype: str, layout: str, name: str
) -> dict[str, Any]:
    operation, kind = cpu.OPERATIONS[name], task.device.kind
    row = {"operation": name, "backend": backends.name(backend), "shape": list(shape), "dtype": dtype}
    row |= {"layout": layout}
    with providers.serving(kind, backend):
        try:
            case = cpu.Case.random(shape, operation.inputs, layout, DTYPES[dtype], kind)
            return row | {"distance": cpu.checked(operation, case)}
        except NotImplementedError as refusal:
            return row | {"refused": str(refusal)}
        except WrongError as found:
            return row | {"wrong": f"{backends.name(backend)}: {found}"}
