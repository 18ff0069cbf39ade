"""Whole training steps of a network, each way of scoring interleaved in one process, as ratios to plain.

    python -m bench.steps resnet50 --size 224 --batch 8 --pairs 15 [--contiguous] [--heavy] [--json FILE]

Every way has a model of its own with the same weights, and does the same training step. What it finds is compared
before anything is timed, on images of 32x32 at most: in float64 taylorkern's s with those of gates that are really
multiplied and every rival's with taylorkern's, in float32 with float64. What the timed models find in their first step
is compared with the timed gates': roughly, for a last bit decides on which side of a ReLU an activation is. A step's
peak memory is taken last.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.compiled import compiled
from bench.memory import peak
from bench.pairs import Timer, WrongError, interleaved, quartiles, ratios
from bench.rivals import HEAVY, LIGHT, RIVALS
from bench.ways import OURS, Prepared, Scored, Way
from bench.workload import Run, Workload

TOLERANCE = 1e-9
FACTOR = 4  # between ours and torch's own error in float32: how many activations change sides of a ReLU is chance
FLOOR = 2.5e-6  # which no multiple is taken of
SEEDS = range(5)
ROUGHLY = 0.2
BY_NAME = {way.name: way for way in (*OURS, *RIVALS)}
PLAIN, SCORED, EXPLICIT = (BY_NAME[name] for name in ("plain", "scored", "gates [N, C]"))
MAIN = [*OURS, *LIGHT]
# By network, what is tried under torch.compile. Hooks break the graph at every layer, which takes longest to compile.
COMPILED = {
    "tiny": ("plain", "hooks", "gates [N, C]"),
    "resnet18": ("plain", "hooks", "gates [N, C]"),
    "resnet50": ("plain",),
}


class Reference:
    """What every way is compared with on one workload: s of taylorkern, and of gates that are really multiplied."""

    def __init__(self, w: Workload) -> None:
        self.w = w

    @functools.cached_property
    def training(self) -> Scored:
        return _first(SCORED.prepare(self.w))

    @functools.cached_property
    def evaluating(self) -> Scored:
        return _first(SCORED.prepare(self.w.evaluating()))

    @functools.cached_property
    def explicit(self) -> Scored:
        return _first(EXPLICIT.prepare(self.w))


@functools.cache
def reference(w: Workload) -> Reference:
    return Reference(w)


def wide(w: Workload, way: Way) -> dict[str, float]:
    """The largest relative distance over layers, in float64; raises WrongError where it is too large."""
    if not (way.quantity and way.checked_small):
        return {}
    w = w.small().double()
    of = reference(w)
    other = of.explicit if way in OURS else of.training if way.training else of.evaluating
    want = other if way.quantity == "s" else {name: s.sum(0) for name, s in other.items()}
    worst = max(_distances(_first(way.prepare(w)), want))
    if not worst <= TOLERANCE:
        raise WrongError(f"{way.name} on {w}: off by {worst:.1e} in float64, so nothing is timed")
    return {"float64": worst}


def narrow(w: Workload, way: Way) -> dict[str, float]:
    """Distance from float64 over all layers, as a multiple of torch's own with each seed; raises WrongError.

    A single activation on the other side of its kink changes every layer before it, and outweighs all rounding: what
    one seed shows is chance, of either. So the median of the multiples counts.
    """
    if way.quantity != "s" or not way.checked_small:
        return {}
    found: list[tuple[float, float]] = []
    for at in map(w.small().seeded, SEEDS):
        of = reference(at.double())
        want = of.explicit if way.training else of.evaluating
        found.append((_typical(_first(way.prepare(at)), want), _typical(reference(at).explicit, of.explicit)))
    multiple = statistics.median(typical / (torchs + FLOOR) for typical, torchs in found)
    if not multiple <= FACTOR:
        raise WrongError(
            f"{way.name} on {w}: {multiple:.1f} times as far from float64 as gates that are really multiplied, in the "
            f"median of {len(found)} seeds: {found}; nothing is timed"
        )
    typical, torchs = map(statistics.median, zip(*found, strict=True))
    return {"float32": typical, "torch's own": torchs, "multiple": multiple}


def roughly(ways: Sequence[Way], found: Mapping[str, Scored]) -> dict[str, dict[str, float]]:
    """How far the s of the timed models are from those of the timed gates, where these are among them."""
    if EXPLICIT not in ways:
        return {}
    want = found[EXPLICIT.name]
    far = {way.name: {"timed": _typical(found[way.name], want)} for way in ways if way.quantity == "s"}
    for name, distance in far.items():
        if not distance["timed"] <= ROUGHLY:
            raise WrongError(f"the timed {name} is {distance['timed']:.1e} from the timed gates, so nothing is timed")
    return far


def _first(prepared: Prepared) -> Scored:
    """What the first step finds; dropout's mask is the same for every way."""
    torch.manual_seed(0)
    prepared.step()
    return {name: s.detach().double() for name, s in prepared.scores().items()}


