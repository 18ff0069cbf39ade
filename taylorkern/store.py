"""Save and load pruned networks: safetensors files whose metadata carry a JSON plan. Nothing is unpickled.

The plan states what the file must contain: format, names, shapes, dtypes, a SHA-256 per tensor, which names are one
tensor (tied weights), and the attributes by which modules count channels and heads. Loading compares all of it with
the file and with the model first, and only then touches the model.
"""

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import container, naming, plan
from .canonical import canonical
from .container import StoreError, shown
from .files import replacing
from .masks import mask_of
from .reshaping import Reshaping, reshaping
from .state import replace_data
from .widths import widths

__all__ = ["StoreError", "load", "save"]

LISTED = 5  # names spelled out in one error message
HEADER = 2**18  # bytes that a header may have beside those that the model's names account for


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all parameters and buffers of ``model``, also the non-persistent ones (a cut shrinks them).

    The file holds the plain network, whether ``model`` is converted, fused, scored or masked (a mask is the zeros in
    its weights), compiled or wrapped in ``DataParallel`` or ``DistributedDataParallel``: names are those of the model
    inside. Beside the tensors it holds the modules' counts of channels and heads (``num_heads``, ``groups`` ...).

    The same network gives the same bytes. The file is complete or absent: it is written beside ``path`` and then
    renamed, so an older file survives a failure. Weights in channels_last are stored contiguous; ``load`` gives them
    the model's own layout.

    Raises StoreError where the target can't be written, or the model holds what a safetensors file can't
    carry: extra state, uninitialised, meta, sparse, quantised or distributed tensors; also at a ScriptModule and at an
    ``AveragedModel``, whose ``.module`` can be saved.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(nn.Linear(4, 3), Path(folder) / "small.safetensors")
    ...     load(Path(folder) / "small.safetensors", nn.Linear(8, 3))
    Linear(in_features=4, out_features=3, bias=True)
    """
    named = naming.modules(model)
    tensors = naming.tensors(named)
    tied = _tied(tensors)
    stored = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if tied[name] == name
    }
    metadata = plan.Plan(
        {name: plan.Entry(tensor.dtype, tuple(tensor.shape), _digest(tensor)) for name, tensor in stored.items()},
        {name: first for name, first in tied.items() if name != first},
        {name: counts for name, module in named.items() if (counts := widths(module))},
    ).metadata()
    try:
        with replacing(path) as file:
            file.writelines(canonical(safetensors.torch.save(stored, metadata)))
    except OSError as error:
        where = os.path.realpath(path)
        raise StoreError(f"can't write {where}: {error}; give a path in a writable folder with room") from error


@torch.inference_mode(False)  # whose tensors could not be trained
def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put a saved network into ``model``, built as the dense one was (converted or not); return ``model``.

    Parameters keep their identity, ``requires_grad``, device, dtype and memory format; gradients are dropped.
    Modules' attributes (``out_channels``, ``groups``, ``num_heads`` ...) follow, and attention that was left with
    fewer heads runs as ``taylorkern.MultiheadAttention``. ``model`` may be compiled, or wrapped in ``DataParallel``;
    in ``DistributedDataParallel`` only where no shape changes. Make optimisers and scores afterwards.

    Raises StoreError, with the model bitwise unchanged, where the file is missing, no regular file, truncated,
    altered, not written by ``save``, of a newer format, or does not fit the model: other names, other ties, a
    dimension or an attribute larger than the model's or changed in a way no cut makes, attributes that contradict
    the shapes, a dtype that the model's would round. Beside a
    header of bounded length no more is read or allocated than the model's own size. Whether the layers' widths fit one
    another is not known before the network runs.
    """
    where = Path(path)
    if not os.fspath(path):
        raise StoreError("can't read a file without a name; give the path that was given to taylorkern.save")
    named = naming.modules(model)
    own = naming.tensors(named)
    with container.opened(where, _longest_header([*named, *own])) as file:
        saved = plan.read(where, file.metadata)
        _check_names(where, saved, own)
        if file.entries.keys() != saved.tensors.keys():
            raise StoreError(f"{where} does not hold the tensors of its own plan: it was altered; save it again")
        for name, entry in saved.tensors.items():
            _check_fit(where, name, entry, own[name])
        entries = {name: saved.tensors[saved.tied.get(name, name)] for name in own}
        _check_unbound(where, model, own, entries)
        shapes = {name: entry.shape for name, entry in entries.items()}
        reshaped = reshaping(where, named, shapes, saved.attributes)
        read = {name: _read(file, name, entry, own[name]) for name, entry in saved.tensors.items()}
    _swap(own, {name: read[saved.tied.get(name, name)] for name in own}, reshaped)
    return model


def _longest_header(names: list[str]) -> int:
    """More than the header of any file of this model has, in bytes: per name, the entries of a tensor or a module."""
    return HEADER + sum(4096 + 32 * len(name) for name in names)


