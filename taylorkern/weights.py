"""Statistics per unit that come from weights rather than gates: filter norms, scales, squares of w·dw."""

import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .coupling import Coupling
from .folding import BLOCK


def per_unit(values: Tensor, units: Tensor, count: int) -> Tensor:
    """Sum ``values`` [..., K] over the unit each belongs to; ``units`` [K] holds unit indices, -1 for none.

    Returns [..., count] in float64.

    >>> per_unit(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, -1, 0]), 2).tolist()
    [5.0, 0.0]
    """
    sums = values.new_zeros((*values.shape[:-1], count + 1), dtype=torch.float64)
    # Index -1 lands in the extra last column, which is cut off again.
    return sums.index_add_(-1, units.to(values.device) % (count + 1), values.double())[..., :count]


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
        frozen = [name for name, _ in self._axes if not model.get_parameter(name).requires_grad]
        if frozen:
            raise ValueError(f"taylor_weight needs gradients of the filters, but {frozen[0]} has requires_grad=False")
        weights = {name: model.get_parameter(name) for name, _ in self._axes}
        hooks = [hook for name, weight in weights.items() for hook in _adding(self._products, name, weight)]
        self._remove = weakref.finalize(self, _remove_all, hooks)

    def drain(self, coupling: Coupling) -> Tensor:
        """[U]: what arrived since the last call; zero for a unit without a filter."""
        total = torch.zeros(len(coupling.units), dtype=torch.float64)
        for name, dim in sorted(self._axes):
            if name in self._products:
                rows = _row_squares(self._products[name], dim)
                total = total.to(rows.device) + per_unit(rows, coupling.axes[name, dim], len(total))
        self.clear()
        return total

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
    blocks = rows.split(max(1, BLOCK * len(rows) // max(1, t.numel())))
    return torch.cat([block.double().square().sum(list(range(1, t.dim()))) for block in blocks])


def _over_axes(rows: dict[str, Tensor], axes: set[tuple[str, int]], coupling: Coupling) -> Tensor:
    return _sum_or_inf(rows, {axis: coupling.axes[axis] for axis in axes}, len(coupling.units))


def _sum_or_inf(rows: dict[str, Tensor], units: dict[tuple[str, int], Tensor], count: int) -> Tensor:
    total, seen = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    for axis in sorted(units):
        total = total.to(rows[axis[0]].device)
        total += per_unit(rows[axis[0]], units[axis], count)
        seen[units[axis][units[axis] >= 0]] = True
    return total.masked_fill(~seen.to(total.device), torch.inf)
