"""Fuses every torchvision classification network and compares a scored training step with the unfused one's.

    python -m bench.fused_zoo [--json FILE] [network ...]

Networks are ``bench.zoo``'s: without weights, random normalisation statistics, two images. Dropout and stochastic
depth stay on, with the same seed before each forward. Per network, in float64: the outputs, every parameter's gradient,
every layer's scores s [N, C] and every buffer are compared between converted and converted-and-fused; in float32: how
far the fused gradients are from the float64 ones, as a multiple of what torch's own network is. A single activation on
the other side of its kink is worth more than all rounding together, so a network above the bar is tried with further
seeds, and the median over all of them counts. And after both, that fusion has left names, types, hooks and values as
they were and that revert leaves no trace.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import taylorkern as tk
from bench.zoo import build, networks
from taylorkern import deferred
from taylorkern.example import tensors
from taylorkern.layers import Gated

TOLERANCE = 1e-9
ALLOWED = 2.0  # times torch's own distance from float64, in float32
FURTHER = 8  # seeds, where the first one is above
Named = dict[str, Tensor]


@dataclass
class Step:
    """What one training step made: by parameter, layer or buffer."""

    outputs: Named
    gradients: Named
    scores: Named
    buffers: Named


@dataclass
class Row:
    network: str
    norms: int  # batch normalisations
    chains: dict[str, int]  # run as one operation in a forward, by activation, "+" with an addition in front of it
    left: str  # what fusion said it left
    worst: dict[str, float]  # float64: the largest relative error of outputs, gradients, scores and buffers
    where: str  # the parameter, layer or buffer of the largest
    torchs: float  # float32: relative distance of torch's own gradients from the float64 ones
    fused: float  # and that of the fused network's
    changed: list[str]  # what is not as it was
    further: list[float] = field(default_factory=list)  # the fused one's as a multiple of torch's, with other seeds

    @property
    def multiple(self) -> float:
        """How much further than torch's own gradients the fused ones are from float64, the median over the seeds."""
        return statistics.median([self.fused / self.torchs, *self.further])

    @property
    def passed(self) -> bool:
        exact = all(error <= TOLERANCE for error in self.worst.values())
        return exact and self.multiple <= ALLOWED and not self.changed


def step(model: nn.Module, x: Tensor) -> Step:
    """One forward and backward; the gradients are taken out of the model, its buffers put back."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(0)
    outputs = list(tensors(model(x)))
    target = torch.arange(len(x)) % outputs[0].shape[1]
    torch.stack([nn.functional.cross_entropy(output, target) for output in outputs]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    made = Step({str(i): t.detach() for i, t in enumerate(outputs)}, gradients, _arrived(model), {})
    for name, buffer in model.named_buffers():
        made.buffers[name] = buffer.to(torch.float64, copy=True)
        buffer.copy_(before[name])
    return made


def _arrived(model: nn.Module) -> Named:
    """The scores that lie in the gates, taken out."""
    gates = {name: m.gate for name, m in model.named_modules() if isinstance(m, Gated) and m.gate is not None}
    return {name: torch.cat(arrived) for name, gate in gates.items() if (arrived := gate.drain())}


@contextmanager
def chains() -> Iterator[Counter[str]]:
    """Counts, within, the chains that run as one operation."""
    counts: Counter[str] = Counter()
    run = deferred.fused_batch_norm

    def counted(layer: Any, gate: Any, x: Tensor, residual: Tensor | None, activation: str, *slope: float) -> Tensor:
        counts[activation if residual is None else f"+{activation}"] += 1
        return run(layer, gate, x, residual, activation, *slope)

    with patch.object(deferred, "fused_batch_norm", counted):
        yield counts


def fuse(model: nn.Module) -> str:
    """Fuse ``model``; what fusion said that it left."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tk.convert(model, fuse=True)
    return "; ".join(str(warning.message) for warning in said)


def errors(want: Step, got: Step) -> Iterator[tuple[str, str, float]]:
    """What was compared, its name, and the largest difference relative to the largest magnitude."""
    for kind in ("outputs", "gradients", "scores", "buffers"):
        expected, found = getattr(want, kind), getattr(got, kind)
        for name in expected.keys() | found.keys():
            if name not in expected or name not in found or expected[name].shape != found[name].shape:
                yield kind, name, float("inf")
            elif expected[name].numel():
                size = max(_size(expected[name]), _size(expected.get(_weight(name), expected[name])))
                yield kind, name, _size(found[name] - expected[name]) / size if size else _size(found[name])


