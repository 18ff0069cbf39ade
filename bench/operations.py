"""The operations by themselves: scored and fused against eager and unscored, forward and backward, shape by shape.

    python -m bench.operations [--batch 8] [--pairs 15] [--dtype float32] [--json FILE]

Shapes are those of ResNet-50 on 224x224 images. "eager" is torch's own layers as torchvision writes them (addition and
ReLU in place), unscored; "ours" is the same module converted, which also delivers every sample's and channel's gate
gradient. Both update running statistics. Outputs, gradients and scores are compared with float64 first.

"of copy" is the speed at which the operation moves the bytes that it has to move, as a share of the speed of
``b.copy_(a)`` on a tensor of that size in the same round. Faults are minor page faults per call.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taylorkern as tk
from bench.faults import Counted
from bench.pairs import Timer, Times, WrongError, geometric, interleaved, quartiles, ratios
from taylorkern import ops

# Channels and side of every BN+ReLU of ResNet-50, and of every BN+add+ReLU.
RELU = [(64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)]
ADD = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Where the affine output is nearer to 0 than this, no gradient arrives in the check: rounding decides on which side of
# a ReLU such an element is, and one of them outweighs the rounding of all others together.
KINK = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.025}

Call = Callable[[], Any]
Calls = dict[str, Call]  # by part: "whole", and where that is made of two, "forward" and "backward"


class BN(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class BNReLU(BN):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))


class BNAddReLU(BN):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        out = self.bn(x)
        out += residual
        return self.relu(out)


@dataclass
class Case:
    """What an operation reads, and its parameters."""

    inputs: list[Tensor]  # x, or x and the residual, or an activation and its gradient; [N, C, H, W] each
    dy: Tensor  # [N, C, H, W]
    weight: Tensor  # [C], float32 beside narrower inputs
    bias: Tensor

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int, int],
        inputs: int,
        layout: str,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
    ) -> "Case":
        generator = torch.Generator(device).manual_seed(seed)

        def values() -> Tensor:
            wide = torch.randn(shape, generator=generator, device=device)
            return wide.to(dtype).contiguous(memory_format=LAYOUTS[layout])

        weight = torch.rand(shape[1], generator=generator, device=device) + 0.5
        bias = torch.randn(shape[1], generator=generator, device=device) * 0.3
        return cls([values() for _ in range(inputs)], values(), weight, bias)

    def double(self) -> "Case":
        return Case(
            [t.detach().double() for t in self.inputs], self.dy.double(), self.weight.double(), self.bias.double()
        )

    def give(self, model: BN) -> BN:
        """``model`` with this case's parameters, in training."""
        with torch.no_grad():
            for parameter, value in ((model.bn.weight, self.weight), (model.bn.bias, self.bias)):
                parameter.data = value.clone()
        return model.to(self.weight.device, self.weight.dtype)

    def leaves(self, model: BN) -> list[Tensor]:
        return [*(t.requires_grad_() for t in self.inputs), model.bn.weight, model.bn.bias]


