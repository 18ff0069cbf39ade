"""Masks: which units of a model are masked, and the hooks that hold their consumers' weights at nought."""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .coupling import Coupling
from .slices import Indices, clear_

_OTHER_UNITS = (
    "this model has masked units, and they were counted by another coupling than this one: cut them first, with the "
    "pruner that masked them or by tk.prune(..., target=1.0), or go on with that coupling"
)


class Mask:
    """The masked ``units`` (indices into ``coupling.units``, ascending) of one model.

    Their consumers' weights are held at nought as long as the mask is on: a hook takes the gradient away there, so
    whatever moves a weight by its gradient, its moments and itself leaves it where it is. Hooks belong to the
    ``Parameter``, so they go with it to any device; a copy of the model has none.
    """

    def __init__(self, coupling: Coupling, units: Tensor) -> None:
        self.coupling, self.units = coupling, units
        self._zeros = {torch.device("cpu"): noughts(coupling, units)}
        self._held: dict[str, tuple[Tensor, RemovableHandle | None]] = {}

    @torch.inference_mode(False)
    def hold(self, model: nn.Module, copies: Iterable[nn.Module] = ()) -> None:
        """Nought again in ``model`` and its ``copies``, whatever was loaded since; hooks where there are none yet."""
        for name in self._zeros[torch.device("cpu")]:
            tensor = _tensor(model, name)
            for each in (tensor, *(_tensor(copy, name) for copy in copies)):
                clear_(each, self._on(each.device)[name])
            self._hook(name, tensor)

    def release(self) -> None:
        """Take the hooks off: what is nought trains on from there."""
        for _, handle in self._held.values():
            if handle is not None:
                handle.remove()
        self._held.clear()

    def _on(self, device: torch.device) -> dict[str, Indices]:
        """Where the noughts are, moved to ``device`` once: in every step, that would wait for it."""
        if device not in self._zeros:
            found = self._zeros[torch.device("cpu")].items()
            self._zeros[device] = {name: {dim: at.to(device) for dim, at in zeros.items()} for name, zeros in found}
        return self._zeros[device]

    def _hook(self, name: str, tensor: Tensor) -> None:
        """Hold ``tensor``, unless that is done; it may be another one than before, or need a gradient only now."""
        held, handle = self._held.get(name, (None, None))
        if held is tensor and (handle is not None or not tensor.requires_grad):
            return
        if handle is not None:
            handle.remove()
        hooked = tensor.is_leaf and tensor.requires_grad
        hook = _Hold(name, tensor, self._on(tensor.device)[name])
        self._held[name] = tensor, tensor.register_hook(hook) if hooked else None


class _Hold:
    """Takes a gradient away at ``zeros``."""

    def __init__(self, name: str, tensor: Tensor, zeros: Indices) -> None:
        self._name, self._shape, self._zeros = name, tensor.shape, zeros

    def __call__(self, gradient: Tensor) -> Tensor:
        if gradient.shape != self._shape:
            raise RuntimeError(
                f"{self._name} was masked as {tuple(self._shape)} and is {tuple(gradient.shape)} now: something else "
                "than taylorkern has changed it; make the model and its pruner anew"
            )
        for dim, indices in self._zeros.items():
            gradient = gradient.index_fill(dim, indices.to(gradient.device), 0)
        return gradient


_MASKS: "WeakKeyDictionary[nn.Module, Mask]" = WeakKeyDictionary()


def noughts(coupling: Coupling, units: Tensor) -> dict[str, Indices]:
    """Where the consumers' weights for ``units`` are: of every tensor that has any, the indices of its dimensions."""
    stays, found = coupling.staying(units), dict[str, dict[int, Tensor]]()
    for name, dim in sorted(coupling.consumers):
        indices = (~stays[coupling.axes[name, dim]]).nonzero().flatten()
        if len(indices):
            found.setdefault(name, {})[dim] = indices
    return dict(found)


def mask_of(model: nn.Module) -> Mask | None:
    """The mask that is on ``model``, if any."""
    return _MASKS.get(model)


def masked_units(model: nn.Module, coupling: Coupling) -> Tensor:
    """The units of ``coupling`` that are masked in ``model``, indices, ascending.

    Raises ValueError where they were counted by a coupling with other units.
    """
    mask = _MASKS.get(model)
    if mask is None:
        return torch.zeros(0, dtype=torch.int64)
    if mask.coupling.fingerprint != coupling.fingerprint:
        raise ValueError(_OTHER_UNITS)
    return mask.units


def put_on(model: nn.Module, mask: Mask | None) -> None:
    """The mask of ``model`` is this one from now on, in place of another."""
    before = _MASKS.pop(model, None)
    if before is not None:
        before.release()
    if mask is not None and len(mask.units):
        _MASKS[model] = mask
        mask.hold(model)


def follow_cut(model: nn.Module, after: Coupling, kept: Tensor) -> None:
    """The model was cut: of the masked units those among ``kept`` (old indices, ascending) stay masked."""
    before = _MASKS.get(model)
    if before is not None:
        put_on(model, Mask(after, torch.isin(kept, before.units).nonzero().flatten()))


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), attribute)
    assert isinstance(tensor, Tensor)
    return tensor
