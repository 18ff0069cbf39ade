"""Which attributes of modules count channels or heads that can go, so that a cut must change them.

Python numbers carry no labels. What is seen is that a module hands an operation a size, and that an attribute of a
known name holds it: that attribute is bound to the labels. Whether the code runs when both follow is tried afterwards.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from ..widths import widths
from .rules import Number

Attribute = tuple[str, str]  # (module path, attribute)

_HEADS = frozenset(
    """
    num_heads num_attention_heads n_heads n_head nhead heads num_head n_kv_heads num_kv_heads num_key_value_heads
    """.split()
)
# Mostly the width of what comes in and goes out, which a residual stream often keeps as it is.
_STREAM = frozenset(
    """
    dim embed_dim embedding_dim hidden_size d_model width channels num_features out_dim in_channels in_chs in_features
    """.split()
)


def countable(module: nn.Module) -> dict[str, int]:
    """The attributes of ``module`` that may be bound."""
    return {name: value for name, value in widths(module).items() if name not in _STREAM}


def heads(module: nn.Module) -> dict[str, int]:
    """Those that count heads."""
    return {name: value for name, value in countable(module).items() if name in _HEADS}


def bound(
    model: nn.Module, numbers: Iterable[Number], unit: Tensor, apart: Collection[str] = ()
) -> dict[Attribute, Tensor]:
    """The attributes that count units, with the unit of each index, -1 for what stays; ``unit`` [labels + 1].

    One that counts several lines that would not shrink alike is left alone, and all of the modules ``apart``.
    """
    found: dict[Attribute, Tensor] = {}
    clash: set[Attribute] = set()
    modules = dict(model.named_modules())
    for number in (number for number in numbers if number.module not in apart):
        units = unit[number.labels]
        for name in _names(modules[number.module], len(units)):
            before = found.setdefault((number.module, name), units)
            if not torch.equal(before.sort().values, units.sort().values):
                clash.add((number.module, name))
    return {key: units for key, units in found.items() if key not in clash and bool((units >= 0).any())}


def _names(module: nn.Module, size: int) -> list[str]:
    """The attributes that hold ``size``; those that count heads are the first to be meant."""
    for of in (heads, countable):
        names = [name for name, value in of(module).items() if value == size]
        if names:
            return names
    return []
