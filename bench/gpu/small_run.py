"""Every kernel of every compiled backend over a few odd shapes, for compute-sanitizer: python -m bench.gpu.small_run

Tensors are made on the processor, so that the device runs little else. Prints how many calls of each backend ran, and
ends with 1 where one of them finds something else than the reference.
"""

import argparse
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from bench.gpu import providers
from taylorkern import backends, ops
from taylorkern.backends import reference

# Whole lines, ragged rows, single channels and positions, one sample, nothing
SHAPES = [(2, 64, 8, 8), (3, 33, 13, 9), (5, 1, 7, 3), (4, 17, 1, 1), (1, 8, 31, 33), (2, 0, 4, 4)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FORMS = [
    (True, "relu", False),
    (True, "relu", True),
    (True, "relu6", True),
    (True, "none", False),
    (False, "silu", False),
]
SLOPE = 0.1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="these alone; all by default")
    options = parser.parse_args(arguments)
    kind = options.device
    ran, wrong = Counter[str](), []
    for backend in providers.listed(kind):
        if options.backends and backends.name(backend) not in options.backends:
            continue
        for dtype, tolerance in DTYPES.items():
            for layout in LAYOUTS.values():
                for shape in SHAPES:
                    found = _calls(backend, shape, dtype, layout, kind)
                    ran[backends.name(backend)] += len(found)
                    wrong += [
                        f"{backends.name(backend)} {name} {shape} {dtype}" for name, d in found if not d <= tolerance
                    ]
    print(f"small_run: {dict(ran)} calls, {len(wrong)} wrong", *wrong, sep="\n")
    return 1 if wrong or not ran.total() else 0


def _calls(
    backend: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, kind: str
) -> list[tuple[str, float]]:
    """Each operation and form that the backend serves, with its distance from the reference on the processor."""
    x, dy, residual = (_normal(shape, seed).to(dtype).contiguous(memory_format=layout) for seed in range(3))
    weight, bias, mean = (_normal(shape[1:2], seed) for seed in range(3, 6))
    var = _normal(shape[1:2], 6).square() + 0.5
    found = _compared(backend, "channel_scores", (x, dy), kind)
    for training, activation, adds in FORMS:
        forward = (x, residual if adds else None, weight, bias, mean, var, training, 1e-5, activation, SLOPE)
        found += _compared(backend, "batch_norm_act", forward, kind)
        y, m, v, mask = reference.batch_norm_act(*forward)
        told = ops.told(forward[1], activation, y, mask)
        backward = (dy, x, told, weight, bias, m, v, training, 1e-5, activation, SLOPE, adds)
        found += _compared(backend, "batch_norm_act_backward", backward, kind)
    return found


def _compared(backend: Any, operation: str, arguments: tuple[Any, ...], kind: str) -> list[tuple[str, float]]:
    there = [t.to(kind) if isinstance(t, Tensor) else t for t in arguments]
    if not backend.supports(operation, there[0]):
        return []
    want = getattr(reference, operation)(*arguments)
    got = getattr(backend, operation)(*there)
    pairs = zip(*([t] if isinstance(t, Tensor) else t for t in (got, want)), strict=True)
    return [(operation, max(_distance(g.cpu(), w) for g, w in pairs))]


def _distance(got: Tensor, want: Tensor) -> float:
    """Relative in norm; infinite where a NaN is."""
    if want.numel() == 0:
        return float("inf") if got.numel() else 0.0
    far = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300)
    return float(far.nan_to_num(torch.inf))


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
