"""Which of a GPU's backends is the fastest for a call, by measurements that are kept beside this file.

``python -m bench.gpu --keep-choice`` writes them. A row says which backend was the fastest for an operation, a dtype
and a layout at a size; the row of the nearest size answers. A GPU without rows of its own takes those of one of the
same compute capability, and without these the order of the provider table stands.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .frame import CHANNELS_LAST, layout_of

MEASURED = Path(__file__).with_name("measured.json")
LAYOUTS = ("contiguous", "channels_last")  # by the codes of ops.h
# A backward that computes z once more has to round it as its forward did: it runs by kernels of the same kind.
FORWARD = {"batch_norm_act_backward": "batch_norm_act"}


class Choice:
    """The fastest backend's name by operation, dtype, layout and size.

    >>> row = {"operation": "channel_scores", "dtype": "float32", "layout": "contiguous", "backend": "cuda"}
    >>> choice = Choice([row | {"log2_numel": 10}, row | {"log2_numel": 20, "backend": "triton_operations"}])
    >>> [choice.fastest(operation, "float32", "contiguous", 14) for operation in ("channel_scores", "batch_norm_act")]
    ['cuda', None]
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._measured: dict[tuple[str, str, str], dict[int, str]] = {}
        for row in rows:
            of = self._measured.setdefault((row["operation"], row["dtype"], row["layout"]), {})
            of[row["log2_numel"]] = row["backend"]
        self._known: dict[tuple[str, torch.dtype, bool, int], str | None] = {}  # by what a call shows at once

    def fastest(self, operation: str, dtype: str, layout: str, log2_numel: int) -> str | None:
        """The backend that was measured to be the fastest at the nearest size; None where nothing was measured.

        A backward stays with kernels of its forward's kind, be there faster ones or not.
        """
        sizes = self._measured.get((operation, dtype, layout))
        found = sizes[min(sizes, key=lambda size: abs(size - log2_numel))] if sizes else None
        if operation not in FORWARD:
            return found
        forward = self.fastest(FORWARD[operation], dtype, layout, log2_numel)
        return found if _kind(found) == _kind(forward) else forward

    def of(self, operation: str, tensor: Tensor) -> str | None:
        """The same for a call on ``tensor`` [N, C, *S]."""
        if not self._measured:
            return None
        size, last = tensor.numel().bit_length(), layout_of(tensor) == CHANNELS_LAST
        key = (operation, tensor.dtype, last, size)
        if key not in self._known:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._known[key] = self.fastest(operation, dtype, LAYOUTS[last], size - 1)
        return self._known[key]


def _kind(backend: str | None) -> str:
    """Of its kernels: "cuda" of "cuda resident" as well."""
    return backend.split()[0] if backend else ""


def rows_for(measured: Mapping[str, Any], name: str, capability: tuple[int, int]) -> list[dict[str, Any]]:
    """What was measured on the GPU of that name, or else on one of the same compute capability.

    >>> measured = {"devices": {"A": {"capability": [9, 0], "rows": [{"backend": "cuda"}]}}}
    >>> rows_for(measured, "B", (9, 0)), rows_for(measured, "B", (8, 0))
    ([{'backend': 'cuda'}], [])
    """
    devices = measured["devices"]
    alike = [of["rows"] for of in devices.values() if tuple(of["capability"]) == tuple(capability)]
    own = devices.get(name)
    return own["rows"] if own else next(iter(alike), [])


@cache
def on(device: torch.device) -> Choice:
    """The choice on a GPU."""
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Choice(rows_for(json.loads(MEASURED.read_text()), name, capability))
