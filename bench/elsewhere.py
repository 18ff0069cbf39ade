"""What scoring and pruning cost outside layers and kernels: each part as a multiple of a plain training step.

    python -m bench.elsewhere [--network resnet50 --size 224 --batch 8] [--pairs 15] [--json FILE]

Parts of every step count in full, parts of a pruning round count for one step in thirty, as often as the paper prunes.
The oracle, whose forward is compared with a plain one, is no part of training. Every part is interleaved with the
plain step, in random order, in one process. ``bench.pruning`` has what is done once for a network.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylorkern as tk
from bench.operations import WrongError
from bench.pairs import quartiles, ratios
from bench.workload import Workload
from taylorkern import budget
from taylorkern.following import cut_and_follow
from taylorkern.layers import Gated
from taylorkern.oracle import WHOLE, Minibatch

Call = Callable[[], object]

EVERY, STEP = 30, 100  # minibatches in a round and units removed in it, as the paper's ImageNet runs have them


@dataclass(frozen=True)
class Part:
    """``ready`` makes the call that is timed; what it does itself is not."""

    name: str
    ready: Callable[[], Call]
    beside: str  # the part whose time it is a multiple of
    steps: int = 0  # it happens once in so many training steps; 0: it is no part of training

    @classmethod
    def of(cls, name: str, run: Call, beside: str, steps: int = 0) -> "Part":
        return cls(name, lambda: run, beside, steps)


class Arrived:
    """A minibatch's gate gradients, kept so that they can be folded again and again."""

    def __init__(self, scores: tk.Scores) -> None:
        self.scores = scores
        layers = {name: scores.model.get_submodule(name) for name in scores.coupling.layers}
        self.gates = {name: layer.gate for name, layer in layers.items() if isinstance(layer, Gated) and layer.gate}
        leaves = [(name, z) for name, gate in self.gates.items() for z in gate.leaves()]
        self.gradients = [(name, z, z.grad) for name, z in leaves if z.grad is not None]

    def fold(self) -> None:
        for _, z, gradient in self.gradients:
            z.grad = gradient
        self.scores.fold()

    def ask(self) -> None:
        """What every layer asks before its forward."""
        for gate in self.gates.values():
            gate.wanted()

    def check(self) -> None:
        """Raise unless the statistics are those of gradients that are added up place by place, in float64."""
        wanted = torch.zeros(len(self.scores.units) + 1, dtype=torch.float64)  # the last for channels of no unit
        for name, _, gradient in self.gradients:
            wanted.index_add_(0, self.scores.coupling.layers[name] % len(wanted), gradient.double().sum(0))
        got = self.scores.importance("taylor_fo")
        error = float((got - wanted[:-1].square()).norm() / got.norm())
        if not error < 1e-9:
            raise WrongError(f"what was folded is wrong by {error:.1e}: nothing is timed")


def rank(scores: tk.Scores, meter: budget.Meter, goal: float, most: int | None) -> Tensor:
    """The units that go next."""
    importance = scores.importance("taylor_fo")
    order = budget.removable(importance, scores.coupling, 1)
    return budget.select(order, len(importance), meter, goal * meter.total, most)


def training(w: Workload) -> list[Part]:
    """A plain step, and what a scored and pruned one has beside its layers."""
    x, target = w.images(), w.labels()
    plain, model = w.model(), tk.convert(w.model())
    pruner = tk.Pruner(model, x[:1], every=10**9)
    F.cross_entropy(model(x), target).backward()
    arrived = Arrived(pruner.scores)
    arrived.check()
    meter = budget.Meter(model, pruner.scores.coupling, "flops")
    return [
        Part.of("plain step", w.step(plain, list(plain.parameters())), "plain step", 1),
        Part.of("fold", arrived.fold, "plain step", 1),
        Part.of("gates asked", arrived.ask, "plain step", 1),
        Part.of("pruner.step() between rounds", pruner.step, "plain step", 1),
        Part.of("ranking", lambda: rank(pruner.scores, meter, 0.5, STEP), "plain step", EVERY),
        Part("cut of 100 units, verified", Cuts(tk.convert(w.model()), x[:1]).ready, "plain step", EVERY),
    ]


class Cuts:
    """Cuts of ``STEP`` units, one round after another, until half of the units are gone and it starts again."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.whole, self.example = model, example
        self.scores = tk.Scores(copy.deepcopy(model), example)
        self.units = len(self.scores.units)

    def ready(self) -> Call:
        if len(self.scores.units) < max(self.units // 2, 2 * STEP):
            self.scores = tk.Scores(copy.deepcopy(self.whole), self.example)
        scores = self.scores
        order = budget.removable(torch.rand(len(scores.units)), scores.coupling, 1)
        return lambda: cut_and_follow(scores.model, scores.coupling, order[:STEP], self.example, ())


def oracle(w: Workload, units: int) -> list[Part]:
    """A forward that measures ``units`` units at once, and a plain one of as many copies of the minibatch."""
    x, target, model = w.images(), w.labels(), w.evaluating().model()
    minibatch = Minibatch(model, tk.couple(model, x[:1]), x, target, F.cross_entropy, seed=0)
    with torch.no_grad():
        error = float(abs(minibatch.losses(torch.tensor([WHOLE])) - F.cross_entropy(model(x), target)))
    if error > 1e-4:
        raise WrongError(f"the oracle's loss of the whole network is off by {error:.1e}: nothing is timed")
    copies = x.repeat(units, 1, 1, 1)

    def forward() -> None:
        with torch.no_grad():
            model(copies)

    def measure() -> None:
        with torch.no_grad():
            minibatch.losses(torch.arange(units))

    return [
        Part.of("plain forward", forward, "plain forward"),
        Part.of(f"oracle's forward of {units} units", measure, "plain forward"),
    ]


def timed(parts: Sequence[Part], rounds: int) -> dict[str, list[float]]:
    """Seconds of each part in each round, in an order that is drawn anew each time."""
    times: dict[str, list[float]] = {part.name: [] for part in parts}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for part in shuffled.sample(list(parts), len(parts)):
            run = part.ready()
            start = time.perf_counter()
            run()
            times[part.name].append(time.perf_counter() - start)
    return times


def row(part: Part, times: dict[str, list[float]]) -> dict[str, Any]:
    found = quartiles(ratios(times[part.name], times[part.beside]))
    return {
        "part": part.name,
        "to": part.beside,
        "ratio": found,
        "share of training": found["median"] / part.steps if part.steps else None,
    }


def line(row: dict[str, Any]) -> str:
    q, share = row["ratio"], row["share of training"]
    text = f"{row['part']:30} {q['median']:8.4f} of a {row['to']} ({q['p25']:.4f} to {q['p75']:.4f})"
    return text if share is None else f"{text}   {share:.2%} of training"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--together", type=int, default=4, help="units in a forward of the oracle")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    w = Workload(options.network, options.size, options.batch, 1000)
    parts = [*training(w), *oracle(w, options.together)]
    timed(parts, 1)
    times = timed(parts, options.pairs)
    rows = [row(part, times) for part in parts]
    print(*map(line, rows), sep="\n")
    if options.json:
        facts = {key: str(value) for key, value in vars(options).items() if key != "json"}
        facts |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
        options.json.write_text(json.dumps({"options": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
