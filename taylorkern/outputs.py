"""The ICLR 2017 criterion's statistic: mean abs(a·dL/da) per layer and unit, which no sum over positions can give."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .coupling import Coupling
from .coupling.tracer import channel_dim
from .ops import accumulator
from .weights import per_unit


class OutputProducts:
    """Accumulates mean over n and S of abs(a·dL/da) per channel of every scored layer, for as long as it is held.

    By hooks on the layers' outputs, which are copied: what runs in place behind a layer must not reach the activation
    kept here. Forwards without gradients keep nothing.
    """

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        self.layers = list(coupling.layers)
        self._products: list[_Product] = []  # a·dL/da of the minibatch under way
        self._paused = [False]
        modules = ((layer, model.get_submodule(layer)) for layer in self.layers)
        hooks = [m.register_forward_hook(_watching(self._products, self._paused, layer)) for layer, m in modules]
        self._remove = weakref.finalize(self, _remove_all, hooks)

    def drain(self, coupling: Coupling) -> Tensor:
        """[U, layers]: what arrived since the last call, summed over a unit's channels in each layer."""
        device = self._products[0].total.device if self._products else None
        columns = torch.zeros(len(coupling.units), len(self.layers), dtype=torch.float64, device=device)
        for product in self._products:
            total = product.total.abs().movedim(product.dim, 0).flatten(1)
            mean = total.mean(1, dtype=accumulator(total.dtype))  # [C]
            columns[:, self.layers.index(product.layer)] += per_unit(mean, coupling.layers[product.layer], len(columns))
        self.clear()
        return columns

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, gradients that pass are not the loss's and don't count."""
        self._paused[0] = True
        try:
            yield
        finally:
            self._paused[0] = False

    def clear(self) -> None:
        """Forget what arrived."""
        self._products.clear()

    def detach(self) -> None:
        """Take the hooks off the layers."""
        self._remove()


@dataclass(eq=False)
class _Product:
    """a·dL/da of one forward of a layer, added up over the backwards that reach it."""

    layer: str
    dim: int  # the channels'
    total: Tensor


def _watching(products: list[_Product], paused: list[bool], layer: str) -> Any:
    # Refers to the lists alone: a hook that held its owner would live as long as the model.
    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            return
        a, dim = output.detach().clone(), channel_dim(module, output)
        product = _Product(layer, dim, torch.zeros((), dtype=a.dtype, device=a.device))

        def add(gradient: Tensor) -> None:
            if paused[0]:
                return
            if product not in products:
                products.append(product)
            product.total = product.total + a * gradient.detach()

        output.register_hook(add)

    return watch


def _remove_all(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