def _distances(found: Scored, want: Scored) -> list[float]:
    if found.keys() != want.keys():
        raise WrongError(f"scored layers {sorted(found.keys() ^ want.keys())} are missing on one side")
    return [float((found[name] - want[name]).norm() / want[name].norm()) for name in want]


def _typical(found: Scored, want: Scored) -> float:
    return statistics.mean(_distances(found, want))


def measured(
    w: Workload, ways: Sequence[Way], rounds: int, timer: Timer = interleaved, memory: bool = False
) -> list[dict[str, Any]]:
    """A row for every way, and another for its peak memory. Raises WrongError before anything is timed."""
    agreement = {way.name: wide(w, way) | narrow(w, way) for way in ways}
    steps, firsts, found = {}, {}, {}
    for way in ways:
        prepared = way.prepare(w)
        start = time.perf_counter()
        found[way.name] = _first(prepared)
        firsts[way.name] = time.perf_counter() - start
        steps[way.name] = prepared.step
    timed = roughly(ways, found)
    times = timer(dict(steps), rounds)
    plain = statistics.median(times["plain"])
    rows = [
        {
            "suite": "steps",
            "subject": w.subject,
            "way": way.name,
            "to": "plain",
            "pairs": rounds,
            "ratio": quartiles(ratios(times[way.name], times["plain"])),
            "first step": firsts[way.name] / plain,
            "checked": agreement[way.name] | timed.get(way.name, {}),
        }
        for way in ways
    ]
    return rows + (_peaks(w, steps) if memory else [])


def attempted(w: Workload, way: Way, rounds: int, timer: Timer = interleaved) -> list[dict[str, Any]]:
    """The row of one rival beside plain steps; where it refuses, a row that says so."""
    try:
        others = [PLAIN] if way.checked_small else [PLAIN, EXPLICIT]
        return [row for row in measured(w, [*others, way], rounds, timer) if row["way"] == way.name]
    except WrongError:
        raise
    except Exception as refusal:  # whatever a rival raises is its answer
        reason = f"{type(refusal).__name__}: {' '.join(str(refusal).split())[:200]}"
        return [{"suite": "steps", "subject": w.subject, "way": way.name, "to": "plain", "failed": reason}]


def rivalled(workloads: Sequence[Workload]) -> list[Workload]:
    """Those that the rivals that take long are tried on."""
    return [w for w in workloads if w.layout == "channels_last" and w.network in COMPILED]


def _peaks(w: Workload, steps: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Bytes that torch's allocator holds in a step at most, above what is held between steps, as ratios to plain."""
    peaks = {name: peak(step) for name, step in steps.items()}
    return [
        {"suite": "memory", "subject": w.subject, "way": name, "to": "plain", "ratio": held / peaks["plain"]}
        for name, held in peaks.items()
    ]


def line(row: dict[str, Any]) -> str:
    of = row["subject"]
    start = f"{of['network']:13} {of['layout']:13} {row['way']:22}"
    if "failed" in row:
        return f"{start} failed: {row['failed']}"
    if row["suite"] == "memory":
        return f"{start} {row['ratio']:.3f} of plain's peak memory"
    q = row["ratio"]
    checks = ", ".join(f"{what} {distance:.1e}" for what, distance in row["checked"].items())
    return f"{start} {q['median']:.3f} of plain ({q['p25']:.3f} to {q['p75']:.3f})  {checks}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", default="resnet18", help='"tiny", or as torchvision.models lists them')
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    parser.add_argument("--heavy", action="store_true", help="also the rivals that take long, and torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layout = "contiguous" if options.contiguous else "channels_last"
    w = Workload(options.network, options.size, options.batch, options.classes, layout)
    rows = measured(w, MAIN, options.pairs, memory=True)
    print(*map(line, rows), sep="\n", flush=True)
    for way in (
        [*HEAVY, *(compiled(BY_NAME[name]) for name in ("plain", "hooks", "gates [N, C]"))] if options.heavy else []
    ):
        rows += attempted(w, way, options.pairs)
        print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
