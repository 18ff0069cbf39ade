"""ResNet-50's units, half of them removed by the surgeon: wall time, memory, and what the matrix adds to training.

    python -m bench.surgeon.resnet50 [--rows 512] [--size 64] [--pairs 15] [--json FILE]

Weights, normalisation and images are random, but the matrix is of real backward passes. Each form of it is measured in
a process of its own, whose peak of resident memory holds network, rows, matrix and choice together. Training steps (a
batch of 8) with a matrix kept, scored in each, are timed interleaved with steps that are scored without one.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylorkern as tk
from bench.machine import facts
from bench.pairs import interleaved, quartiles, ratios
from bench.zoo import build
from taylorkern.budget import Meter
from taylorkern.shrinking import Shrinking
from taylorkern.surgeon import choose, shift

ROOT = Path(__file__).parents[2]
FORMS = ("blocks", "full")
BATCH = 8
SECONDS = {"blocks": 60.0, "full": 300.0}
GIBIBYTES = 6.0
NETWORK = "resnet50"


def asked(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default=NETWORK, help="any of torchvision's")
    parser.add_argument("--rows", type=int, default=512, help="images whose gradients make the matrix")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--form", choices=FORMS, help="measure this one here, and nothing else")
    return parser.parse_args(arguments)


def network(name: str) -> nn.Module:
    return tk.convert(build(name, seed=0)[0].float().eval())


def minibatch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 3, size, size, generator=generator)
    return images, torch.randint(0, 1000, (BATCH,), generator=generator)


def half_removed(name: str, form: str, rows: int, size: int) -> dict[str, Any]:
    """Seconds of scoring, of choosing half the units and of the shift of the rest; the process's peak in GiB."""
    model, generator = network(name), torch.Generator().manual_seed(0)
    scores = tk.Scores(model, torch.randn(1, 3, size, size), gram=form)
    start = time.perf_counter()
    for _ in range(rows // BATCH):
        images, labels = minibatch(size, generator)
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()
    scores.fold()
    scored = time.perf_counter()
    blocks, units = scores.gram(), len(scores.units)
    meter = Meter(model, scores.coupling, "channels")
    removed = choose(blocks, Shrinking(scores.coupling, meter, goal=units / 2))
    chosen = time.perf_counter()
    gates = 1 + shift(blocks, removed)
    shifted = time.perf_counter()
    return {
        "units": units,
        "blocks": len(blocks),
        "removed": len(removed),
        "finite": bool(gates.isfinite().all()),
        "rows": rows // BATCH * BATCH,
        "scoring s": scored - start,
        "choose s": chosen - scored,
        "shift s": shifted - chosen,
        "total s": shifted - scored,
        "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def in_own_process(options: argparse.Namespace, form: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.surgeon.resnet50", "--form", form, "--network", options.network]
    command += ["--rows", str(options.rows), "--size", str(options.size)]
    found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout)


def steps(name: str, size: int, pairs: int) -> dict[str, dict[str, float]]:
    """Quartiles of a scored step's time with a matrix kept, in steps without one; one of the latter is timed twice."""
    x, labels = minibatch(size, torch.Generator().manual_seed(0))
    ways = {form or "none": _step(name, form, x, labels) for form in (None, *FORMS)}
    ways["again"] = _step(name, None, x, labels)
    for run in ways.values():
        run()
    times = interleaved(ways, pairs)
    return {way: quartiles(ratios(times[way], times["none"])) for way in ("again", *FORMS)}


def _step(name: str, form: str | None, x: Tensor, labels: Tensor) -> Any:
    model = network(name).train()
    scores = tk.Scores(model, x[:1], gram=form)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def run() -> None:
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        scores.fold()  # so that each step pays for its own rows

    return run


def bars(found: dict[str, dict[str, Any]]) -> list[tuple[str, float, float]]:
    """What was asked for, the bar and what was found; each is to be at most its bar."""
    rows = [(f"{form}, seconds", SECONDS[form], found[form]["total s"]) for form in FORMS]
    return [*rows, *((f"{form}, GiB", GIBIBYTES, found[form]["peak GiB"]) for form in FORMS)]


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    options = asked(arguments)
    if options.form:
        print(json.dumps(half_removed(options.network, options.form, options.rows, options.size)))
        return None
    found = {form: in_own_process(options, form) for form in FORMS}
    added = steps(options.network, options.size, options.pairs)
    for form, of in found.items():
        print(
            f"{form}: {of['removed']} of {of['units']} units in {of['blocks']} blocks removed in {of['total s']:.1f} s "
            f"(chosen {of['choose s']:.1f}, shifted {of['shift s']:.1f}), peak {of['peak GiB']:.2f} GiB; "
            f"{of['rows']} rows took {of['scoring s']:.0f} s"
        )
    for what, bar, value in bars(found):
        print(f"{what}: {value:.2f}, asked for: at most {bar:g}{'' if value <= bar else ' (missed)'}")
    for way, q in added.items():
        print(f"scored step, {way}: {q['median']:.3f} of one without ({q['p25']:.3f} to {q['p75']:.3f})")
    result = {"machine": facts(), "network": options.network, "size": options.size, "pairs": options.pairs}
    result |= {"removed": found, "steps": added}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
