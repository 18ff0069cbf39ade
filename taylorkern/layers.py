"""Drop-in layers that can carry a gate, and the conversion of whole models to and from them.

Each class is its torch parent with the same constructor, state_dict and repr. Without a gate it runs the parent's
forward and nothing else; with one it also delivers s [N, C], the gradient of its virtual gate.
"""

import threading
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from . import backends, direct
from .attention import MultiheadAttention
from .autograd import BatchNormAct, FusedBatchNormAct, attach
from .channels import channel_dim as channel_dim
from .channels import transposed_linear
from .channels import width as width
from .emission import Gated as Gated
from .emission import Recompute, carry, gated
from .gates import Addresses, Gate
from .ops import accumulator
from .wrapped import refuse_wrapped


class _Affine(Gated):
    """A layer whose output is its parent's, with the gate behind it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        parent: Callable[..., Tensor] = super().forward
        a = parent(*args, **kwargs)
        if self.gate is None or not self.gate.wanted():
            return a
        # Compiled code keeps the output that it overwrites.
        recompute = None if torch.compiler.is_compiling() else Recompute(self, args, kwargs, a)
        return gated(self, self.gate, a, recompute)


class Conv1d(_Affine, nn.Conv1d):
    """``torch.nn.Conv1d`` whose output channels can be scored; see :class:`Conv2d`."""


class Conv2d(_Affine, nn.Conv2d):
    """``torch.nn.Conv2d`` whose output channels can be scored: a [N, C, H, W] gives s = Σ_HW a·dL/da, [N, C].

    Arguments, state_dict and repr are torch's. An output overwritten in place afterwards (``relu_``, ``+=``) is
    computed once more in backward, so the score stays right; the out-of-place form saves that convolution.

    >>> Conv2d(3, 8, 3, padding=1)
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """


class Conv3d(_Affine, nn.Conv3d):
    """``torch.nn.Conv3d`` whose output channels can be scored; see :class:`Conv2d`."""


class ConvTranspose1d(_Affine, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` whose output channels can be scored; see :class:`Conv2d`."""


class ConvTranspose2d(_Affine, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` whose output channels can be scored; see :class:`Conv2d`."""


class ConvTranspose3d(_Affine, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` whose output channels can be scored; see :class:`Conv2d`."""


class Linear(_Affine, nn.Linear):
    """``torch.nn.Linear`` whose output features can be scored: a [N, *T, C] gives s = Σ_T a·dL/da, [N, C].

    Arguments, state_dict and repr are torch's.

    >>> Linear(4, 2)
    Linear(in_features=4, out_features=2, bias=True)
    """


class Embedding(_Affine, nn.Embedding):
    """``torch.nn.Embedding`` whose output's features can be scored: ids [N, *T] give s = Σ_T a·dL/da, [N, C].

    Ids [N] are N samples of one position each. Arguments, state_dict and repr are torch's.

    >>> Embedding(10, 4)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4])
    """


class LayerNorm(_Affine, nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose output's last dimension can be scored: a [N, *T, C] gives s = Σ_T a·dL/da, [N, C].

    That is so for a ``normalized_shape`` of several dimensions too. Arguments, state_dict and repr are torch's.

    >>> LayerNorm(4)
    LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    """


class RMSNorm(_Affine, nn.RMSNorm):
    """``torch.nn.RMSNorm`` whose output's last dimension can be scored; see :class:`LayerNorm`."""


class GroupNorm(_Affine, nn.GroupNorm):
    """``torch.nn.GroupNorm`` whose channels can be scored: a [N, C, *S] gives s = Σ_S a·dL/da, [N, C].

    Arguments, state_dict and repr are torch's.

    >>> repr(GroupNorm(2, 6)) == repr(nn.GroupNorm(2, 6))
    True
    """


class _BatchNorm(Gated):
    """Batch normalisation with the gate on its affine output, in training and evaluation."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            settle(self)
        if self.gate is None or not self.gate.wanted():
            output: Tensor = super().forward(input)
            return output
        assert isinstance(self, nn.modules.batchnorm._BatchNorm)
        return _gated_batch_norm(self, self.gate, input)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` whose channels can be scored; see :class:`BatchNorm2d`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` whose channels can be scored: s[n, c] = γ_c·Σ_HW x̂·dy + β_c·Σ_HW dy, [N, C].

    Both sums are the ones its backward makes anyway. Arguments, state_dict and repr are torch's.

    >>> repr(BatchNorm2d(8)) == repr(nn.BatchNorm2d(8))
    True
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` whose channels can be scored; see :class:`BatchNorm2d`."""


GATED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.Linear: Linear,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: MultiheadAttention,
}
_PARENT = {ours: torchs for torchs, ours in GATED.items()}
_BY_OUTPUT = (*(torchs for torchs in GATED if torchs is not nn.MultiheadAttention), nn.SyncBatchNorm)