@dataclass(frozen=True)
class Normalisation:
    """A batch normalisation in training with what follows it, forward and backward."""

    name: str
    module: type[BN]
    inputs: int
    shapes: list[tuple[int, int]]
    # Passes over a tensor as the code makes them, forward and backward, of ours and of eager; one that finds its slab
    # in cache counts as well. Torch's CPU kernels read x for the mean, for the variance and to normalise it, and write
    # z; an addition reads two tensors and writes one, a ReLU reads and writes. Backward, the ReLU reads dy and y and
    # writes dz, the normalisation reads x and dz twice and writes dx.
    passes: dict[str, tuple[int, int]]
    fuse: bool = True

    def eager(self, case: Case) -> Calls:
        model = case.give(self.module(case.weight.numel()))
        return _parts(model, case.inputs, case.leaves(model), case.dy)

    def ours(self, case: Case) -> Calls:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what could not be fused is told by a warning
            model: Any = tk.convert(case.give(self.module(case.weight.numel())), fuse=self.fuse)
        scores = tk.Scores(model, None)
        leaves = case.leaves(model)
        model(*case.inputs)
        (gate,) = model.bn.gate.leaves()
        model.keep = scores  # gates are there as long as their Scores
        return _parts(model, case.inputs, [*leaves, gate], case.dy)

    def explicit(self, case: Case) -> Call:
        """The same in plain autograd with a gate of ones that is really multiplied."""
        model = case.give(self.module(case.weight.numel()))
        gate = torch.ones(*case.dy.shape[:2], 1, 1, dtype=case.dy.dtype, device=case.dy.device, requires_grad=True)
        model.bn.register_forward_hook(lambda module, inputs, z: z * gate)
        whole = _parts(model, case.inputs, [*case.leaves(model), gate], case.dy)["whole"]

        def run() -> list[Tensor]:
            *others, s = whole()
            return [*others, s.flatten(1)]

        return run

    def without_kinks(self, case: Case) -> Case:
        """The case with no gradient at elements that a ReLU might let through or not."""
        wide, seen = case.double(), []
        model = wide.give(self.module(case.weight.numel()))
        with torch.no_grad():
            model.bn.register_forward_hook(lambda module, inputs, z: seen.append(z.clone()))
            model(*wide.inputs)
            z = seen[0] + sum(wide.inputs[1:])
            return Case(case.inputs, case.dy * (z.abs() > KINK[case.dy.dtype]), case.weight, case.bias)

    def bytes_moved(self, whose: str, part: str, x: Tensor) -> int:
        forward, backward = self.passes[whose]
        return {"whole": forward + backward, "forward": forward, "backward": backward}[part] * x.nbytes


@dataclass(frozen=True)
class ChannelScores:
    """s [N, C] from an activation and its gradient, against ``(a * g).sum((2, 3))``."""

    name: str
    shapes: list[tuple[int, int]]
    passes: dict[str, int]  # eager writes the product and reads it again
    inputs: int = 2

    def eager(self, case: Case) -> Calls:
        a, g = case.inputs
        return {"whole": lambda: [(a * g).sum((2, 3))]}

    def ours(self, case: Case) -> Calls:
        return {"whole": lambda: [ops.channel_scores(*case.inputs)]}

    def explicit(self, case: Case) -> Call:
        return self.eager(case)["whole"]

    def without_kinks(self, case: Case) -> Case:
        return case

    def bytes_moved(self, whose: str, part: str, x: Tensor) -> int:
        return self.passes[whose] * x.nbytes


Operation = Normalisation | ChannelScores
OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        Normalisation("BN+ReLU", BNReLU, 1, RELU, {"ours": (3, 5), "eager": (6, 8)}),
        Normalisation("BN+add+ReLU", BNAddReLU, 2, ADD, {"ours": (4, 8), "eager": (9, 8)}),
        Normalisation("BN", BN, 1, RELU, {"ours": (4, 5), "eager": (4, 5)}, fuse=False),
        ChannelScores("channel_scores", RELU, {"ours": 2, "eager": 4}),
    )
}


def _parts(model: nn.Module, inputs: list[Tensor], leaves: list[Tensor], dy: Tensor) -> Calls:
    """Forward, backward and both; the whole returns y and the gradients of ``leaves``."""
    graph: Tensor = model(*inputs)

    def whole() -> list[Tensor]:
        y = model(*inputs)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph, leaves, dy, retain_graph=True)

    return {"whole": whole, "forward": lambda: model(*inputs), "backward": backward}


def checked(operation: Operation, case: Case) -> dict[str, float]:
    """Relative distances from float64, the largest over y, all gradients and s: ours, and torch's with explicit gates.

    Raises WrongError where one of ours is more than twice torch's own.
    """
    calm = operation.without_kinks(case)
    want = operation.explicit(calm.double())()
    found, torchs = (_distances(run(), want) for run in (operation.ours(calm)["whole"], operation.explicit(calm)))
    if not all(d <= 2 * t + 1e-6 for d, t in zip(found, torchs, strict=True)):
        shape = tuple(case.dy.shape)
        raise WrongError(
            f"{operation.name} {shape} {case.dy.dtype}: ours is {found} from float64, torch's {torchs}; not timed"
        )
    return {"ours": max(found), "torch": max(torchs)}


