"""Module attributes that repeat a size of the module's weights, brought into line with them."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def fit_attributes(model: nn.Module) -> None:
    """Set ``out_channels``, ``in_channels``, ``groups``, ``in_features``, ``num_features`` … from the weights' shapes.

    >>> layer = nn.Linear(4, 3)
    >>> layer.weight.data = layer.weight.data[:2]
    >>> fit_attributes(layer); layer
    Linear(in_features=4, out_features=2, bias=True)
    """
    for module, attribute, value in changes(model):
        setattr(module, attribute, value)


def changes(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The attributes that do not fit their module's weights, with the values that would."""
    return [
        (module, attribute, value)
        for module in model.modules()
        for kind, sizes in _SIZES.items()
        if isinstance(module, kind)
        for attribute, value in sizes(module).items()
        if getattr(module, attribute) != value
    ]


def fitted(module: nn.Module) -> bool:
    """Whether all sizes that ``module`` keeps are those of its weights.

    >>> fitted(nn.Linear(4, 3)), fitted(nn.ChannelShuffle(2))
    (True, False)
    """
    return isinstance(module, tuple(_SIZES)) and not isinstance(module, nn.MultiheadAttention)  # which has heads


def _convolution(layer: Any) -> dict[str, int]:
    """A dense layer's weight holds both widths; a grouped one's holds the width within a group, which never changes."""
    transposed = isinstance(layer, _ConvTransposeNd)
    across, within = layer.weight.shape[:2]
    before = layer.in_channels if transposed else layer.out_channels
    groups = across // (before // layer.groups) if layer.groups > 1 else 1
    ins, outs = (across, within * groups) if transposed else (within * groups, across)
    return {"in_channels": ins, "out_channels": outs, "groups": groups}


def _linear(layer: Any) -> dict[str, int]:
    return {"out_features": layer.weight.shape[0], "in_features": layer.weight.shape[1]}


def _features(layer: Any) -> dict[str, int]:
    sized = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
    return {} if sized is None else {"num_features": len(sized)}


def _attention(layer: Any) -> dict[str, int]:
    """What comes in; how many heads there are can't be seen from the weights."""
    packed = layer.in_proj_weight
    weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight) if packed is None else (packed,) * 3
    return {name: w.shape[1] for name, w in zip(("embed_dim", "kdim", "vdim"), weights, strict=True)}


def _width(attribute: str) -> Callable[[Any], dict[str, int]]:
    return lambda layer: {} if layer.weight is None else {attribute: len(layer.weight)}


_SIZES: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _features,
    nn.MultiheadAttention: _attention,
    nn.RNNBase: lambda layer: {"input_size": layer.weight_ih_l0.shape[1]},
    nn.PReLU: _width("num_parameters"),
    nn.GroupNorm: _width("num_channels"),
    nn.Embedding: lambda layer: {"num_embeddings": layer.weight.shape[0], "embedding_dim": layer.weight.shape[1]},
    nn.LayerNorm: lambda layer: {} if layer.weight is None else {"normalized_shape": tuple(layer.weight.shape)},
}