def gateable(module: nn.Module) -> bool:
    """Whether a gate on ``module`` sits on what it returns, see ``channel_dim``: any layer but attention.

    So it is a gated layer, a torch layer that can become one, or a subclass of one with a forward of its own.
    Attention's gate sits inside of it, on what it emits (``taylorkern.emission.observed``).

    >>> gateable(nn.Linear(4, 2)), gateable(nn.ReLU()), gateable(nn.MultiheadAttention(8, 2))
    (True, False, False)
    """
    if isinstance(module, nn.MultiheadAttention):
        return False
    return isinstance(module, Gated) or type(module) in GATED or _by_hook(module)


def scorable(module: nn.Module) -> bool:
    """Whether ``module`` can take a gate as it is: a gated layer, or a subclass of a torch layer, by a hook.

    Such a subclass needs a name of its own for something else than ``gate``; transformers' ``Conv1D`` counts as one.

    >>> class Doubled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> scorable(Doubled(4, 2)), scorable(nn.Linear(4, 2)), scorable(Linear(4, 2))
    (True, False, True)
    """
    return isinstance(module, Gated) or (type(module) not in GATED and _by_hook(module))


def _by_hook(module: nn.Module) -> bool:
    known = isinstance(module, (*_BY_OUTPUT, *transposed_linear()))
    return known and isinstance(getattr(module, "gate", None), (Gate, type(None)))


