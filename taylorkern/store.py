"""Save and load pruned networks: safetensors files whose metadata carry a JSON plan. Nothing is unpickled.

The plan states what the file must contain: format, names, shapes, dtypes, a SHA-256 per tensor, and which
names are one tensor (tied weights). Loading compares all of it with the file and with the model first, and
only then touches the model.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ._version import __version__
from .files import replace
from .layers import Gated
from .state import replace_data
from .surgery import fit_attributes

FORMAT = 1
PLAN = "taylorkern.plan"
DIGEST = "taylorkern.plan.sha256"
LISTED = 5  # names spelled out in one error message
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class StoreError(RuntimeError):
    """A file can't be written, or can't be what the model needs. The model is as it was before the call."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all parameters and buffers of ``model``, also the non-persistent ones (a cut shrinks them).

    The file is complete or absent: it is written beside ``path`` and then renamed, so an older file survives
    a failure. Weights in channels_last are stored contiguous; ``load`` gives them the model's own layout.

    Raises StoreError where the target can't be written, or the model holds what a safetensors file can't
    carry: extra state, uninitialised, meta, sparse, quantised or distributed tensors.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(nn.Linear(4, 3), Path(folder) / "small.safetensors")
    ...     load(Path(folder) / "small.safetensors", nn.Linear(8, 3))
    Linear(in_features=4, out_features=3, bias=True)
    """
    tensors = _tensors(model)
    tied = _tied(tensors)
    stored = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if tied[name] == name
    }
    plan = json.dumps(
        {
            "format": FORMAT,
            "taylorkern": __version__,
            "tensors": {name: _describe(tensor) for name, tensor in stored.items()},
            "tied": {name: first for name, first in tied.items() if name != first},
        }
    )
    content = safetensors.torch.save(stored, {PLAN: plan, DIGEST: hashlib.sha256(plan.encode()).hexdigest()})
    try:
        replace(path, content)
    except OSError as error:
        where = os.path.realpath(path)
        raise StoreError(f"can't write {where}: {error}; give a path in a writable folder with room") from error


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put a saved network into ``model``, built as the dense one was (converted or not); return ``model``.

    Parameters keep their identity, ``requires_grad``, device, dtype and memory format; gradients are dropped.
    Modules' attributes (``out_channels``, ``groups`` ...) follow the new shapes. Make optimisers and scores
    afterwards.

    Raises StoreError, with the model bitwise unchanged, where the file is missing, truncated, altered, not
    written by ``save``, of a newer format, or does not fit the model: other names, other ties, a dimension
    larger than the model's or changed in a way no cut makes, a dtype that the model's would round.
    """
    own = _tensors(model)
    saved = _read(Path(path), own)
    fitted = {name: _like(tensor, own[name]) for name, tensor in saved.items()}
    replacements = {name: fitted[first] for name, first in _tied(own).items()}
    for name, module in model.named_modules():
        direct = (*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False))
        shapes = {full.rpartition(".")[2]: (tensor.shape, replacements[full].shape) for full, tensor in direct}
        _check_layer(Path(path), name, module, shapes)
    _swap(model, own, replacements)
    return model


def _swap(model: nn.Module, own: dict[str, Tensor], replacements: dict[str, Tensor]) -> None:
    """All tensors at once, or none."""
    before = {name: (tensor.data, tensor.grad) for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            replace_data(tensor, replacements[name])
        fit_attributes(model)
    except BaseException:
        for name, (data, grad) in before.items():
            replace_data(own[name], data, grad)
        fit_attributes(model)
        raise


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names, tied ones under all."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise StoreError(
                f"{name or 'the model'} ({type(module).__name__}) keeps extra state that is not a tensor; "
                "a safetensors file can't carry it: register it as a buffer, or save it apart"
            )
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        uninitialised = isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)
        plain = type(tensor.data) is Tensor and tensor.layout == torch.strided
        if uninitialised or not plain or tensor.is_meta or tensor.is_quantized:
            raise StoreError(
                f"{name} is a {type(tensor).__name__} on {tensor.device} with layout {tensor.layout}; only "
                "plain, dense, initialised tensors are saved and loaded: run or materialise the model first"
            )
    return tensors


def _tied(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Each name's first name: names that share one memory in one shape are one tensor."""
    first: dict[tuple[Any, ...], str] = {}

    def place(tensor: Tensor) -> tuple[Any, ...]:
        empty = tensor.numel() == 0
        return (id(tensor),) if empty else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)

    return {name: first.setdefault(place(tensor), name) for name, tensor in tensors.items()}


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest(),
    }


