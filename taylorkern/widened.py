"""Computing in float64 what a model's code asks to have computed in less, so that rounding hides nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = frozenset([torch.float32, torch.bfloat16, torch.float16])
_CASTS: dict[Any, Any] = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)


class Widened(TorchFunctionMode):
    """Within, float64 takes the place of every narrower floating-point type that code names.

    >>> with Widened():
    ...     torch.ones(2, dtype=torch.float64).softmax(0, dtype=torch.float32).dtype
    torch.float64
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wide = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return _CASTS.get(function, function)(*map(_wide, args), **wide)


def _wide(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _NARROW else argument
