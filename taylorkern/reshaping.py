"""What loading tensors of other shapes changes in a model's modules: worked out on stand-ins, then done at once.

A stand-in is a module without a past: of the same class and attributes, its tensors empty and of the saved shapes, on
the meta device. What can go wrong in following the shapes goes wrong there.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from . import naming
from .attention import MultiheadAttention
from .container import StoreError, shown
from .fit import changes
from .layers import Gated
from .widths import widths

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Reshaping:
    """Attributes and classes that the modules will have."""

    attributes: list[tuple[nn.Module, str, Any]]
    classes: list[tuple[nn.Module, type[nn.Module]]]

    def perform(self, undo: ExitStack) -> None:
        """Set them, each with its way back in ``undo``."""
        for module, attribute, value in self.attributes:
            undo.callback(setattr, module, attribute, getattr(module, attribute))
            setattr(module, attribute, value)
        for module, kind in self.classes:
            undo.callback(setattr, module, "__class__", type(module))
            module.__class__ = kind


def reshaping(
    path: Path, named: dict[str, nn.Module], shapes: dict[str, Shape], attributes: dict[str, dict[str, int]] | None
) -> Reshaping:
    """What changes when the tensors get ``shapes`` (by name) and the modules ``attributes`` (by module, by name).

    Without ``attributes`` (None) the shapes have to tell everything. Raises StoreError where they don't fit the
    modules, or one another, or a module whose shapes change lacks one of its counts.
    """
    whole, attributes = attributes is not None, attributes or {}
    _check_attributes(path, named, attributes)
    for name, module in named.items():
        _check_shapes(path, name, module, shapes)
    stand_ins = _stand_ins(named, shapes)
    touched = _follow(path, named, stand_ins, attributes)
    for name, module in named.items():
        if _changed(module, stand_ins[module]):
            untold = widths(module).keys() - attributes.get(name, {}).keys()
            if whole and untold:
                where = name or "the model"
                raise StoreError(
                    f"{path} changes the shape of {where} and does not tell its {min(untold)}; save it again"
                )
            _check_counts(path, name, module, stand_ins[module])
    for module, key in touched:
        if getattr(module, key) != getattr(stand_ins[module], key) and _whole(module, stand_ins[module]):
            raise StoreError(
                f"{path} holds another network: it changes {key} of a {type(module).__name__} none of whose tensors it "
                "makes smaller, as no cut does; build the model as it was built before it was pruned"
            )
    edits = [(module, key, getattr(stand_ins[module], key)) for module, key in touched]
    classes = {module: kind for name, module in named.items() if (kind := _class(path, name, stand_ins[module]))}
    return Reshaping([edit for edit in edits if getattr(edit[0], edit[1]) != edit[2]], list(classes.items()))


def _whole(module: nn.Module, stand_in: nn.Module) -> bool:
    """Whether ``module`` and those in it have tensors, and none changes its shape."""
    own, new = ([t.shape for t in (*m.parameters(), *m.buffers())] for m in (module, stand_in))
    return bool(own) and own == new


def _check_attributes(path: Path, named: dict[str, nn.Module], attributes: dict[str, dict[str, int]]) -> None:
    for name, counts in attributes.items():
        own = widths(named[name]) if name in named else {}
        for key, value in counts.items():
            if not 1 <= value <= own.get(key, 0):
                has = f"the model's is {own[key]}" if key in own else "the model has no such count"
                raise StoreError(
                    f"{path} holds another network: {shown(name) or 'its root'} has {key} {value}, {has}; "
                    "build the model as it was built before it was pruned"
                )


def _check_shapes(path: Path, name: str, module: nn.Module, shapes: dict[str, Shape]) -> None:
    """Refuse what no cut makes, or a layer's scores could not follow, or a layer itself."""
    direct = naming.direct(name, module)
    own = {full: tuple(tensor.shape) for full, tensor in direct.items()}
    saved = {full: shapes[full] for full in direct}
    if own == saved:
        return
    pairs = {(own[full], saved[full]) for full in direct}
    if isinstance(module, _NORMS) and len(pairs) > len({before for before, _ in pairs}):  # alike before, not after
        raise _no_cut(path, name, module, saved)
    if isinstance(module, Gated) and module.gate is not None and module.gate.owner() is not None:
        raise StoreError(
            f"{name} is being scored, and {path} changes its shape; load first and make Scores or a Pruner "
            "afterwards, or call detach() on the Scores"
        )
    made = [key for key in ("weight", "bias") if isinstance(vars(module).get(key), Tensor)]
    if made:
        raise StoreError(
            f"{path} changes the shape of {name} ({type(module).__name__}), whose {made[0]} a hook makes from other "
            "parameters; use torch.nn.utils.parametrizations in place of the hook, or remove it from both models"
        )


def _no_cut(path: Path, name: str, module: nn.Module, saved: dict[str, Shape]) -> StoreError:
    told = ", ".join(f"{full.rpartition('.')[2]} {list(shape)}" for full, shape in saved.items())
    return StoreError(f"{path}: no cut leaves {name} ({type(module).__name__}) with {told}; save it again")


