"""Cuts units out of a model and its optimisers: all or nothing, checked against the masked dense model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compensation import folded, rounded
from .coupling import Coupling
from .fit import changes, fit_attributes
from .state import named_tensors, replace_data
from .verification import SurgeryError, check

__all__ = ["SurgeryError", "cut", "fit_attributes"]

Keep = dict[int, Tensor]  # dim → indices that stay


@torch.inference_mode(False)  # whose tensors could not be trained
def cut(
    model: nn.Module,
    coupling: Coupling,
    removed: Tensor | Sequence[int],
    example_inputs: Any,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    verify: bool = True,
    gates: Tensor | None = None,
) -> Coupling:
    """Remove the units ``removed`` (indices into ``coupling.units``) from ``model``, in place.

    Parameters and buffers keep their identity, ``requires_grad``, dtype, device and memory format; gradients and the
    state of ``optimizers`` are cut alike; module attributes follow. With ``verify`` the cut model is first compared
    with the dense one in which the consumers' weights for the removed units are zero (see
    ``taylorkern.verification``). Returns the coupling of the cut model, ready for the next cut.

    ``gates`` z [U] are folded in with the same stroke, also where nothing is removed: at every place of a kept unit u
    the layer's weight and bias are multiplied by z[u], in float64 and rounded once, so the cut model computes what the
    dense one does with these gates at its layers' outputs (see ``taylorkern.compensation``). Entries of removed units
    are ignored. Gradients and the state of ``optimizers`` are cut as ever and not rescaled: they stem from the weights
    before. Verified are the weights before they are rounded.

    Raises ValueError where the request is wrong and SurgeryError where the cut model would fail or compute something
    else; nothing has changed then.

    >>> from taylorkern.coupling import couple
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> x = torch.rand(1, 1, 4, 4)
    >>> coupling = cut(model, couple(model, x), [0, 2], x)
    >>> len(coupling.units), tuple(model[3].weight.shape)
    (2, (2, 8))
    """
    gone = _checked(removed, coupling)
    if not len(gone) and gates is None:
        return coupling
    named, stays = named_tensors(model), coupling.staying(gone)
    plan = _plan(named, coupling, stays)
    scaled = {} if gates is None else folded(model, coupling, gone, gates)
    keeps = {name: plan.get(name, {}) for name in (*plan, *scaled)}
    new = {name: _new(name, named[name], scaled.get(name), keep) for name, keep in keeps.items()}
    edits = [_tensor_edit(named[name], new[name], keep) for name, keep in keeps.items()]
    if plan:
        cuts = {named[name]: keep for name, keep in plan.items()}
        edits += [edit for optimizer in optimizers for edit in _state_edits(optimizer, cuts, _names(named))]
    if verify and keeps:
        exact = {name: _sliced(values, keeps[name]) for name, values in scaled.items()}
        check(model, coupling, gone, new | exact, example_inputs, gates)
    _perform(model, edits)
    return coupling.keep(stays[:-1].nonzero().flatten()) if len(gone) else coupling


def _checked(removed: Tensor | Sequence[int], coupling: Coupling) -> Tensor:
    gone = torch.as_tensor(removed).cpu()
    if gone.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if gone.dim() != 1 or gone.is_floating_point() or gone.dtype == torch.bool:
        raise ValueError(
            f"removed must be unit indices, a 1-D sequence of integers; got {gone.dtype} {tuple(gone.shape)}"
        )
    gone = gone.to(torch.int64)
    count = len(coupling.units)
    if int(gone.min()) < 0 or int(gone.max()) >= count:
        raise ValueError(f"removed holds {int(gone.min())}..{int(gone.max())}, but the units are 0..{count - 1}")
    if len(gone.unique()) < len(gone):
        raise ValueError("removed holds a unit twice")
    return gone.sort().values


def _plan(named: dict[str, Tensor], coupling: Coupling, stays: Tensor) -> dict[str, Keep]:
    """What stays of every dimension that loses something."""
    plan: dict[str, Keep] = {}
    for (name, dim), units in coupling.axes.items():
        if name not in named or named[name].dim() <= dim or named[name].shape[dim] != len(units):
            found = tuple(named[name].shape) if name in named else "nothing"
            raise ValueError(
                f"the coupling is not this model's: {name} dim {dim} should have size {len(units)}, but has {found}"
            )
        keep = stays[units].nonzero().flatten()
        if not len(keep):
            raise ValueError(
                f"removing these units would leave nothing of {name} dim {dim}; keep one of its {len(units)} channels"
            )
        if len(keep) < len(units):
            plan.setdefault(name, {})[dim] = keep
    return plan


def _new(name: str, tensor: Tensor, scaled: Tensor | None, keep: Keep) -> Tensor:
    """What ``tensor`` will hold: rounded from ``scaled`` where there is one, then cut."""
    return _sliced(tensor if scaled is None else rounded(name, tensor, scaled), keep)


def _sliced(tensor: Tensor, keep: Keep) -> Tensor:
    """``tensor`` at the kept indices, in a tensor of its own with the same order of strides."""
    new = tensor.detach()
    for dim, indices in keep.items():
        new = new.index_select(dim, indices.to(tensor.device))
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return new.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])


@dataclass(frozen=True)
class _Edit:
    """One assignment, and the one that takes it back."""

    do: Callable[[], None]
    undo: Callable[[], None]


def _tensor_edit(tensor: Tensor, new: Tensor, keep: Keep) -> _Edit:
    old, grad = tensor.data, tensor.grad if tensor.is_leaf else None
    new_grad = _sliced(grad, keep) if grad is not None and keep else grad
    return _Edit(lambda: replace_data(tensor, new, new_grad), lambda: replace_data(tensor, old, grad))


def _state_edits(optimizer: torch.optim.Optimizer, keeps: dict[Tensor, Keep], names: dict[Tensor, str]) -> list[_Edit]:
    edits = []
    # Of every parameter: LBFGS, for one, keeps flat vectors of all of them with the first.
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            what = f"{type(optimizer).__name__}'s {key!r} of {names.get(parameter, 'a parameter of another model')}"
            if _is_per_element(value, parameter, what) and parameter in keeps:
                edits.append(_item_edit(state, key, _sliced(value, keeps[parameter])))
    return edits


def _is_per_element(value: Any, parameter: Tensor, what: str) -> bool:
    found = [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return True
    if all(t.numel() == 1 for t in found):
        return False
    raise SurgeryError(
        f"{what} has shape {tuple(found[0].shape)}, neither the parameter's {tuple(parameter.shape)} nor one number: "
        "its elements can't be told apart, so it can't be cut. If it comes from a file, load the pruner's state before "
        "the optimiser's; otherwise start a fresh optimiser after the cut"
    )


def _item_edit(state: dict[str, Any], key: str, new: Any) -> _Edit:
    old = state[key]
    return _Edit(lambda: state.__setitem__(key, new), lambda: state.__setitem__(key, old))


def _names(named: dict[str, Tensor]) -> dict[Tensor, str]:
    return {tensor: name for name, tensor in named.items()}


def _perform(model: nn.Module, edits: list[_Edit]) -> None:
    done: list[_Edit] = []
    try:
        for edit in edits:
            done.append(edit)
            edit.do()
        for module, attribute, value in changes(model):
            before = getattr(module, attribute)
            done.append(_attribute_edit(module, attribute, value, before))
            done[-1].do()
    except BaseException:
        for edit in reversed(done):
            edit.undo()
        raise


def _attribute_edit(module: nn.Module, attribute: str, value: Any, before: Any) -> _Edit:
    return _Edit(lambda: setattr(module, attribute, value), lambda: setattr(module, attribute, before))
