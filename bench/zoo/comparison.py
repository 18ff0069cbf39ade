"""A cut network against its masked dense self, by code that surgery does not verify itself with."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taylorkern.coupling import Coupling
from taylorkern.example import run, tensors


def draw(coupling: Coupling, share: float | None = None) -> Tensor:
    """``share`` of the units at random (by default some 30 to 50 %), something of every dimension spared."""
    if share is None:
        share = 0.3 + 0.2 * float(torch.rand(()))
    gone = torch.zeros(len(coupling.units) + 1, dtype=torch.bool)
    gone[torch.randperm(len(coupling.units))[: int(share * len(coupling.units))]] = True
    for units in coupling.axes.values():
        if bool(gone[units].all()):
            gone[units[0]] = False
    return gone[:-1].nonzero().flatten()


@torch.no_grad()
def masked_copy(model: nn.Module, coupling: Coupling, removed: Tensor) -> nn.Module:
    """The dense model with zeros in the weights that contract the units ``removed``."""
    dense = copy.deepcopy(model)
    parameters = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    for name, dim in coupling.consumers:
        gone = torch.isin(coupling.axes[name, dim], removed).nonzero().flatten()
        parameters[name].index_fill_(dim, gone, 0.0)
    return dense


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


def outputs(model: nn.Module, inputs: Any, training: bool) -> list[Tensor]:
    """What the model computes; in training mode on a copy of the statistics and without dropout of any kind."""
    state = {name: b.clone() for name, b in model.named_buffers()}
    model.train(training)
    try:
        with _no_dropout(model), torch.no_grad():
            torch.manual_seed(0)
            return list(tensors(run(model, inputs)))
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout, stochastic depth and layer dropout keep their chance in a number of one of these names."""
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and (name == "p" or "drop" in name)
    ]
    try:
        for module, name, _ in found:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)


def error(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference over all outputs, relative to each one's largest magnitude."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    return max(map(_difference, expected, got))


def _difference(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    apart, size = float((a - b).abs().max()), float(a.abs().max())
    return apart / size if apart else 0.0
