"""Couples and cuts every torchvision classification network and compares it with its masked dense self.

    python bench/zoo.py [--seeds 2] [--json FILE] [network ...]

Networks are built without weights, in float64, with random normalisation statistics so that nothing is zero by
accident; 30 to 50 % of the units, drawn at random, are cut. The masks here are forward hooks that zero the inputs of
each convolution and linear layer: not the code that surgery verifies itself with.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taylorkern.coupling import Coupling, couple
from taylorkern.example import tensors
from taylorkern.surgery import SurgeryError, cut

TOLERANCE = 1e-9
# Smaller than usual where the architecture allows.
SIZES = {"inception_v3": 299, "googlenet": 224, "maxvit_t": 224, "vit_h_14": 56}
ARGUMENTS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
DEFAULT_SIZE = 64
# Beyond this many parameters surgery's own verification, which holds a second copy, does not fit small machines.
VERIFIED_PARAMETERS = 250_000_000


@dataclass
class Row:
    network: str
    units: int
    free: float  # the share of all channels that belong to a unit
    frozen_by: str
    removed: int
    result: str
    coupling_s: float
    surgery_s: float

    @property
    def passed(self) -> bool:
        """Equal to its masked self, or refused by name."""
        return not self.result.startswith("WRONG")


def torchvision() -> Any:
    """The package, also beside a CPU build of torch, where its import misses two operators' schemas."""
    with suppress(RuntimeError):
        _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision


_schemas = torch.library.Library("torchvision", "FRAGMENT")


def networks() -> list[str]:
    models = torchvision().models
    return models.list_models(module=models)


def build(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """The network in float64, and an example for it."""
    torch.manual_seed(seed)
    size = SIZES.get(name, DEFAULT_SIZE)
    arguments = {"image_size": size} if name.startswith("vit") else ARGUMENTS.get(name, {})
    model = torchvision().models.get_model(name, weights=None, **arguments).double()
    for module in model.modules():
        _randomise(module)
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Draw what starts as a constant; a branch scaled by almost nothing could not be seen to be wrong."""
    constants = [getattr(module, "layer_scale", None)]
    if isinstance(module, nn.Linear) and not module.weight.any():
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
        constants += [module.weight, getattr(module, "running_var", None)]
        for t in (module.bias, getattr(module, "running_mean", None)):
            if t is not None:
                t.normal_(0, 0.1)
    for t in constants:
        if isinstance(t, Tensor):
            t.uniform_(0.5, 1.5)


@contextmanager
def masked(model: nn.Module, coupling: Coupling, removed: Tensor) -> Iterator[None]:
    """Within, every convolution and linear layer sees zeros in place of the removed units."""

    def mask(name: str, layer: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        units = coupling.axes.get((f"{name}.weight", 0 if transposed else 1))
        if units is None or getattr(layer, "groups", 1) > 1:
            return None
        stays = (~torch.isin(units, removed)).double()
        shape = (-1, *[1] * (layer.weight.dim() - 2))
        return lambda _, inputs: (inputs[0] * stays.view(shape), *inputs[1:])

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
    hooks = [layer.register_forward_pre_hook(hook) for name, layer in layers if (hook := mask(name, layer))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """What the model computes; in training mode on a copy of the statistics and without dropout."""
    state = {name: b.clone() for name, b in model.named_buffers()}
    dropouts = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    model.train(training)
    try:
        for module, _ in dropouts:
            module.p = 0.0
        torch.manual_seed(0)
        with torch.no_grad():
            return list(tensors(model(x)))
    finally:
        for module, p in dropouts:
            module.p = p
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])


def error(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference over all outputs, relative to each one's largest magnitude."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, got, strict=True))


def draw(coupling: Coupling) -> Tensor:
    """30 to 50 % of the units at random, something of every dimension spared."""
    share = 0.3 + 0.2 * float(torch.rand(()))
    gone = torch.zeros(len(coupling.units) + 1, dtype=torch.bool)
    gone[torch.randperm(len(coupling.units))[: int(share * len(coupling.units))]] = True
    for units in coupling.axes.values():
        if bool(gone[units].all()):
            gone[units[0]] = False
    return gone[:-1].nonzero().flatten()


def examine(name: str, seed: int) -> Row:
    """Build, couple, cut and compare one network."""
    model, x = build(name, seed)
    start = time.perf_counter()
    coupling = couple(model, x[:1])
    coupling_s = time.perf_counter() - start
    channels = torch.cat(list(coupling.outputs.values()))
    removed = draw(coupling)
    modes = [False, True] if coupling.trained else [False]
    with masked(model, coupling, removed):
        expected = [outputs(model, x, training) for training in modes]
    verify = sum(p.numel() for p in model.parameters()) < VERIFIED_PARAMETERS
    start = time.perf_counter()
    try:
        cut(model, coupling, removed, x[:1], verify=verify)
        worst = max(error(e, outputs(model, x, t)) for e, t in zip(expected, modes, strict=True))
        result = f"{worst:.1e}" if worst <= TOLERANCE else f"WRONG {worst:.1e}"
    except SurgeryError as refusal:
        result = f"refused: {refusal.operation or refusal}"
    return Row(
        name,
        len(coupling.units),
        float((channels >= 0).double().mean()),
        ", ".join(dict.fromkeys(f.operation for f in coupling.frozen if not f.operation.startswith("model "))),
        len(removed),
        result,
        coupling_s,
        time.perf_counter() - start,
    )


HEADER = "| network | units | free | frozen by | removed | max rel error | coupling s | surgery s |"


def line(row: Row) -> str:
    return (
        f"| {row.network} | {row.units} | {row.free:.0%} | {row.frozen_by} | {row.removed} | {row.result} "
        f"| {row.coupling_s:.2f} | {row.surgery_s:.2f} |"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", help="names as torchvision.models lists them; all by default")
    parser.add_argument("--seeds", type=int, default=1, help="random cuts per network")
    parser.add_argument("--json", help="write the rows there too")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torchvision")
    print(HEADER, "|" + "---|" * 8, sep="\n", flush=True)
    rows = []
    for name in options.networks or networks():
        for seed in range(options.seeds):
            rows.append(examine(name, seed))
            print(line(rows[-1]), flush=True)
    wrong = [row for row in rows if not row.passed]
    print(f"{len(rows)} cuts, {len(wrong)} wrong", file=sys.stderr)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
