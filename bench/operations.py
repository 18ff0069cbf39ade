"""The operations by themselves: scored and fused against eager and unscored, forward and backward, shape by shape.

    python bench/operations.py [--batch 8] [--pairs 15] [--dtype float32] [--json FILE]

Shapes are those of ResNet-50 on 224x224 images. "eager" is torch's batch normalisation in training, its addition and
its in-place ReLU; "ours" is one operation that also delivers every sample's and channel's gate gradient. Both are
checked against float64 before anything is timed. Bytes are what an operation has to move with x, dy and y read or
written once a pass; the copy that they are compared with is measured in the same run.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pairs import interleaved, quartiles, ratios
from torch import Tensor

from taylorkern import ops
from taylorkern.autograd import BatchNormAct

# Channels and side of every BN+ReLU of ResNet-50, and of every BN+add+ReLU.
RELU = [(64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)]
ADD = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# Passes over a tensor: (forward, backward) of ours.
PASSES = {"BN+ReLU": (3, 5), "BN+add+ReLU": (4, 7)}


@dataclass
class Case:
    """One operation on one shape, with what it reads."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def random(cls, batch: int, channels: int, side: int, residual: bool, layout: torch.memory_format) -> "Case":
        def values() -> Tensor:
            return torch.randn(batch, channels, side, side).contiguous(memory_format=layout)

        weight, bias = torch.rand(channels) + 0.5, torch.randn(channels) * 0.3
        return cls(values(), values() if residual else None, values(), weight, bias)

    def to(self, dtype: torch.dtype) -> "Case":
        """x, residual and dy in ``dtype``; parameters stay float32 unless it is wider."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = [None if t is None else t.to(dtype) for t in (self.x, self.residual, self.dy)]
        return Case(*tensors, self.weight.to(wide), self.bias.to(wide))

    def leaves(self) -> list[Tensor]:
        return [t.requires_grad_() for t in (self.x, self.residual, self.weight, self.bias) if t is not None]


def eager(case: Case) -> Callable[[], list[Tensor]]:
    leaves = case.leaves()

    def run() -> list[Tensor]:
        z = F.batch_norm(case.x, None, None, case.weight, case.bias, True)
        if case.residual is not None:
            z += case.residual
        y = F.relu(z, inplace=True)
        return [y.detach(), *torch.autograd.grad(y, leaves, case.dy)]

    return run


def ours(case: Case) -> Callable[[], list[Tensor]]:
    leaves = case.leaves()
    z = torch.ones(()).expand(case.x.shape[:2]).to(case.weight.dtype).requires_grad_()

    def run() -> list[Tensor]:
        arguments = (case.weight, case.bias)
        with torch.no_grad():
            y, mean, var = ops.batch_norm_act(case.x, case.residual, *arguments, None, None, True, 1e-5, "relu")
        y = BatchNormAct.apply(case.x, case.residual, *arguments, z, None, y, mean, var, True, 1e-5, "relu")
        return [y.detach(), *torch.autograd.grad(y, [*leaves, z], case.dy)][: len(leaves) + 1]

    return run


def check(case: Case) -> tuple[float, float]:
    """Relative distances from float64: ours, and eager's own. Over the output and every gradient, the largest.

    Rounding puts some activations on the other side of the ReLU, so neither is at float32's precision.
    """
    want = eager(case.to(torch.float64))()

    def distance(got: list[Tensor]) -> float:
        return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))

    return distance(ours(case)()), distance(eager(case)())


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def copy_speed(elements: int, rounds: int) -> float:
    """Bytes read and written per second by a copy of that many float32."""
    a, b = torch.randn(elements), torch.empty(elements)
    taken = interleaved({"copy": lambda: b.copy_(a)}, rounds)["copy"]
    return 8 * elements / quartiles(taken)["median"]


def measured(options: argparse.Namespace) -> list[dict]:
    rows = []
    dtype = getattr(torch, options.dtype)
    for layout, memory_format in LAYOUTS.items():
        for operation, shapes in (("BN+ReLU", RELU), ("BN+add+ReLU", ADD)):
            for channels, side in shapes:
                case = Case.random(options.batch, channels, side, operation == "BN+add+ReLU", memory_format).to(dtype)
                error, eagers = check(case)
                if error > 2 * eagers + 1e-3:
                    raise SystemExit(f"{operation} {channels}x{side} {layout}: wrong by {error:.1e}, nothing is timed")
                ways = {"eager": eager(case), "ours": ours(case)}
                for run in ways.values():
                    run()
                times = interleaved(ways, options.pairs)
                moved = sum(PASSES[operation]) * case.x.numel() * case.x.element_size()
                rows.append(
                    {
                        "operation": operation,
                        "layout": layout,
                        "shape": [options.batch, channels, side, side],
                        "error": {"ours": error, "eager": eagers},
                        "ratio": quartiles(ratios(times["ours"], times["eager"])),
                        "bytes": moved,
                        "of copy": moved
                        / quartiles(times["ours"])["median"]
                        / copy_speed(case.x.numel(), options.pairs),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rows = measured(options)
    for row in rows:
        q, shape = row["ratio"], "x".join(map(str, row["shape"]))
        print(
            f"{row['operation']:12} {row['layout']:13} {shape:14} {q['median']:.2f} of eager ({q['p25']:.2f} to "
            f"{q['p75']:.2f})   {row['bytes'] / 2**20:6.1f} MiB at {row['of copy']:.2f} of a copy's speed"
        )
    means = {}
    for layout in LAYOUTS:
        for operation in PASSES:
            of = [r["ratio"]["median"] for r in rows if (r["layout"], r["operation"]) == (layout, operation)]
            means[f"{operation}, {layout}"] = geometric(of)
            print(f"{operation}, {layout}: geometric mean {means[f'{operation}, {layout}']:.3f} of eager")
    if options.json:
        facts = {key: str(value) for key, value in vars(options).items() if key != "json"}
        facts |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
        options.json.write_text(json.dumps({"options": facts, "geometric means": means, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
