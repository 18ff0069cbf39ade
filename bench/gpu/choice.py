"""Piece ``choice``: the fastest backend by operation, dtype, layout and size, and its way into the provider table.

Backends are called by themselves, without autograd, interleaved; launches count, as they do in use.
"""

import gc
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu import facts, providers
from bench.gpu.operations import reason
from bench.gpu.task import Task
from bench.gpu.timing import stamped
from bench.operations import LAYOUTS
from bench.pairs import WrongError, quartiles, ratios
from taylorkern import backends, files
from taylorkern.backends.choice import MEASURED

KEYS = ("operation", "dtype", "layout", "log2_numel", "backend", "ratio_to_next")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SIZES = [*range(28, 13, -2), *range(27, 13, -2)]  # logarithms of the numbers of elements; coarsely first
ROUNDS = 7
AGREEING = 0.05  # of backends with each other, relatively: who finds something else altogether is not timed


def run(task: Task) -> None:
    task.tell(capability=facts.DETAILS[task.device.kind]().get("capability"))
    sizes = [10] if task.quick else SIZES
    pairs = [("channels_last", "bfloat16"), *itertools.product(LAYOUTS, DTYPES)]
    for layout, dtype in dict.fromkeys(pairs):
        for size in sizes:
            if task.overdue():
                task.leave(f"{layout} {dtype} 2^{size}")
                continue
            task.add(list(measured(layout, dtype, size, task)))
            gc.collect()


def shape(size: int) -> tuple[int, int, int, int]:
    """[N, C, H, W] of 2**size elements, as networks have them: more of everything in larger ones.

    >>> shape(14), shape(28)
    ((8, 64, 4, 8), (256, 256, 64, 64))
    """
    c = min(max(6 + (size - 14) // 5, 2), 8)
    n = min(max(3 + (size - 14) * 5 // 14, 2), 8)
    s = size - c - n
    return 2**n, 2**c, 2 ** (s // 2), 2 ** (s - s // 2)


def measured(layout: str, dtype: str, size: int, task: Task) -> Iterator[dict[str, Any]]:
    """A row for each operation that two backends or more serve."""
    kind, generator = task.device.kind, torch.Generator(task.device.kind).manual_seed(size)
    x, dy = (
        torch.randn(shape(size), generator=generator, device=kind)
        .to(DTYPES[dtype])
        .contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    channels = x.shape[1]
    weight, bias, mean = (torch.randn(channels, generator=generator, device=kind) for _ in range(3))
    var = torch.rand(channels, generator=generator, device=kind) + 0.5
    arguments = {
        "channel_scores": (x, dy),
        "batch_norm_act": (x, None, weight, bias, None, None, True, 1e-5, "relu", 0.0),
        "batch_norm_act_backward": (dy, x, None, weight, bias, mean, var, True, 1e-5, "relu", 0.0, False),
    }
    for operation, given in arguments.items():
        row = {"operation": operation, "dtype": dtype, "layout": layout, "log2_numel": size}
        ways, refused = _ways(operation, given, kind)
        found = {} if len(ways) < 2 else _ranked(stamped(ways, ROUNDS, task.device, task.until).times)
        yield row | found | ({"refused": refused} if refused else {})


def _ways(operation: str, given: tuple[Any, ...], kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Calls by backend, each with the others' result, and why other backends don't take part."""
    ways: dict[str, Any] = {}
    refused: dict[str, str] = {}
    want: Any = None
    for backend in providers.ranked(kind):
        name = backends.name(backend)
        if not backend.supports(operation, given[0]):
            refused[name] = "not served"
            continue
        call = getattr(backend, operation)
        try:
            found = call(*given)
        except torch.OutOfMemoryError as refusal:
            refused[name] = reason(refusal)
            continue
        outputs = [found] if isinstance(found, torch.Tensor) else list(found)
        want = want or outputs
        if not all(map(_alike, outputs, want)):
            raise WrongError(f"{name} and {next(iter(ways))} find another {operation} of {tuple(given[0].shape)}")
        ways[name] = lambda call=call: call(*given)
    return ways, refused


def _alike(t: torch.Tensor, want: torch.Tensor) -> bool:
    if t.numel() == want.numel() == 0:
        return True
    return bool((t.float() - want.float()).norm() <= AGREEING * want.float().norm())


def _ranked(times: dict[str, list[float]]) -> dict[str, Any]:
    """The fastest, and what it takes of the next."""
    order = sorted(times, key=lambda name: statistics.median(times[name]))
    first, second, *_ = order
    to_next = quartiles(ratios(times[first], times[second]))
    to_first = {name: quartiles(ratios(times[name], times[first])) for name in order}
    return {"backend": first, "ratio_to_next": round(to_next["median"], 3), "spread": to_next, "to first": to_first}


def keep(result: dict[str, Any], path: Path = MEASURED) -> int:
    """Put the rows of a result into the file that the provider table reads, for its device; how many there are.

    Raises SystemExit where the result has none, or is a trial.
    """
    piece = result["pieces"].get("choice", {})
    rows = [{key: row[key] for key in KEYS} for row in piece.get("rows", []) if "backend" in row]
    if result["quick"] or not rows:
        raise SystemExit("the result has no choice to keep: run python -m bench.gpu --only choice on a GPU")
    kept = json.loads(path.read_text())
    kept["devices"][result["device"]] = {"capability": piece["capability"], "rows": rows}
    files.replace(path, (json.dumps(kept, indent=1) + "\n").encode())
    return len(rows)
