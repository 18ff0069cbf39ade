"""Coupling and cutting a network, beside Torch-Pruning in the same rounds; folding and ranking many units.

    python -m bench.pruning [--network densenet201] [--size 224] [--rounds 3] [--units 100000]

Half the units are cut at random; Torch-Pruning cuts half of every group by magnitude, and its graph is what stands
beside our coupling. What is cut is compared first with the masked dense network in float64, and what is ranked with
γ·dγ + β·dβ. These bars are in seconds, so seconds are reported beside the ratios: they are one machine's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import taylorkern as tk
from bench.pairs import Timer, WrongError, interleaved, quartiles, ratios
from bench.zoo import build, error, masked, outputs, torchvision
from taylorkern.coupling import Coupling, couple
from taylorkern.surgery import cut

TOLERANCE = 1e-9
WIDTH = 2000  # channels of a layer whose units are folded and ranked


class Stages:
    """Seconds of the stages of something, one list for each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)


def half(coupling: Coupling) -> Tensor:
    """Half the units, at random."""
    order = torch.randperm(len(coupling.units), generator=torch.Generator().manual_seed(0))
    return order[: len(order) // 2]


def dense(network: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision().models.get_model(network, weights=None).eval()


def ours(network: str, size: int, stages: Stages) -> Callable[[], None]:
    def run() -> None:
        model, x = dense(network), torch.randn(1, 3, size, size)
        with stages.stage("coupling"):
            coupling = couple(model, x)
        with stages.stage("cut"):
            cut(model, coupling, half(coupling), x)

    return run


def torch_pruning(network: str, size: int, stages: Stages) -> Callable[[], None]:
    import torch_pruning  # type: ignore[import-untyped]

    def run() -> None:
        model, x = dense(network), torch.randn(1, 3, size, size)
        *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
        with stages.stage("coupling"):
            pruner = torch_pruning.pruner.BasePruner(
                model,
                x,
                importance=torch_pruning.importance.GroupMagnitudeImportance(),
                pruning_ratio=0.5,
                ignored_layers=[last],
            )
        with stages.stage("cut"):
            pruner.step()

    return run


def checked(network: str) -> float:
    """How far half of ``network`` is from its masked dense self in float64; raises WrongError where that is too far."""
    model, x = build(network, seed=0)
    coupling = couple(model, x[:1])
    removed = half(coupling)
    with masked(model, coupling, removed):
        expected = outputs(model, x, training=False)
    cut(model, coupling, removed, x[:1])
    worst = error(expected, outputs(model, x, training=False))
    if not worst <= TOLERANCE:
        raise WrongError(f"half of {network} is {worst:.1e} from its masked dense self: nothing is timed")
    return worst


def measured(network: str, size: int, rounds: int, timer: Timer = interleaved) -> list[dict[str, Any]]:
    """A row each for coupling and cut."""
    distance = checked(network)
    mine, theirs = Stages(), Stages()
    timer({"taylorkern": ours(network, size, mine), "Torch-Pruning": torch_pruning(network, size, theirs)}, rounds)
    return [
        {
            "suite": "pruning",
            "subject": {"network": network, "size": size, "stage": stage},
            "way": "taylorkern",
            "to": "Torch-Pruning",
            "pairs": rounds,
            "ratio": quartiles(ratios(seconds, theirs.seconds[stage])),
            "seconds": {
                "taylorkern": statistics.median(seconds),
                "Torch-Pruning": statistics.median(theirs.seconds[stage]),
            },
            "checked": {"float64": distance},
        }
        for stage, seconds in mine.seconds.items()
    ]


class Wide(nn.Module):
    """Batch normalisations side by side, each with units of its own."""

    def __init__(self, units: int) -> None:
        super().__init__()
        sizes = [min(WIDTH, units - start) for start in range(0, units, WIDTH)]
        self.layers = nn.ModuleList(nn.BatchNorm1d(size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(part) for layer, part in zip(self.layers, x.split(WIDTH, 1), strict=True)], 1)


def folded(units: int, batch: int, dtype: torch.dtype, stages: Stages) -> tuple[tk.Scores, Callable[[], Tensor]]:
    """A Scores of ``units`` units, and a call that takes a backward, then folds and ranks them, lowest first."""
    torch.manual_seed(0)
    model = tk.convert(Wide(units)).to(dtype)
    scores = tk.Scores(model, None)
    x, target = torch.randn(2, batch, units).to(dtype)

    def run() -> Tensor:
        model.zero_grad()
        (model(x) * target).mean().backward()
        with stages.stage("fold and rank"):
            scores.fold()
            return scores.importance("taylor_fo").argsort()

    return scores, run


def checked_ranks(units: int, batch: int) -> float:
    """How far the folded importances are from (γ·dγ + β·dβ)² in float64; raises WrongError where that is too far."""
    scores, run = folded(units, batch, torch.float64, Stages())
    order = run()
    layers: Any = scores.model.layers
    want = torch.cat([bn.weight * bn.weight.grad + bn.bias * bn.bias.grad for bn in layers]).detach().square()
    found = scores.importance("taylor_fo")
    distance = float((found - want).norm() / want.norm())
    if not (distance <= TOLERANCE and bool((found[order].diff() >= 0).all())):
        raise WrongError(f"{units} folded units are {distance:.1e} from γ·dγ + β·dβ: nothing is timed")
    return distance


def ranked(units: int, batch: int, rounds: int, timer: Timer = interleaved) -> list[dict[str, Any]]:
    """The row of folding and ranking ``units`` units."""
    distance = checked_ranks(units, batch)
    stages = Stages()
    _, run = folded(units, batch, torch.float32, stages)
    run()
    stages.seconds.clear()
    timer({"fold and rank": run}, rounds)
    return [
        {
            "suite": "pruning",
            "subject": {"units": units, "batch": batch, "stage": "fold and rank"},
            "way": "taylorkern",
            "pairs": rounds,
            "seconds": {"taylorkern": statistics.median(stages.seconds["fold and rank"])},
            "checked": {"float64": distance},
        }
    ]


def line(row: dict[str, Any]) -> str:
    seconds = ", ".join(f"{whose} {value:.3f} s" for whose, value in row["seconds"].items())
    q = row.get("ratio")
    told = f"; {q['median']:.3f} of {row['to']} ({q['p25']:.3f} to {q['p75']:.3f})" if q else ""
    return f"{row['subject']['stage']}: {seconds} (this machine's){told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="densenet201")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--units", type=int, default=100_000)
    options = parser.parse_args()
    print(*map(line, ranked(options.units, 8, 15)), sep="\n", flush=True)
    print(*map(line, measured(options.network, options.size, options.rounds)), sep="\n")


if __name__ == "__main__":
    main()
