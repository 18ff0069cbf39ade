"""Refuses models whose tensors belong to a wrapper, or are pieces of the whole ones."""

import sys
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_SHARDED = (
    "holds pieces of its tensors, and a channel can't be scored or cut by pieces: use DistributedDataParallel while "
    "pruning, and shard the pruned network afterwards"
)
_REPLICATED = (
    "is a DistributedDataParallel, which has laid out gradients for the tensors as they are: give the network inside, "
    "its attribute .module, and train through the wrapper"
)
_COMPILED = (
    "is what torch.compile returned: give the network that was compiled, whose tensors and layers it shares, and train "
    "through the compiled one"
)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError, saying what to give instead, where ``model`` is data-parallel, compiled or sharded.

    A part that is data-parallel counts, too; compiled parts do not, nor does ``model.compile()``.

    >>> refuse_wrapped(nn.Linear(4, 2))
    """
    for where, why in _obstacles(model):
        raise ValueError(f"{where} {why}")


def _obstacles(model: nn.Module) -> Iterator[tuple[str, str]]:
    if "_orig_mod" in model._modules:
        yield type(model).__name__, _COMPILED
    sharding = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, DistributedDataParallel):
            yield where, _REPLICATED
        if isinstance(module, sharding):
            yield where, _SHARDED
    pieces = _loaded("torch.distributed.tensor", "DTensor")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, pieces):
            yield f"{name} ({type(tensor).__name__})", _SHARDED


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """The class, where its module has been imported: without, there is no object of it."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)
