"""What a Gauss-Newton sketch adds to training: whole steps of one network, interleaved, as ratios to plain steps.

    python -m bench.curvature --network resnet50 --batch 16 --size 64 --pairs 21 [--channels-last] [--json FILE]

plain    torch's own layers
again    the same once more, a second model: what the noise alone makes of a ratio
scored   a Scores attached, no curvature
sketch   a Scores attached, scores.curvature(logits, target) in every step
fourth   the same with every_n=4: timed as four steps together, against four of the others

Before anything is timed, the sketch's h is compared with that of explicit gates under autograd, and the gradients of
the weights with those of a step without a sketch.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import taylorkern as tk
from bench.memory import peak
from bench.pairs import interleaved, quartiles, ratios
from bench.workload import Workload
from taylorkern.coupling import Coupling
from taylorkern.curvature import cotangents

TOLERANCE = 1e-3  # float32 through some fifty layers; what is wrong is wrong by far more
BARS = {"sketch": 0.45, "fourth": 0.12}
EVERY = {"scored": None, "sketch": 1, "fourth": 4}  # in every how many steps a curvature is taken
Run = Callable[[], None]


def step(
    model: nn.Module, x: Tensor, target: Tensor, scores: tk.Scores | None = None, every_n: int | None = None
) -> Run:
    """One training step; with ``every_n`` its Scores takes a curvature in every n-th."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def run() -> None:
        logits = model(x)
        if scores and every_n:
            scores.curvature(logits, target, every_n=every_n)
        nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()  # here, so that between steps no gradient is held

    return run


def four(run: Run) -> Run:
    def cycle() -> None:
        for _ in range(4):
            run()

    return cycle


def explicit(model: nn.Module, coupling: Coupling, z: Tensor) -> None:
    """Multiply the places of unit u, for sample n, by z[n, u]."""
    padded = torch.cat([z, z.new_ones(len(z), 1)], 1)  # index -1 finds the one that stays

    def gate(units: Tensor) -> Callable:
        return lambda module, inputs, a: a * padded[:, units].reshape(*a.shape[:2], *[1] * (a.dim() - 2))

    for layer, units in coupling.layers.items():
        model.get_submodule(layer).register_forward_hook(gate(units))


def by_autograd(model: nn.Module, coupling: Coupling, x: Tensor, target: Tensor, seed: int) -> Tensor:
    """h [U] of one sketch, its cotangent drawn from ``seed``, with gates that are really there."""
    z = torch.ones(len(x), len(coupling.units), requires_grad=True)
    explicit(model, coupling, z)
    logits = model(x)
    (v,) = cotangents(logits, target, "cross_entropy", "sketch", torch.Generator().manual_seed(seed))
    (rows,) = torch.autograd.grad(logits, z, v)
    return rows.double().square().mean(0)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def agreement(w: Workload) -> dict[str, float]:
    """Relative distance of h to that of explicit gates, and of the weights' gradients to those without a sketch."""
    x, target = w.images(), w.labels()
    models = {name: w.model() for name in ("explicit", "scored", "sketch")}
    scores = {name: tk.Scores(tk.convert(models[name]), x[:1]) for name in ("scored", "sketch")}
    gradients = {}
    for name, of in scores.items():
        logits = models[name](x)
        if name == "sketch":
            of.curvature(logits, target, generator=torch.Generator().manual_seed(1))
        nn.functional.cross_entropy(logits, target).backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in models[name].parameters()])
    h = 2 * scores["sketch"].importance("obd")
    want = by_autograd(models["explicit"], scores["sketch"].coupling, x, target, seed=1)
    return {"h": distance(h, want), "gradients": distance(gradients["sketch"], gradients["scored"])}


def ways(w: Workload) -> dict[str, Run]:
    """A step of each way; every way has a model of its own."""
    x, target = w.images(), w.labels()
    models = {name: w.model() for name in ("plain", "again", *EVERY)}
    runs = {name: step(models[name], x, target) for name in ("plain", "again")}
    for name, every_n in EVERY.items():
        scores = tk.Scores(tk.convert(models[name]), x[:1])
        runs[name] = step(models[name], x, target, scores, every_n)
    return runs


def added(times: dict[str, list[float]], to: str, way: str) -> dict[str, float]:
    """What ``way`` takes more than ``to``, in plain steps."""
    pairs = zip(times[way], times[to], times["plain"], strict=True)
    return quartiles([(a - b) / plain for a, b, plain in pairs])


def measure(single: dict[str, Run], cycles: dict[str, Run], rounds: int) -> dict[str, dict]:
    of_steps, of_cycles = interleaved(single, rounds), interleaved(cycles, rounds)
    return {
        "ratios": {name: quartiles(ratios(times, of_steps["plain"])) for name, times in of_steps.items()}
        | {f"{name} (4 steps)": quartiles(ratios(t, of_cycles["plain"])) for name, t in of_cycles.items()},
        "adds": {
            "again - plain": added(of_steps, "plain", "again"),
            "sketch - scored": added(of_steps, "scored", "sketch"),
            "sketch - plain": added(of_steps, "plain", "sketch"),
            "fourth - scored": added(of_cycles, "scored", "fourth"),
            "fourth - plain": added(of_cycles, "plain", "fourth"),
        },
    }


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = asked()
    layout = "channels_last" if options.channels_last else "contiguous"
    w = Workload(options.network, options.size, options.batch, 1000, layout)
    agree = agreement(w)
    if max(agree.values()) > TOLERANCE:
        raise SystemExit(f"the sketch is wrong, by relative distances {agree}: nothing is timed")

    runs = ways(w)
    cycles = {name: four(runs[name]) for name in ("plain", "scored", "fourth")}
    single = {name: runs[name] for name in ("plain", "again", "scored", "sketch")}
    for run in (*single.values(), *cycles.values()):
        run()
    measured = measure(single, cycles, options.pairs)
    # Last, for the profiler's own work must not be timed.
    memory = {name: peak(run) for name, run in (single | {"fourth": cycles["fourth"]}).items()}
    measured["memory"] = {name: bytes_ / memory["plain"] for name, bytes_ in memory.items()}

    print(
        f"{options.network}, batch {options.batch}, {options.size}x{options.size}, "
        f"{layout}, {options.pairs} interleaved rounds, "
        f"{torch.get_num_threads()} threads; h agrees with explicit gates to {agree['h']:.1e}, "
        f"gradients with those without a sketch to {agree['gradients']:.1e}"
    )
    for name, q in measured["ratios"].items():
        print(f"{name:16} {q['median']:.3f} of plain        (quartiles {q['p25']:.3f} to {q['p75']:.3f})")
    for name, q in measured["adds"].items():
        bar = BARS.get(name.split()[0]) if name.endswith("scored") else None
        told = f"; asked for: at most {bar}" if bar else ""
        print(f"{name:16} {q['median']:.3f} of a plain step (quartiles {q['p25']:.3f} to {q['p75']:.3f}{told})")
    for name, ratio in measured["memory"].items():
        print(f"{name:16} {ratio:.3f} of plain's peak memory, above what is held between steps")
    if options.json:
        facts = {key: str(value) for key, value in vars(options).items() if key != "json"}
        facts |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
        options.json.write_text(json.dumps({"options": facts, "agreement": agree, **measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