def _stand_ins(named: dict[str, nn.Module], shapes: dict[str, Shape]) -> dict[nn.Module, nn.Module]:
    """By module; the children of a stand-in are stand-ins."""
    made: dict[nn.Module, nn.Module] = {module: object.__new__(type(module)) for module in named.values()}
    for name, module in named.items():
        empty = {
            held: {
                key: None if tensor is None else _empty(tensor, shapes[naming.joined(name, key)])
                for key, tensor in getattr(module, held).items()
            }
            for held in ("_parameters", "_buffers")
        }
        children = {
            key: None if child is None else made[named[naming.joined(name, key)]]
            for key, child in module._modules.items()
        }
        vars(made[module]).update(vars(module), **empty, _modules=children)
    return made


def _empty(tensor: Tensor, shape: Shape) -> Tensor:
    new = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def _follow(
    path: Path,
    named: dict[str, nn.Module],
    stand_ins: dict[nn.Module, nn.Module],
    attributes: dict[str, dict[str, int]],
) -> list[tuple[nn.Module, str]]:
    """Fit the stand-ins to their shapes, then set ``attributes``, which must not contradict; what was touched."""
    root = stand_ins[named[""]]
    modules = {stand_in: module for module, stand_in in stand_ins.items()}
    told = [
        (stand_ins[named[name]], key, value) for name, counts in attributes.items() for key, value in counts.items()
    ]
    try:
        fitted = changes(root)
        for stand_in, key, value in (*fitted, *told):
            setattr(stand_in, key, value)
        contradicted = changes(root)
    except Exception as error:
        raise StoreError(f"{path}: no layer can follow the shapes of this file ({error}); save it again") from error
    contradicted += [edit for edit in told if getattr(edit[0], edit[1]) != edit[2]]
    for stand_in, key, value in contradicted:
        name = next(name for name, module in named.items() if module is modules[stand_in])
        raise StoreError(f"{path}: {name}.{key} contradicts the weights, which make it {value}; save it again")
    return [(modules[stand_in], key) for stand_in, key, _ in (*fitted, *told)]


def _changed(module: nn.Module, stand_in: nn.Module) -> bool:
    """Whether a shape anywhere in the module, or a count of its own, is another in its stand-in."""

    def shapes(m: nn.Module) -> list[torch.Size]:
        named = (*m.named_parameters(remove_duplicate=False), *m.named_buffers(remove_duplicate=False))
        return [tensor.shape for _, tensor in named]

    return shapes(module) != shapes(stand_in) or widths(module) != widths(stand_in)


def _check_counts(path: Path, name: str, module: nn.Module, stand_in: nn.Module) -> None:
    for kind, consistent in _CONSISTENT.items():
        if isinstance(module, kind) and not consistent(module, stand_in):
            saved = {full: tuple(tensor.shape) for full, tensor in naming.direct(name, stand_in).items()}
            raise _no_cut(path, name, module, saved)


def _convolution(own: Any, new: Any) -> bool:
    """Kernels keep their extent; groups go whole: what a group holds stays."""
    across = own.in_channels if own.transposed else own.out_channels
    whole = new.groups == own.groups == 1 or new.weight.shape[0] * own.groups == across * new.groups
    return whole and tuple(new.weight.shape[2:]) == own.kernel_size and _biased(new, new.out_channels)


def _biased(new: Any, width: int) -> bool:
    return not isinstance(new.bias, Tensor) or len(new.bias) == width


def _attention(own: Any, new: Any) -> bool:
    width = new.num_heads * new.head_dim
    rows = [len(t) for t in (new.q_proj_weight, new.k_proj_weight, new.v_proj_weight) if t is not None]
    stacked = [len(t) for t in (new.in_proj_weight, new.in_proj_bias) if t is not None]
    whole = new.head_dim == own.head_dim and new.out_proj.weight.shape[1] == width
    return whole and {*rows} <= {width} and {*stacked} <= {3 * width}


def _recurrent(own: Any, new: Any) -> bool:
    """Only what comes in is ever cut."""
    rows = ([len(parameter) for parameter in module.parameters()] for module in (own, new))
    return next(rows) == next(rows) and own.hidden_size == new.hidden_size


_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
_CONSISTENT: dict[type[nn.Module], Callable[[Any, Any], bool]] = {
    _ConvNd: _convolution,
    nn.Linear: lambda own, new: _biased(new, new.out_features),
    nn.GroupNorm: lambda own, new: new.num_channels * own.num_groups == own.num_channels * new.num_groups,
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
}


def _class(path: Path, name: str, stand_in: Any) -> type[nn.Module] | None:
    """The class that attention needs once its heads no longer make up its width; None where it has it."""
    attention = isinstance(stand_in, nn.MultiheadAttention) and not isinstance(stand_in, MultiheadAttention)
    if not attention:
        return None
    if stand_in.num_heads * stand_in.head_dim == stand_in.embed_dim == len(stand_in.out_proj.weight):
        return None
    if type(stand_in) is not nn.MultiheadAttention:
        raise StoreError(
            f"{path} leaves {name} {stand_in.num_heads} heads of {stand_in.head_dim} in a width of "
            f"{stand_in.embed_dim}, which a {type(stand_in).__name__} can't run; build the model with "
            "torch.nn.MultiheadAttention itself"
        )
    return MultiheadAttention