def _read(path: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors, copied out of it, after everything the file says was checked."""
    with _opened(path) as file:
        plan = _plan(path, file.metadata() or {})
        described = plan["tensors"]
        _check_names(path, set(described) | set(plan["tied"]), set(own))
        _check_ties(path, plan["tied"], {name: first for name, first in _tied(own).items() if name != first})
        if set(file.keys()) != set(described):
            raise StoreError(f"{path} does not hold the tensors of its own plan: it was altered; save it again")
        for name, entry in described.items():
            _check_fit(path, name, entry, own[name])
        saved = {}
        for name, entry in described.items():
            saved[name] = file.get_tensor(name).clone()
            if _describe(saved[name]) != entry:
                raise StoreError(f"{path}: tensor {name} is not what was saved (checksum); get the file again")
    return saved


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise StoreError(
            f"{path} is truncated, altered or not a safetensors file ({error}); get or save it again"
        ) from error
    except OSError as error:
        raise StoreError(f"can't read {path}: {error}; check the path and its permissions") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} holds a plan of another form ({error!r}); save it again with taylorkern") from error


def _plan(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The file's plan, once its checksum and its format are known to be good."""
    if PLAN not in metadata or DIGEST not in metadata:
        raise StoreError(
            f"{path} is a safetensors file but holds no taylorkern plan: not written by taylorkern.save; "
            "load plain weights with load_state_dict"
        )
    if hashlib.sha256(metadata[PLAN].encode()).hexdigest() != metadata[DIGEST]:
        raise StoreError(f"{path}: the plan is not what was saved (checksum); get the file again")
    plan: dict[str, Any] = json.loads(metadata[PLAN])
    if plan["format"] != FORMAT:
        raise StoreError(
            f"{path} was written by taylorkern {plan['taylorkern']} in format {plan['format']}; "
            f"taylorkern {__version__} reads format {FORMAT}: use a version that reads both"
        )
    return plan


def _check_names(path: Path, saved: set[str], own: set[str]) -> None:
    if saved == own:
        return
    differences = {"the model lacks": sorted(saved - own), "the file lacks": sorted(own - saved)}
    told = "; ".join(f"{what} {_listing(names)}" for what, names in differences.items() if names)
    raise StoreError(f"{path} holds another network: {told}; build the model as it was built before it was pruned")


def _check_ties(path: Path, saved: dict[str, str], own: dict[str, str]) -> None:
    if saved != own:
        names = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
        raise StoreError(
            f"{path} and the model tie different weights together: {_listing(names)}; "
            "tie the model's weights as they were when it was saved"
        )


def _check_fit(path: Path, name: str, entry: dict[str, Any], own: Tensor) -> None:
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
    smaller = len(shape) == own.dim() and all(
        min(1, dense) <= size <= dense for size, dense in zip(shape, own.shape, strict=True)
    )
    if not smaller:
        raise StoreError(
            f"{path}: {name} has shape {shape}, the model's has {list(own.shape)}; a cut only makes "
            "dimensions smaller: build the model as it was built before it was pruned"
        )
    if dtype != own.dtype and not _holds(own.dtype, dtype):
        raise StoreError(
            f"{path}: {name} is {entry['dtype']}, which the model's {own.dtype} can't hold exactly; "
            f"convert the model first: model.to({entry['dtype']})"
        )


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of the floating type ``narrow`` is one of ``wide`` too."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    outer, inner = torch.finfo(wide), torch.finfo(narrow)
    return outer.eps <= inner.eps and outer.max >= inner.max and outer.tiny <= inner.tiny


def _check_layer(path: Path, name: str, module: nn.Module, shapes: dict[str, tuple[Any, Any]]) -> None:
    """Refuse what no cut makes, or a layer's scores could not follow. ``shapes`` holds pairs (own, saved).

    A cut shortens a layer's per-channel vectors alike and leaves its kernel's extent alone.
    """
    own, saved = ({key: pair[i] for key, pair in shapes.items()} for i in (0, 1))
    extents = isinstance(module, _ConvNd) and "weight" in own and own["weight"][2:] != saved["weight"][2:]
    vectors = isinstance(module, _BatchNorm) and len({shape for shape in saved.values() if len(shape) == 1}) > 1
    if extents or vectors:
        told = ", ".join(f"{key} {list(shape)}" for key, shape in saved.items())
        raise StoreError(f"{path}: no cut leaves {name} ({type(module).__name__}) with {told}; save it again")
    scored = isinstance(module, Gated) and module.gate is not None and module.gate.owner() is not None
    if scored and own != saved:
        raise StoreError(
            f"{name} is being scored, and {path} changes its shape; load first and make Scores or a Pruner "
            "afterwards, or call detach() on the Scores"
        )


def _like(saved: Tensor, own: Tensor) -> Tensor:
    """``saved`` in the dtype, device and memory format of ``own``."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = layouts.get(own.dim(), torch.contiguous_format)
    if own.is_contiguous() or not own.is_contiguous(memory_format=layout):
        layout = torch.contiguous_format
    return saved.to(device=own.device, dtype=own.dtype).contiguous(memory_format=layout)


def _listing(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
