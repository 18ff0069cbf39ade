"""Piece ``operations``: scored and fused against eager and unscored on the device, forward and backward in one.

Every contender's result is compared with float64 before it is timed. Each is timed twice: by events around the call,
launches included, and replayed from a CUDA graph, without them. Inputs take turns where the cache could hold them.
GB/s are those of the bytes that the code has to move, streaming: a variant that keeps tensors on the chip may come out
above the copy that ran in the same round.
"""

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import operations as cpu
from bench.gpu.contenders import EAGER, RIVALS, Contender, compiled, taylorkerns
from bench.gpu.device import Device, Run
from bench.gpu.task import Task
from bench.gpu.timing import Stamped, rotated, sets_needed, stamped
from bench.operations import LAYOUTS, Case, Operation
from bench.pairs import WrongError, quartiles, ratios

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
BATCH, ROUNDS = 256, 15
JUDGED = ("BN+ReLU", "channel_scores")  # by bars, so first
FEWER = slice(None, None, 3)  # of an operation's shapes, beside the main dtype and layout
RIVALS_FACTOR, RIVALS_FLOOR = 10, 1e-4  # what of a rival is no slip of rounding, in torch's own distances from float64
# Passes over a tensor, forward and backward together, as CUDA's kernels make them: cuDNN reads x twice and writes z,
# an addition makes three and a ReLU two; backward, the ReLU makes three, the normalisation reads x and dz twice and
# writes dx. Ours as in bench.operations, but that statistics take one pass.
PASSES = {
    "BN+ReLU": {"ours": 8, "eager": 13},
    "BN+add+ReLU": {"ours": 12, "eager": 16},
    "BN": {"ours": 8, "eager": 8},
    "channel_scores": {"ours": 2, "eager": 4},
}


@dataclass(frozen=True)
class Job:
    operation: str
    layout: str
    dtype: str
    shape: tuple[int, int, int, int]
    under_compiler: bool = False  # torch.compile's turn, which takes long; else that of all others

    @property
    def subject(self) -> dict[str, Any]:
        return {"operation": self.operation, "layout": self.layout, "dtype": self.dtype, "shape": list(self.shape)}


def jobs(quick: bool) -> Iterator[Job]:
    """All, the most telling first."""
    if quick:
        shape = (4, 3, 5, 5)
        yield from (Job(name, "channels_last", "float32", shape) for name in cpu.OPERATIONS)
        yield from (Job("BN+ReLU", "contiguous", "bfloat16", shape, under) for under in (False, True))
        return
    yield from _over("channels_last", "bfloat16", slice(None))
    yield from _over("channels_last", "bfloat16", FEWER, under_compiler=True)
    others = [pair for pair in itertools.product(LAYOUTS, DTYPES) if pair != ("channels_last", "bfloat16")]
    for layout, dtype in others:
        yield from _over(layout, dtype, FEWER)


def _over(layout: str, dtype: str, which: slice, under_compiler: bool = False) -> Iterator[Job]:
    for name in sorted(cpu.OPERATIONS, key=lambda name: name not in JUDGED):
        operation = cpu.OPERATIONS[name]
        for channels, side in operation.shapes[which]:
            yield Job(name, layout, dtype, (BATCH, channels, side, side), under_compiler)


def run(task: Task) -> None:
    for job in jobs(task.quick):
        if task.overdue():
            task.leave(" ".join(map(str, job.subject.values())) + ", compiled" * job.under_compiler)
            continue
        task.add(measured(job, task))
        _forget()


def measured(job: Job, task: Task) -> list[dict[str, Any]]:
    """A row for every contender."""
    operation, device = cpu.OPERATIONS[job.operation], task.device
    cases = _cases(job, operation, device)
    failed: dict[str, str] = {}
    agreement: dict[str, dict[str, float]] = {}
    ways: dict[str, list[Run]] = {}
    for contender in contenders(job, task):
        try:
            agreement[contender.name] = checked(contender, operation, cases[0])
            ways[contender.name] = [contender.make(operation, case) for case in cases]
        except WrongError:
            raise
        except contender.refusals as refusal:
            failed[contender.name] = reason(refusal)
    x = cases[0].inputs[0].detach()
    ways["copy"] = [_copy(case) for case in cases]
    by_event = stamped(
        {name: rotated(calls) for name, calls in ways.items()}, 3 if task.quick else ROUNDS, device, task.until
    )
    by_graph, ungraphed = replayed(ways, task)
    rows = [
        _row(job, name, x, by_event, by_graph, ungraphed.get(name))
        | {"checked": agreement[name], "peak": device.peak(ways[name][0])}
        for name in agreement
    ]
    base = {"suite": "operations", "subject": job.subject, "to": "eager"}
    rows += [base | {"way": name, "failed": why} for name, why in failed.items()]
    return rows if not job.under_compiler else [row for row in rows if row["way"].startswith("compiled")]