def _weight(name: str) -> str:
    """The weight whose bias ``name`` is: before a normalisation a bias has no gradient but that weight's rounding."""
    return name.removesuffix("bias") + "weight" if name.endswith("bias") else name


def _size(t: Tensor) -> float:
    return float(t.abs().max().nan_to_num(torch.inf))


def distance(gradients: Named, exact: Named) -> float:
    """Relative distance of all gradients, as one vector."""
    off = sum(float((gradients[name].double() - g).square().sum()) for name, g in exact.items())
    return float((off / sum(float(g.square().sum()) for g in exact.values())) ** 0.5)


def facts(model: nn.Module) -> dict[str, object]:
    """What fusion must leave as it is, per module and tensor."""
    found: dict[str, object] = {"repr": repr(model)}
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
        found[f"{name} ({type(module).__name__})"] = type(module), module.training, hooks
    for name, t in model.state_dict(keep_vars=True).items():
        found[name] = id(t), t.dtype, t.requires_grad, t.stride(), float(t.detach().double().sum())
    return found


def attributes(model: nn.Module) -> dict[str, object]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def differing(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def examine(name: str, seed: int = 0) -> Row:
    """Compare one network's steps. There is one model, converted back and forth, so that large ones fit."""
    model, x = build(name, seed)
    model.float().double()  # the same weights in both precisions
    own, x = attributes(model), x.float().double()
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    unfused = facts(tk.convert(model))
    scores = tk.Scores(model, None)
    exact = step(model, x)
    left = fuse(model)
    with chains() as counts:
        got = step(model, x)
    worst, where = dict.fromkeys(("outputs", "gradients", "scores", "buffers"), 0.0), ("", 0.0)
    for kind, key, error in errors(exact, got):
        worst[kind] = max(worst[kind], error)
        where = max(where, (f"{kind} {key}", error), key=lambda item: item[1])
    changed = differing(unfused, facts(model))
    del got
    scores.detach()
    changed += differing(own, attributes(tk.revert(model)))
    torchs, fused = narrow(model, x, exact.gradients)
    further = range(seed + 1, seed + 1 + FURTHER) if fused > ALLOWED * torchs else ()
    multiples = [_multiple(name, other) for other in further]
    return Row(name, norms, dict(sorted(counts.items())), left, worst, where[0], torchs, fused, changed, multiples)


def narrow(model: nn.Module, x: Tensor, exact: Named) -> tuple[float, float]:
    """In float32, the distances from ``exact`` of torch's own gradients and of the fused network's."""
    torchs = distance(step(model.float(), x.float()).gradients, exact)
    fuse(model)
    return torchs, distance(step(model, x.float()).gradients, exact)


def _multiple(name: str, seed: int) -> float:
    model, x = build(name, seed)
    model.float().double()
    x = x.float().double()
    torchs, fused = narrow(model, x, step(model, x).gradients)
    return fused / torchs


HEADER = "| network | norms | chains | outputs | gradients | scores | buffers | float32: torch, fused | left |"


def line(row: Row) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.chains.items()) or "none"
    exact = " | ".join(f"{error:.0e}" for error in row.worst.values())
    marks = "" if row.passed else f" WRONG at {row.where}; changed: {', '.join(row.changed[:3]) or 'nothing'}"
    far = f"{row.torchs:.1e}, {row.fused:.1e}" + (f", median {row.multiple:.1f}" if row.further else "")
    columns = [row.network, str(row.norms), kinds, exact, far, row.left + marks]
    return f"| {' | '.join(columns)} |"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", help="names as torchvision.models lists them; all by default")
    parser.add_argument("--json", help="write the rows there too")
    options = parser.parse_args(arguments)
    print(HEADER, "|" + "---|" * 9, sep="\n", flush=True)
    rows = []
    for name in options.networks or networks():
        rows.append(examine(name))
        print(line(rows[-1]), flush=True)
    wrong = [row for row in rows if not row.passed]
    print(f"{len(rows)} networks, {len(wrong)} wrong", file=sys.stderr)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(row) | {"multiple": row.multiple, "passed": row.passed} for row in rows], file, indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
