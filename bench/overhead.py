"""What scoring costs: whole training steps of one network, each way interleaved in one process, as ratios to plain.

    python bench/overhead.py --network resnet18 --batch 16 --size 64 --pairs 15 [--channels-last] [--json FILE]

plain        torch's own layers
converted    taylorkern's layers, nobody scoring
scored       a Scores attached: taylor_fo, taylor_fo_abs and the empirical Fisher of every coupled unit
fused        the same, converted with fuse=True: batch normalisation, addition and ReLU as one operation
hooks        plain layers with forward hooks, (a * g).sum((2, 3)) at every batch normalisation, correct out of place

The scores of "scored" and "fused" are compared with those of "hooks" before anything is timed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from pairs import interleaved, quartiles, ratios
from torch import Tensor, nn
from zoo import torchvision

import taylorkern as tk


class Hooks:
    """The pure-PyTorch way: keep each activation, multiply it with its gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.scores: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, a: Tensor) -> Tensor:
            def score(g: Tensor) -> None:
                self.scores[name] = (a.detach() * g).sum((2, 3))

            a.register_hook(score)
            return a.clone()  # what runs in place behind the layer must not reach the activation kept here

        return hook


def build(network: str, channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision().models.get_model(network, weights=None).train()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return run


def agreement(options: argparse.Namespace, x: Tensor, target: Tensor) -> float:
    """Largest relative distance between the gates' s and the hooks', over the layers that carry a gate, in float64.

    In float32 a last bit decides on which side of a ReLU some activations are, and deep networks are off by percents.
    """
    models = {name: build(options.network, options.channels_last).double() for name in ("scored", "fused", "hooks")}
    kept = [tk.Scores(tk.convert(models[name], fuse=name == "fused"), x[:1].double()) for name in ("scored", "fused")]
    hooks = Hooks(models["hooks"])
    for model in models.values():
        nn.functional.cross_entropy(model(x.double()), target).backward()
    worst = 0.0
    for scores in kept:
        for name, module in scores.model.named_modules():
            if getattr(module, "gate", None) and isinstance(module, nn.BatchNorm2d):
                (s,) = module.gate.drain()
                worst = max(worst, float((s - hooks.scores[name]).norm() / hooks.scores[name].norm()))
    return worst


def measure(ways: dict[str, Callable[[], None]], pairs: int) -> dict[str, dict[str, float]]:
    """Quartiles of each way's time as a multiple of plain's."""
    times = interleaved(ways, pairs)
    return {name: quartiles(ratios(taken, times["plain"])) for name, taken in times.items()}


def asked(doc: str | None, network: str) -> tuple[argparse.Namespace, Tensor, Tensor]:
    """The command line of a bench of whole steps, and the images and labels that it asks for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default=network)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    x = torch.randn(options.batch, 3, options.size, options.size)
    x = x.contiguous(memory_format=torch.channels_last) if options.channels_last else x
    return options, x, torch.randint(1000, (options.batch,))


def main() -> None:
    options, x, target = asked(__doc__, network="resnet18")
    worst = agreement(options, x, target)
    if worst > 1e-9:
        raise SystemExit(f"scores and hooks disagree by {worst:.1e}: nothing is timed")
    names = ("plain", "converted", "scored", "fused", "hooks")
    models = {name: build(options.network, options.channels_last) for name in names}
    tk.convert(models["converted"])
    scores = tk.Scores(tk.convert(models["scored"]), x[:1])
    also = tk.Scores(tk.convert(models["fused"], fuse=True), x[:1])
    Hooks(models["hooks"])
    ways = {name: step(model, x, target) for name, model in models.items()}
    for run in ways.values():
        run()
    found = measure(ways, options.pairs)
    print(
        f"{options.network}, batch {options.batch}, {options.size}x{options.size}, "
        f"{'channels_last' if options.channels_last else 'contiguous'}, {options.pairs} interleaved pairs, "
        f"{torch.get_num_threads()} threads; scores agree with hooks to {worst:.1e}; {len(scores.units)} units"
    )
    for name, q in found.items():
        print(f"{name:10} {q['median']:.3f} of plain   (quartiles {q['p25']:.3f} to {q['p75']:.3f})")
    assert len(also.units) == len(scores.units)
    if options.json:
        facts = {key: str(value) for key, value in vars(options).items()} | {"torch": torch.__version__}
        options.json.write_text(json.dumps({"options": facts, "agreement": worst, "ratios": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
