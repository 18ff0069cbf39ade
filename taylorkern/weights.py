"""Statistics per unit that come from weights rather than gates: filter norms, scales, squares of w·dw."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .coupling import Coupling
from .coupling.labels import Axis
from .folding import Folding, block


class ByUnit:
    """Adds up vectors by units, in float64: each in its own order, then one after the other, without atomics.

    ``units`` holds a vector [K] for each of them: the unit of each number, below ``count``, or -1 for none.

    >>> of = ByUnit([torch.tensor([0, -1, 0]), torch.tensor([1, 0])], 3)
    >>> of([torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8.0, 16.0])]).tolist()
    [21.0, 8.0, 0.0]
    """

    def __init__(self, units: Sequence[Tensor], count: int, device: torch.device | None = None) -> None:
        # A slot for every vector and unit that meet
        pairs = torch.cat([torch.where(of < 0, -1, of + i * count) for i, of in enumerate(units)])
        slots = pairs[pairs >= 0].unique()  # sorted: vector by vector
        slot = torch.where(pairs < 0, -1, torch.searchsorted(slots, pairs))
        self._within = Folding(slot, len(slots), device)
        self._across = Folding(slots % max(1, count), count, device)

    def __call__(self, vectors: Sequence[Tensor]) -> Tensor:
        """The sums [count], 0 for a unit without a number."""
        within, _ = self._within(torch.cat(list(vectors)).unsqueeze(0))
        return self._across(within.unsqueeze(0))[0]


def filter_norm(model: nn.Module, coupling: Coupling) -> Tensor:
    """ℓ2 norm over all filters that produce a unit's channels, [U]; infinite for a unit without a filter."""
    rows = {name: _row_squares(model.get_parameter(name).detach(), dim) for name, dim in coupling.filters}
    return _over_axes(rows, coupling.filters, coupling).sqrt()


def scale(model: nn.Module, coupling: Coupling) -> Tensor:
    """abs(γ) summed over a unit's batch-normalisation places, [U]; infinite for a unit that has none."""
    rows, axes = {}, set()
    for layer in coupling.layers:
        module = model.get_submodule(layer)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            gamma = module.weight if module.weight is not None else torch.ones(module.num_features)
            rows[layer] = gamma.detach().abs()
            axes.add((layer, 0))
    units = {axis: coupling.layers[axis[0]] for axis in axes}
    return _sum_or_inf(rows, units, len(coupling.units))


class WeightSquares:
    """Accumulates Σ (w·dw)² per filter row, by hooks on the filters' weights, for as long as it is held."""

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        self._products: dict[str, Tensor] = {}  # w·dw of the minibatch under way
        self._axes = coupling.filters
        self._last: tuple[Coupling, list[Axis], torch.device, ByUnit] | None = None
        frozen = [name for name, _ in self._axes if not model.get_parameter(name).requires_grad]
        if frozen:
            raise ValueError(f"taylor_weight needs gradients of the filters, but {frozen[0]} has requires_grad=False")
        weights = {name: model.get_parameter(name) for name, _ in self._axes}
        hooks = [hook for name, weight in weights.items() for hook in _adding(self._products, name, weight)]
        self._remove = weakref.finalize(self, _remove_all, hooks)

    def drain(self, coupling: Coupling, device: torch.device) -> Tensor:
        """[U], on ``device``: what arrived since the last call; zero for a unit without a filter."""
        axes = [axis for axis in sorted(self._axes) if axis[0] in self._products]
        if not axes:
            return torch.zeros(len(coupling.units), dtype=torch.float64, device=device)
        rows = [_row_squares(self._products[name], dim).to(device) for name, dim in axes]
        self.clear()
        return self._by_unit(coupling, axes, device)(rows)

    def _by_unit(self, coupling: Coupling, axes: list[Axis], device: torch.device) -> ByUnit:
        """Kept for the minibatches to come: mostly the same weights have gradients."""
        last = self._last
        if last is None or last[0] is not coupling or last[1:3] != (axes, device):
            sums = ByUnit([coupling.axes[axis] for axis in axes], len(coupling.units), device)
            self._last = last = coupling, axes, device, sums
        return last[3]

    def clear(self) -> None:
        """Forget what arrived."""
        self._products.clear()

    def detach(self) -> None:
        """Take the hooks off the weights."""
        self._remove()


def _adding(products: dict[str, Tensor], name: str, weight: Tensor) -> tuple[RemovableHandle, RemovableHandle]:
    """Add up w·dw of what a backward accumulates, not of gradients that ``autograd.grad`` takes away."""
    # Refers to the dictionary alone: a hook that held its owner would live as long as the model.
    coming: list[Tensor] = []

    def note(gradient: Tensor) -> None:
        coming[:] = [gradient.detach()]

    def add(weight: Tensor) -> None:
        product = weight.detach() * coming.pop()
        products[name] = products[name] + product if name in products else product

    return weight.register_hook(note), weight.register_post_accumulate_grad_hook(add)


def _remove_all(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _row_squares(t: Tensor, dim: int) -> Tensor:
    """The sum of squares of every slice along ``dim``, in float64."""
    rows = t.movedim(dim, 0)
    blocks = rows.split(max(1, block(t.device) * len(rows) // max(1, t.numel())))
    return torch.cat([part.double().square().sum(list(range(1, t.dim()))) for part in blocks])


def _over_axes(rows: dict[str, Tensor], axes: set[tuple[str, int]], coupling: Coupling) -> Tensor:
    return _sum_or_inf(rows, {axis: coupling.axes[axis] for axis in axes}, len(coupling.units))


def _sum_or_inf(rows: dict[str, Tensor], units: dict[Axis, Tensor], count: int) -> Tensor:
    seen = torch.zeros(count, dtype=torch.bool)
    for of in units.values():
        seen[of[of >= 0]] = True
    if not units:
        return torch.full((count,), torch.inf, dtype=torch.float64)
    axes = sorted(units)
    device = rows[axes[0][0]].device
    total = ByUnit([units[axis] for axis in axes], count, device)([rows[name].to(device) for name, _ in axes])
    return total.masked_fill(~seen.to(device), torch.inf)