def _distances(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [float((g.detach().double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


def cases(names: list[str], dtypes: list[str]) -> Iterator[tuple[str, str, str, int, int]]:
    """Operation, layout, dtype, channels and side of everything that is measured."""
    for name in names:
        for layout in LAYOUTS:
            for dtype in dtypes:
                for channels, side in OPERATIONS[name].shapes:
                    yield name, layout, dtype, channels, side


def measured(
    name: str, layout: str, dtype: str, shape: tuple[int, int, int, int], rounds: int, timer: Timer = interleaved
) -> list[dict[str, Any]]:
    """One row for each part of an operation on one shape, after it has been checked."""
    operation = OPERATIONS[name]
    case = Case.random(shape, operation.inputs, layout, DTYPES[dtype])
    agreement = checked(operation, case)
    x = case.inputs[0].detach()
    copy = torch.empty_like(x)
    by_whom = {"ours": operation.ours(case), "eager": operation.eager(case)}
    ways = {f"{whose}, {part}": Counted(run) for whose, parts in by_whom.items() for part, run in parts.items()} | {
        "copy": Counted(lambda: copy.copy_(x))
    }
    for run in ways.values():
        run()
        run.counts.clear()
    times = timer(dict(ways), rounds)
    subject = {"operation": name, "layout": layout, "dtype": dtype, "shape": list(shape)}
    return [
        {
            "suite": "operations",
            "subject": subject | {"part": part},
            "way": "ours",
            "to": "eager",
            "pairs": rounds,
            "ratio": quartiles(ratios(times[f"ours, {part}"], times[f"eager, {part}"])),
            "checked": {"distance from float64": agreement["ours"], "torch's own": agreement["torch"]},
            **_moved(operation, part, x, times),
            "faults": {whose: ways[f"{whose}, {part}"].median() for whose in by_whom},
        }
        for part in by_whom["ours"]
    ]


def _moved(operation: Operation, part: str, x: Tensor, times: Times) -> dict[str, Any]:
    """Bytes of ours and of eager, and the share of a copy's speed that each moves them at."""
    moved = {whose: operation.bytes_moved(whose, part, x) for whose in ("ours", "eager")}
    copied = 2 * x.nbytes
    shares = {
        whose: quartiles([b / copied for b in ratios([count * t for t in times["copy"]], times[f"{whose}, {part}"])])
        for whose, count in moved.items()
    }
    return {"bytes": moved, "of copy": shares}


def means(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], float]:
    """Geometric mean over shapes of the median ratios, by operation, layout, dtype and part."""
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        if row["suite"] == "operations":
            of = row["subject"]
            key = (of["operation"], of["layout"], of["dtype"], of["part"])
            groups.setdefault(key, []).append(row["ratio"]["median"])
    return {key: geometric(found) for key, found in groups.items()}


def line(row: dict[str, Any]) -> str:
    of, q = row["subject"], row["ratio"]
    shape = "x".join(map(str, of["shape"]))
    return (
        f"{of['operation']:14} {of['layout']:13} {of['dtype']:8} {shape:14} {of['part']:8} "
        f"{q['median']:.2f} of eager ({q['p25']:.2f} to {q['p75']:.2f})  "
        f"{row['bytes']['ours'] / 2**20:6.1f} MiB against {row['bytes']['eager'] / 2**20:6.1f}, "
        f"{row['of copy']['ours']['median']:.2f} of a copy's speed against {row['of copy']['eager']['median']:.2f}; "
        f"faults {row['faults']['ours']:.0f} against {row['faults']['eager']:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(OPERATIONS)}; all by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, layout, dtype, channels, side in cases(options.operations or list(OPERATIONS), [options.dtype]):
        found = measured(name, layout, dtype, (options.batch, channels, side, side), options.pairs)
        print(*map(line, found), sep="\n", flush=True)
        rows += found
    for (name, layout, dtype, part), mean in means(rows).items():
        print(f"{name}, {layout}, {dtype}, {part}: geometric mean {mean:.3f} of eager")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
