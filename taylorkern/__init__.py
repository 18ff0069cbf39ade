"""Which channels of a network matter, scored while it trains, and the rest cut. Importing compiles nothing."""

from . import backends as _backends  # noqa: F401  registers the operations' implementations
from ._version import __version__
from .attention import MultiheadAttention
from .autograd import InplaceError
from .checkpoints import Checkpoints
from .coupling import couple
from .layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    RMSNorm,
    convert,
    revert,
)
from .oneshot import prune
from .oracle import oracle
from .pruner import Pruner
from .scores import Scores
from .store import StoreError, load, save
from .surgery import SurgeryError

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Checkpoints",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "GroupNorm",
    "InplaceError",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "Pruner",
    "RMSNorm",
    "Scores",
    "StoreError",
    "SurgeryError",
    "__version__",
    "convert",
    "couple",
    "load",
    "oracle",
    "prune",
    "revert",
    "save",
]
