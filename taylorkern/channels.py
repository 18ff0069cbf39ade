"""Where a layer's output has its channels, for torch's layers and their subclasses. Looks at modules, changes none."""

import sys

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

BEHIND_BATCH = (_BatchNorm, nn.GroupNorm)  # [N, C, *S], never without N
OVER_LAST = (nn.LayerNorm, nn.RMSNorm)
WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "nf")


def channel_dim(module: nn.Module, output: Tensor) -> int:
    """Which dimension of ``output``, which a gateable layer or a subclass of one has made, holds its channels.

    1 for normalisations over a batch or over groups, the last for linear layers, embeddings, attention (of its heads,
    before they are projected), ``LayerNorm`` and ``RMSNorm``; a subclass of these two that keeps images' channels
    second (a name with "2d", as in torchvision and timm, or ``data_format="channels_first"``) has 1 too.

    >>> import torch
    >>> channel_dim(nn.Conv2d(3, 8, 1), torch.zeros(8, 5, 5)), channel_dim(nn.Linear(4, 2), torch.zeros(3, 6, 2))
    (0, 2)
    """
    if isinstance(module, _ConvNd):
        return output.dim() - sample_dims(module)
    return 1 if _second(module) else output.dim() - 1


def sample_dims(module: nn.Module) -> int:
    """How many dimensions one sample's output has: an output with no more is a batch of one; 0 where none may be.

    >>> sample_dims(nn.Conv2d(3, 8, 1)), sample_dims(nn.Linear(4, 2)), sample_dims(nn.BatchNorm2d(3))
    (3, 1, 0)
    """
    if isinstance(module, _ConvNd):
        return len(module.kernel_size) + 1
    if _second(module):
        return 0
    return len(module.normalized_shape) if isinstance(module, OVER_LAST) else 1


def width(module: nn.Module) -> int:
    """How many channels a gateable layer's output has, or an attention's heads together.

    Raises ValueError where ``module`` says nothing about it.

    >>> width(nn.GroupNorm(2, 6)), width(nn.Embedding(10, 4)), width(nn.MultiheadAttention(8, 2))
    (6, 4, 8)
    """
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads * module.head_dim
    if isinstance(module, OVER_LAST):
        return module.normalized_shape[-1]
    for attribute in WIDTHS:
        if isinstance(found := getattr(module, attribute, None), int):
            return found
    raise ValueError(f"{type(module).__name__} has no known number of output channels")


def transposed_linear() -> tuple[type[nn.Module], ...]:
    """transformers' ``Conv1D``, a linear layer of GPT-2's, where that package has been imported."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if found is None else (found,)


def _second(module: nn.Module) -> bool:
    """Whether the channels come second whatever follows."""
    images = "2d" in type(module).__name__ or getattr(module, "data_format", "") == "channels_first"
    return isinstance(module, BEHIND_BATCH) or (isinstance(module, OVER_LAST) and images)
