"""A model's modules and tensors by the names they have without a wrapper around the model or a part of it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .container import DTYPES, METADATA, StoreError

_REFUSED: dict[type[nn.Module], str] = {
    AveragedModel: "counts its updates in a buffer of its own: save and load the network in its attribute .module",
    torch.jit.ScriptModule: "runs code that is fixed to its shapes: save and load the model it was made from",
}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under each of its names; compiled ones and data-parallel ones are named as what they wrap.

    Raises StoreError at a module whose state is more, or other, than its tensors.

    >>> list(modules(nn.DataParallel(nn.Sequential(nn.ReLU()))))
    ['', '0']
    """
    return dict(_walk(model, ""))


def tensors(named: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters, then the buffers of ``modules``, under each of their names, tied ones under all.

    Raises StoreError at a tensor that a safetensors file can't carry.

    >>> list(tensors(modules(nn.Linear(4, 3))))
    ['weight', 'bias']
    """
    found = {
        full: tensor
        for part in ("_parameters", "_buffers")
        for name, module in named.items()
        for full, tensor in _held(name, getattr(module, part)).items()
    }
    for name, tensor in found.items():
        _check(name, tensor)
    return found


def direct(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that the module ``name`` holds itself, by full name."""
    return _held(name, {**module._parameters, **module._buffers})


def joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _held(name: str, held: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {joined(name, key): tensor for key, tensor in held.items() if tensor is not None}


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    while (inner := _wrapped(module, name)) is not None:
        module = inner
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, joined(name, key))


def _wrapped(module: Any, name: str) -> nn.Module | None:
    """What ``module`` only wraps, by torch.compile or for data-parallel training; refuses what can't be told apart."""
    what = f"{name or 'the model'} ({type(module).__name__})"
    for kind, why in _REFUSED.items():
        if isinstance(module, kind):
            raise StoreError(f"{what} {why}")
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise StoreError(
            f"{what} keeps extra state that is not a tensor; "
            "a safetensors file can't carry it: register it as a buffer, or save it apart"
        )
    if "_fsdp_wrapped_module" in module._modules:
        raise StoreError(f"{what} holds shards of its tensors: gather the whole model, then save or load that")
    if isinstance(module, DataParallel | DistributedDataParallel):
        return module.module
    return module._modules.get("_orig_mod")


def _check(name: str, tensor: Tensor) -> None:
    if name == METADATA or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise StoreError(f"no safetensors file can hold a tensor with the name {name!a}; give it another")
    uninitialised = isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)
    plain = type(tensor.data) is Tensor and tensor.layout == torch.strided
    if uninitialised or not plain or tensor.is_meta or tensor.is_quantized:
        raise StoreError(
            f"{name} is a {type(tensor).__name__} on {tensor.device} with layout {tensor.layout}; only "
            "plain, dense, initialised tensors are saved and loaded: run or materialise the model first"
        )
    if tensor.dtype not in DTYPES.values():
        raise StoreError(f"{name} is {tensor.dtype}, which a safetensors file can't hold; convert the model first")
