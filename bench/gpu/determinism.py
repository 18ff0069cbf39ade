"""Piece ``determinism``: every output, gradient and s has the same bits in 100 runs, by every backend."""

from typing import Any

import torch
from torch import Tensor

from bench import operations as cpu
from bench.gpu import providers
from bench.gpu.task import FoundError, Task
from taylorkern import backends

RUNS = 100
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = [(64, 256, 14, 14), (7, 33, 13, 9)]  # one of whole lines, one of nothing even


def run(task: Task) -> None:
    runs, shapes = (3, SHAPES[1:]) if task.quick else (RUNS, SHAPES)
    different: list[str] = []
    for backend in providers.listed(task.device.kind):
        for shape in shapes:
            for dtype in DTYPES:
                for layout in cpu.LAYOUTS:
                    if task.overdue():
                        task.leave(f"{backends.name(backend)} {shape} {dtype} {layout}")
                        continue
                    rows = _rows(task, backend, shape, dtype, layout, runs)
                    task.add(rows)
                    different += [str(row) for row in rows if row.get("different")]
    if different:
        raise FoundError(f"runs that differ in a bit: {'; '.join(different)}")


def _rows(
    task: Task, backend: Any, shape: tuple[int, int, int, int], dtype: str, layout: str, runs: int
) -> list[dict[str, Any]]:
    rows = []
    for name, operation in cpu.OPERATIONS.items():
        case = cpu.Case.random(shape, operation.inputs, layout, DTYPES[dtype], task.device.kind)
        row: dict[str, Any] = {
            "operation": name,
            "backend": backends.name(backend),
            "shape": list(shape),
            "dtype": dtype,
        }
        row |= {"layout": layout}
        try:
            with providers.serving(task.device.kind, backend):
                row |= {"runs": runs, "different": differing(operation.ours(case)["whole"], runs)}
        except NotImplementedError as refusal:
            row["refused"] = str(refusal)
        rows.append(row)
    return rows


def differing(call: Any, runs: int) -> int:
    """In how many of ``runs`` further runs a bit is another than in the first."""
    first = [_bits(t) for t in call()]
    return sum(not all(map(torch.equal, first, map(_bits, call()))) for _ in range(runs))


def _bits(t: Tensor) -> Tensor:
    """The memory of ``t`` as integers, so that a NaN equals itself."""
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
