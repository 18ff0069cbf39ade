"""Emission: how a layer hands its output on with a gate behind it, and who else hears of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .autograd import ChannelGate, InplaceError, attach
from .channels import channel_dim, sample_dims
from .gates import Gate

Observer = Callable[[nn.Module, Tensor, int], Tensor | None]
_observers: list[Observer] = []


class Gated(nn.Module):
    """What every gated layer shares: the gate, absent until a Scores attaches one."""

    gate: Gate | None = None

    def emit(self, a: Tensor) -> Tensor:
        """``a``, on which the gate sits, with the gate behind it where one is wanted, for :func:`observed` to see.

        For a layer whose gate sits inside of it (attention's, on its heads): of any other the output is what the gate
        sits on, which a forward hook sees too.
        """
        dim = channel_dim(self, a)
        if self.gate is not None and self.gate.wanted():
            a = gated(self, self.gate, a, None)
        for observer in _observers:
            replaced = observer(self, a, dim)
            a = a if replaced is None else replaced
        return a


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within, ``observer(layer, a, channel_dim)`` is called with what a layer emits, and may return another for it.

    Only attention emits: a [N, L, H·D], its heads side by side before they are projected. Its ``forward`` returns a
    tuple that shows none of it. Every other layer's gate sits on its output, for a forward hook to see and replace.
    Within, attention runs the code that emits, whether a gate is wanted or not.

    >>> from taylorkern import MultiheadAttention
    >>> attention, x = MultiheadAttention(8, 2), torch.rand(5, 3, 8)
    >>> with observed(lambda layer, a, dim: print(type(layer).__name__, list(a.shape), dim)):
    ...     output, weights = attention(x, x, x)
    MultiheadAttention [3, 5, 8] 2
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def observing() -> bool:
    """Whether somebody is to hear of what layers emit."""
    return bool(_observers)


def gate_of(module: nn.Module | None) -> Gate | None:
    """The gate in ``module``, whether it is a gated layer or carries one by a hook."""
    if module is None:
        return None
    # Compiled code notices a gate that comes later as an attribute, not as a new key; eager code is faster by the key.
    gate = getattr(module, "gate", None) if torch.compiler.is_compiling() else vars(module).get("gate")
    return gate if isinstance(gate, Gate) else None


def wanted(module: nn.Module | None) -> bool:
    """Whether a forward of ``module`` now should take the gate in it."""
    gate = gate_of(module)
    return gate is not None and gate.wanted()


def carry(module: nn.Module, gate: Gate | None) -> None:
    """Put ``gate`` into ``module``, or take out what is there for None.

    A module of another class than ours, whose forward knows no gate, takes it by a hook on its output.
    """
    hooks = [key for key, hook in module._forward_hooks.items() if hook is _take]  # one, or a copied model's idle one
    if gate is None:
        vars(module).pop("gate", None)
        for key in hooks:
            del module._forward_hooks[key]
        return
    module.gate = gate  # type: ignore[assignment]
    if not hooks and not isinstance(module, Gated):
        module.register_forward_hook(_take, prepend=True)


# They stand in networks that were written for layers of ours, whose output may be overwritten in place.
_OVERWRITTEN = (nn.SyncBatchNorm,)


def _take(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
    """A forward hook: ``output`` with the gate in ``module`` behind it. A function, so that a copy of it does nothing
    in a copied module, which has no gate."""
    gate = gate_of(module)
    if gate is None or not isinstance(output, Tensor) or not gate.wanted():
        return None
    output = gated(module, gate, output, partial(_refuse, type(module)))
    return output.clone() if isinstance(module, _OVERWRITTEN) else output


def _refuse(kind: type[nn.Module]) -> NoReturn:
    raise InplaceError(
        f"the output of a scored {kind.__name__} was overwritten in place before backward, and its score needs the "
        "value; use the out-of-place form of that operation (relu instead of relu_, x = x + y instead of x += y)"
    )


def gated(layer: nn.Module, gate: Gate, a: Tensor, recompute: Callable[[], Tensor] | None) -> Tensor:
    """``a``, made by ``layer``, with ``gate`` behind it; one without a batch dimension is a batch of one.

    Raises ValueError for a nested tensor.
    """
    if a.is_nested:
        raise ValueError(
            f"a nested tensor reached the gate of a {type(layer).__name__}, which needs a padded one; "
            "torch.nn.TransformerEncoder makes them in evaluation mode where its weights require no gradient: "
            "model.requires_grad_(True), or torch.backends.mha.set_fastpath_enabled(False)"
        )
    batched = a.dim() > sample_dims(layer)
    view = partial(_as_ncs, batched=batched, channel_dim=channel_dim(layer, a) + (not batched))
    if torch.compiler.is_compiling():
        return attach(ChannelGate, a, *gate.anchors(), view, None, gate.addresses())
    shape = view(a).shape
    return attach(ChannelGate, a, gate.leaf(shape[0], shape[1], a), gate.elements(shape, a), view, recompute, None)


def _as_ncs(t: Tensor, batched: bool, channel_dim: int) -> Tensor:
    """A layer's output-shaped tensor as [N, C, *S]."""
    t = t if batched else t.unsqueeze(0)
    return t.movedim(channel_dim, 1)


class Recompute:
    """A layer's output ``a`` once more, for a backward that finds it overwritten; refuses where its inputs changed too.

    The weights are the ones that this forward ran with, whoever put them there: a swap of the parameters' data, a
    functional call or a weight normalisation may have given the layer others by then.
    """

    def __init__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], a: Tensor) -> None:
        self.args, self.kwargs = _detached(args), dict(zip(kwargs, _detached(kwargs.values()), strict=True))
        names = [name for name in ("weight", "bias") if hasattr(layer, name)]
        weights = dict(zip(names, _detached(getattr(layer, name) for name in names), strict=True))
        self.layer = object.__new__(type(layer))
        vars(self.layer).update(vars(layer), **weights, _parameters={}, gate=None)
        self.dtype, self.device = a.dtype, a.device.type
        read = (*self.args, *self.kwargs.values(), *weights.values(), *_detached(layer.parameters()))
        self.read = [t for t in read if isinstance(t, Tensor)]
        self.versions = [t._version for t in self.read]

    def __call__(self) -> Tensor:
        if [t._version for t in self.read] != self.versions:
            raise InplaceError(
                f"the output of a scored {type(self.layer).__name__} was overwritten in place before backward, and so "
                "was its input or weight, so its score can't be computed; use the out-of-place form of that operation"
            )
        narrow = self.dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(self.device, dtype=self.dtype if narrow else None, enabled=narrow):
            output: Tensor = self.layer.forward(*self.args, **self.kwargs)
            return output


def _detached(values: Iterable[Any]) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in values]