def _read(file: container.Container, name: str, entry: plan.Entry, own: Tensor) -> Tensor:
    """A tensor of the file, for the place of ``own``."""
    tensor = file.read(name, entry.dtype, entry.shape)
    if _digest(tensor) != entry.sha256:
        raise StoreError(f"{file.path}: tensor {name} is not what was saved (checksum); get the file again")
    return _like(tensor, own)


def _swap(own: dict[str, Tensor], replacements: dict[str, Tensor], reshaped: Reshaping) -> None:
    """All tensors, attributes and classes at once, or none."""
    before = {name: (tensor.data, tensor.grad if tensor.is_leaf else None) for name, tensor in own.items()}
    with ExitStack() as undo:
        for name, (data, grad) in before.items():
            undo.callback(_assign, own[name], data, grad)
        reshaped.perform(undo)
        for name, tensor in own.items():
            _assign(tensor, replacements[name])
        undo.pop_all()


def _assign(tensor: Tensor, data: Tensor, grad: Tensor | None = None) -> None:
    """``data`` of the same shape is put in directly: what DistributedDataParallel hangs on the parameter stays."""
    if data.shape != tensor.shape:
        replace_data(tensor, data, grad)
        return
    if tensor.is_leaf:
        tensor.grad = grad
    tensor.data = data


def _tied(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Each name's first name: names that share one memory in one shape are one tensor."""
    first: dict[tuple[Any, ...], str] = {}

    def place(tensor: Tensor) -> tuple[Any, ...]:
        empty = tensor.numel() == 0
        return (id(tensor),) if empty else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)

    return {name: first.setdefault(place(tensor), name) for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(container.raw(tensor).numpy().data).hexdigest()


def _check_names(path: Path, saved: plan.Plan, own: dict[str, Tensor]) -> None:
    """The same names, and the same of them tied together."""
    names = saved.tensors.keys() | saved.tied.keys()
    if names != own.keys():
        differences = {"the model lacks": sorted(names - own.keys()), "the file lacks": sorted(own.keys() - names)}
        told = "; ".join(f"{what} {_listing(names)}" for what, names in differences.items() if names)
        raise StoreError(f"{path} holds another network: {told}; build the model as it was built before it was pruned")
    ties = {name: first for name, first in _tied(own).items() if name != first}
    if saved.tied != ties:
        different = sorted(name for name in ties.keys() | saved.tied.keys() if saved.tied.get(name) != ties.get(name))
        raise StoreError(
            f"{path} and the model tie different weights together: {_listing(different)}; "
            "tie the model's weights as they were when it was saved"
        )


def _check_fit(path: Path, name: str, entry: plan.Entry, own: Tensor) -> None:
    smaller = len(entry.shape) == own.dim() and all(
        min(1, dense) <= size <= dense for size, dense in zip(entry.shape, own.shape, strict=True)
    )
    if not smaller:
        raise StoreError(
            f"{path}: {name} has shape {shown(str(list(entry.shape)))}, the model's has {list(own.shape)}; a cut only "
            "makes dimensions smaller: build the model as it was built before it was pruned"
        )
    if entry.dtype != own.dtype and not _holds(own.dtype, entry.dtype):
        raise StoreError(
            f"{path}: {name} is {entry.dtype}, which the model's {own.dtype} can't hold exactly; "
            f"convert the model first: model.to({entry.dtype})"
        )


def _check_unbound(path: Path, model: nn.Module, own: dict[str, Tensor], entries: dict[str, plan.Entry]) -> None:
    """Refuse other shapes where something else goes by the model's."""
    other = [name for name, tensor in own.items() if tuple(tensor.shape) != entries[name].shape]
    if other and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise StoreError(
            f"{path} changes the shape of {_listing(other)}, but DistributedDataParallel has laid out gradients for "
            "the model's; load into the model first and wrap it afterwards"
        )
    if other and any(mask_of(module) is not None for module in model.modules()):
        raise StoreError(
            f"{path} changes the shape of {_listing(other)}, but units of the model are masked; build the model anew "
            "and load into that"
        )


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of the floating type ``narrow`` is one of ``wide`` too."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    outer, inner = torch.finfo(wide), torch.finfo(narrow)
    return outer.eps <= inner.eps and outer.max >= inner.max and outer.tiny <= inner.tiny


def _like(saved: Tensor, own: Tensor) -> Tensor:
    """``saved`` in the dtype, device and memory format of ``own``."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = layouts.get(own.dim(), torch.contiguous_format)
    if own.is_contiguous() or not own.is_contiguous(memory_format=layout):
        layout = torch.contiguous_format
    return saved.to(device=own.device, dtype=own.dtype).contiguous(memory_format=layout)


def _listing(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(map(shown, names[:LISTED])) + (f" and {more} more" if more > 0 else "")