def contenders(job: Job, task: Task) -> list[Contender]:
    if job.under_compiler:
        return [EAGER, compiled("aot_eager" if task.quick else "inductor")]
    found = [EAGER, *taylorkerns(task.device.kind), *RIVALS]
    return [contender for contender in found if job.operation in contender.operations]


def _cases(job: Job, operation: Operation, device: Device) -> list[Case]:
    def case(seed: int) -> Case:
        return Case.random(job.shape, operation.inputs, job.layout, DTYPES[job.dtype], device.kind, seed)

    first = case(0)
    held = sum(t.nbytes for t in (*first.inputs, first.dy))
    return [first, *map(case, range(1, sets_needed(held, device.cache())))]


def checked(contender: Contender, operation: Operation, case: Case) -> dict[str, float]:
    """Distances from float64, the largest over everything returned; raises WrongError where one is too large.

    taylorkern's may be twice as far as torch's own. A rival only has to do the same thing.
    """
    calm = operation.without_kinks(case)
    want = operation.explicit(calm.double())()
    torchs = cpu._distances(operation.explicit(calm)(), want)
    got: Any = contender.make(operation, calm)()
    factor, floor = (2.0, 1e-6) if contender.name.startswith("ours") else (RIVALS_FACTOR, RIVALS_FLOOR)
    found = cpu._distances(got, want[: len(got)])
    if not all(d <= factor * t + floor for d, t in zip(found, torchs, strict=False)):
        raise WrongError(
            f"{contender.name}: {operation.name} {tuple(case.dy.shape)} {case.dy.dtype} is {found} from float64, "
            f"torch's own {torchs}; not timed"
        )
    return {"distance from float64": max(found), "torch's own": max(torchs)}


def replayed(ways: dict[str, list[Run]], task: Task) -> tuple[Stamped | None, dict[str, str]]:
    """Times of the replayed graphs of all ways that can be captured, and why the others can't."""
    graphs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, calls in ways.items():
        try:
            graphs[name] = rotated([task.device.captured(call) for call in calls])
        except Exception as refusal:  # whatever isn't allowed in a capture
            refused[name] = reason(refusal)
    if not graphs:
        return None, refused
    return stamped(graphs, 3 if task.quick else ROUNDS, task.device, task.until), refused


def _row(
    job: Job, name: str, x: torch.Tensor, by_event: Stamped, by_graph: Stamped | None, refused: str | None
) -> dict[str, Any]:
    passes = PASSES[job.operation]["ours" if name.startswith("ours") else "eager"]
    times = by_event.times
    row: dict[str, Any] = {
        "suite": "operations",
        "subject": job.subject,
        "way": name,
        "to": "eager",
        "pairs": len(times[name]),
        "passes": passes,
        **_compared(name, passes * x.nbytes, x.nbytes, times),
        "launching": quartiles(ratios(by_event.launches[name], times[name])),
    }
    if by_graph is None or name not in by_graph.times:
        return row | {"graph": {"failed": refused}}
    return row | {"graph": _compared(name, passes * x.nbytes, x.nbytes, by_graph.times)}


def _compared(name: str, moved: int, size: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Against eager, against a copy of the same round, and in GB/s."""
    found: dict[str, Any] = {"GB/s": quartiles([moved / t / 1e9 for t in times[name]])}
    if "eager" in times:
        found["ratio"] = quartiles(ratios(times[name], times["eager"]))
    if "copy" in times:
        shares = ratios([c * moved / (2 * size) for c in times["copy"]], times[name])
        found["of copy"] = quartiles(shares)
    return found


def _copy(case: Case) -> Run:
    x = case.inputs[0].detach()
    target = torch.empty_like(x)
    return lambda: target.copy_(x)


def _forget() -> None:
    """Give back what the last job held: models, graphs and their memory."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def reason(refusal: Exception) -> str:
    return f"{type(refusal).__name__}: {' '.join(str(refusal).split())[:200]}"