def convert(model: nn.Module, fuse: bool = False) -> nn.Module:
    """Make every convolution, linear layer, normalisation, embedding and attention of ``model`` able to carry a gate.

    In place: modules keep their identity, names, parameters, buffers and hooks, so state_dicts fit both ways; until a
    ``Scores`` attaches gates they compute what they computed before, bit for bit. Subclasses of torch's layers are
    left alone, for their forward may differ; a ``Scores`` gates them by a hook. Returns ``model``.

    With ``fuse`` every batch normalisation that an activation follows (ReLU, ReLU6, LeakyReLU, SiLU, Hardswish), with
    or without an addition in between (before ReLU, ReLU6 and LeakyReLU), runs as one operation with it where gradients
    are recorded; a model converted before is fused too. It computes the same up to rounding, and warns
    where code could not be read (see ``taylorkern.fusion``). Backward runs once only: no
    ``create_graph`` through a fused operation.

    Raises ValueError where nothing can be converted, or everything has been already, and for a model that is wrapped or
    sharded (see ``taylorkern.wrapped``).

    >>> model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), fuse=True)
    >>> type(model[0]) is Conv2d
    True
    """
    refuse_wrapped(model)
    found = [module for module in model.modules() if type(module) in GATED]
    converted = any(isinstance(module, Gated) for module in model.modules())
    if not found and converted and not fuse:
        raise ValueError("convert: this model is converted already; call revert(model) first to start again")
    if not found and not converted and any(scorable(module) for module in model.modules()):
        raise ValueError(
            f"convert: {type(model).__name__} holds subclasses of torch's layers only; they are scored as they are, "
            "without convert"
        )
    if not found and not converted:
        known = ", ".join(cls.__name__ for cls in GATED)
        raise ValueError(
            f"convert: {type(model).__name__} holds no layer that can carry a gate; those of torch that can are {known}"
        )
    for module in found:
        module.__class__ = GATED[type(module)]
    if fuse:
        _fusion().fuse(model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn the layers of a converted ``model`` back into torch's own, in place, gates and fusion gone.

    An attention that was cut stays ``tk.MultiheadAttention``: torch's class can't express fewer heads than its width
    has room for. Returns ``model``.

    Raises ValueError where there is no converted layer to turn back.

    >>> type(revert(convert(nn.Linear(4, 2)))) is nn.Linear
    True
    """
    ours = [module for module in model.modules() if type(module) in _PARENT]
    found = [module for module in ours if not (isinstance(module, MultiheadAttention) and module.is_cut)]
    if not found:
        kept = " but attention that was cut, which torch's class can't express" if ours else ""
        raise ValueError(f"revert: {type(model).__name__} holds no converted layer{kept}; convert(model) makes them")
    _fusion().unfuse(model)
    for module in filter(scorable, model.modules()):
        carry(module, None)
    for module in found:
        module.__class__ = _PARENT[type(module)]
    return model


def _fusion() -> ModuleType:
    """Fusion is made of these layers, so it is looked up when it is called for."""
    from . import fusion

    return fusion


class Promise(Protocol):
    """The output of a batch normalisation that has not run yet."""

    def settle(self) -> None: ...


_promises: dict[tuple[int, int], ref[Promise]] = {}  # by layer and thread


def promised(layer: nn.Module, promise: Promise) -> None:
    """Have ``promise`` kept before ``layer`` runs again, so that its running statistics see its inputs in order."""
    _promises[id(layer), threading.get_ident()] = ref(promise)


def kept(layer: nn.Module) -> None:
    """Forget the promise of ``layer``'s output, which its owner keeps now."""
    _promises.pop((id(layer), threading.get_ident()), None)


def settle(layer: nn.Module) -> None:
    """Run ``layer`` for the promise of its output that is still open, if there is one."""
    promise = _promises.pop((id(layer), threading.get_ident()), None)
    if promise is not None and (kept := promise()) is not None:
        kept.settle()


def _gated_batch_norm(layer: nn.modules.batchnorm._BatchNorm, gate: Gate, x: Tensor) -> Tensor:
    """Torch's own forward, bit for bit, running statistics included; the backward is ours and fills the gate."""
    layer._check_input_dim(x)
    if torch.compiler.is_compiling():
        return _gated_in_python(layer, x, *gate.anchors(), gate.addresses())
    z, e = gate.leaf(x.shape[0], x.shape[1], x), gate.elements(x.shape, x)
    y = direct.gated(layer, x, z) if e is None else None
    return _gated_in_python(layer, x, z, e, None) if y is None else y


def _gated_in_python(
    layer: nn.modules.batchnorm._BatchNorm, x: Tensor, z: Tensor, e: Tensor | None, to: Addresses | None
) -> Tensor:
    use_batch, running = _mode(layer, x)
    with torch.no_grad():
        y, *saved = _torchs_batch_norm(layer, x, running, use_batch)
        mean, var, eps = _batch_statistics(saved, x) if use_batch else (*_copied(running, x), layer.eps)
    settings = (use_batch, eps, "none", 0.0)
    return attach(BatchNormAct, x, None, layer.weight, layer.bias, z, e, to, y, mean, var, None, *settings)


def fused_batch_norm(
    layer: nn.modules.batchnorm._BatchNorm,
    gate: Gate | None,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    slope: float = 0.0,
) -> Tensor:
    """act(layer(x) + residual) [N, C, *S] as one operation; running statistics as torch's, the gate on layer(x)."""
    z = gate.leaf(x.shape[0], x.shape[1], x) if gate is not None and gate.wanted() else None
    y = direct.fused(layer, x, residual, z, activation, slope)
    return _fused_in_python(layer, x, residual, z, activation, slope) if y is None else y


def _fused_in_python(
    layer: nn.modules.batchnorm._BatchNorm, x: Tensor, residual: Tensor | None, z: Tensor | None, *activation: Any
) -> Tensor:
    use_batch, running = _mode(layer, x)
    momentum, count = _momentum(layer), x.numel() // x.shape[1]
    follow = partial(_follow, running, count, momentum) if use_batch else _stay
    settings = (use_batch, layer.eps, *activation)
    return attach(FusedBatchNormAct, x, residual, layer.weight, layer.bias, z, follow, *running, *settings)


Running = tuple[Tensor | None, Tensor | None]


def _mode(layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> tuple[bool, Running]:
    """Whether the batch's statistics are used, and the running ones to use or to update; refuses what torch does."""
    use_batch = layer.training or layer.running_mean is None
    if use_batch and x.numel() <= x.shape[1]:
        raise ValueError(f"expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    tracked = layer.track_running_stats or not layer.training
    return use_batch, (layer.running_mean, layer.running_var) if tracked else (None, None)


def _follow(running: Running, count: int, momentum: float, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics by ``momentum`` towards a batch's of ``count`` values a channel, ``var`` biased."""
    running_mean, running_var = running
    if running_mean is not None and running_var is not None:
        backends.follow(running_mean, running_var, mean, var, momentum, count / (count - 1))


def _stay(mean: Tensor, var: Tensor) -> None:
    """Running statistics that are used as they are."""


def _torchs_batch_norm(
    layer: nn.modules.batchnorm._BatchNorm, x: Tensor, running: Running, use_batch: bool
) -> tuple[Tensor, ...]:
    """Output, mean and 1 / sqrt(variance + eps), by what ``F.batch_norm`` calls: cuDNN's kernel where that takes it."""
    given = (x, layer.weight, layer.bias, *running, use_batch, _momentum(layer), layer.eps)
    if torch.compiler.is_compiling():  # which must be told that the running statistics change
        *channels, training, momentum, eps = given[1:]
        if running[0] is None:
            return torch.ops.aten._native_batch_norm_legit.no_stats(x, *channels[:2], training, momentum, eps)
        return torch.ops.aten._native_batch_norm_legit.default(x, *channels, training, momentum, eps)
    if torch._C._get_tracing_state() is not None:  # the tracer knows nothing that returns an integer
        return torch.native_batch_norm(*given)
    return torch._batch_norm_impl_index(*given, torch.backends.cudnn.enabled)[:3]


def _batch_statistics(saved: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, variance and eps as the backward takes them, from what torch saved; the eps is in the variance already."""
    mean, inverse_std = (t.to(accumulator(x.dtype)) for t in saved)
    return mean, inverse_std**-2, 0.0


def _copied(running: Running, x: Tensor) -> tuple[Tensor, Tensor]:
    """The running statistics in the accumulator's dtype, for the layer may have moved on by the backward."""
    mean, var = running
    assert mean is not None and var is not None
    dtype = accumulator(x.dtype)
    return mean.to(dtype, copy=True), var.to(dtype, copy=True)


def _momentum(layer: nn.modules.batchnorm._BatchNorm) -> float:
    """The weight of this batch in the running statistics, counted; without a momentum all batches weigh the same."""
    if not (layer.training and layer.track_running_stats and layer.num_batches_tracked is not None):
        return layer.momentum or 0.0
    layer.num_batches_tracked.add_(1)
    return 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
