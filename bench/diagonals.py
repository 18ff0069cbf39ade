"""Diagonals of Gauss-Newton by BackPACK, curvlinops and taylorkern: do they agree, and what does each cost?

    python -m bench.diagonals [--network chain|residual] [--width 16] [--size 16] [--rounds 15] [--json FILE]

One network in evaluation mode, one minibatch, mean cross-entropy; a number for each unit. First every exact diagonal is
compared with taylorkern's in float64, and every random one's error of a single draw is taken. Then all are timed in
float32, interleaved, from the forward on. Last, each peer is given what it may not handle; the outcome is printed.
In "residual" each channel is a unit of its own, for BackPACK has no linked ones (see the last list). With statistics of
the batch, taylorkern's h leaves out the products of different samples' rows, and the whole diagonal differs from it.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from backpack.extensions import DiagGGNExact
from curvlinops import GGNLinearOperator
from torch import Tensor, nn

from bench.memory import peak
from bench.pairs import interleaved, quartiles, ratios
from bench.peers import (
    NETWORKS,
    SIDES,
    Diagonal,
    Problem,
    by_backpack,
    by_columns,
    by_operator,
    in_float32,
    ours,
    problem,
)

TOLERANCE = 1e-9
EXACT = {"Gauss-Newton", "empirical Fisher"}
# What each way of computing is a multiple of: taylorkern's own way to the same.
OWN = {what: name for name, (what, _) in SIDES.items() if name.startswith("taylorkern")}


def distance(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())


def error(name: str, run: Diagonal, exact: dict[str, Tensor], draws: int) -> float:
    """Relative distance to the exact diagonal: of the one that is exact itself, or a single draw's on average."""
    what = SIDES[name][0]
    want = exact.get(what, exact["Gauss-Newton"])
    return statistics.mean(distance(run(), want) for _ in range(1 if what in EXACT else draws))


def errors(p: Problem, draws: int) -> dict[str, float]:
    sides = {name: side(p) for name, (_, side) in SIDES.items()}
    exact = {what: sides[OWN[what]]() for what in EXACT}
    return {name: error(name, run, exact, draws) for name, run in sides.items()}


def costs(p: Problem, rounds: int) -> dict[str, dict]:
    """Time and peak memory, relative to taylorkern's own way to the same and to its sketch."""
    sides = {name: side(p) for name, (_, side) in SIDES.items()}
    for run in sides.values():
        run()
    times = interleaved(sides, rounds)
    memory = {name: peak(run) for name, run in sides.items()}
    return {
        name: {
            "computes": what,
            "time": quartiles(ratios(times[name], times[OWN[what]])),
            "time of the sketch": quartiles(ratios(times[name], times["taylorkern, sketch"])),
            "memory": memory[name] / memory[OWN[what]],
            "memory of the sketch": memory[name] / memory["taylorkern, sketch"],
        }
        for name, (what, _) in SIDES.items()
    }


def changed(p: Problem, change: Callable[[nn.Module], None]) -> Problem:
    for module in list(p.model.modules()):
        change(module)
    return p


def in_training(module: nn.Module) -> None:
    if isinstance(module, nn.BatchNorm2d):
        module.train()


def of_the_batch(module: nn.Module) -> None:
    if isinstance(module, nn.BatchNorm2d):
        module.track_running_stats, module.running_mean, module.running_var = False, None, None
        module.num_batches_tracked = None


def in_place(module: nn.Module) -> None:
    if isinstance(module, nn.ReLU):
        module.inplace = True


def averaged(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size))


# Name, and the small problem; each is tried with the exact diagonals of both peers.
SMALL = {"width": 4, "size": 8, "classes": 5, "batch": 6}
TRIED: dict[str, Callable[[], Problem]] = {
    "linked channels (skip connections)": lambda: problem("residual", **SMALL),
    "skip connections, nothing linked": lambda: problem("residual", **SMALL, linked=False),
    "batch normalisation in training": lambda: changed(problem("chain", **SMALL), in_training),
    "batch normalisation without running statistics": lambda: changed(problem("chain", **SMALL), of_the_batch),
    "ReLU in place": lambda: changed(problem("chain", **SMALL), in_place),
    "average pooling in float64": lambda: changed(problem("chain", **SMALL), averaged),
    "average pooling in float32": lambda: in_float32(changed(problem("chain", **SMALL), averaged)),
}
PEERS: dict[str, Callable[[Problem], Diagonal]] = {
    "BackPACK": lambda p: by_backpack(p, DiagGGNExact(), converter=False),
    "BackPACK, its converter": lambda p: by_backpack(p, DiagGGNExact()),
    "curvlinops": lambda p: by_operator(p, GGNLinearOperator, by_columns),
}


def outcome(p: Problem, side: Callable[[Problem], Diagonal]) -> str:
    want = ours(p, "exact")()
    try:
        found = side(p)()
    except Exception as refusal:  # whatever a peer raises is its answer
        return f"{type(refusal).__name__}: {' '.join(str(refusal).split())}"
    return f"differs from taylorkern's by {distance(found, want):.1e}"


def outcomes() -> dict[str, dict[str, str]]:
    return {what: {peer: outcome(make(), side) for peer, side in PEERS.items()} for what, make in TRIED.items()}


def show(found: dict[str, float], cost: dict[str, dict], tried: dict[str, dict[str, str]]) -> None:
    print("| | computes | relative error | time of ours | of our sketch | memory of ours | of our sketch |")
    print("|" + "---|" * 7)
    for name, row in cost.items():
        time, sketch = row["time"], row["time of the sketch"]
        print(
            f"| {name} | {row['computes']} | {found[name]:.1e} "
            f"| {time['median']:.2f} ({time['p25']:.2f} to {time['p75']:.2f}) | {sketch['median']:.2f} "
            f"| {row['memory']:.2f} | {row['memory of the sketch']:.2f} |"
        )
    print("Error: of the exact ones in float64; of the random ones a single draw's, on average.")
    print("Time and memory: medians of paired ratios (quartiles) to taylorkern's way to the same, and to its sketch.")
    for what, by_peer in tried.items():
        for peer, result in by_peer.items():
            print(f"{what}: {peer}: {result[:160]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="chain", choices=list(NETWORKS))
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # BackPACK's, at the first layer

    p = problem(options.network, options.width, options.size, options.classes, options.batch, linked=False)
    found = errors(p, options.draws)
    worst = max(found[name] for name, (what, _) in SIDES.items() if what in EXACT)
    if not worst <= TOLERANCE:
        raise SystemExit(f"the exact diagonals disagree by {worst:.1e}: nothing is timed")
    cost = costs(in_float32(p), options.rounds)
    tried = outcomes()
    print(
        f"{options.network} of width {options.width}, {options.size}x{options.size}, {options.classes} classes, batch "
        f"{options.batch}: {len(p.scores().units)} units; {options.rounds} interleaved rounds, "
        f"{torch.get_num_threads()} threads; exact diagonals agree to {worst:.1e}"
    )
    show(found, cost, tried)
    if options.json:
        facts = {key: str(value) for key, value in vars(options).items() if key != "json"}
        facts |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
        result = {"options": facts, "error": found, "cost": cost, "tried": tried}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
