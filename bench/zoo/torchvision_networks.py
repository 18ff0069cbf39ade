"""torchvision's networks: all for classification, and a choice for other tasks."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from taylorkern.companion import torchvision

from .networks import Network
from .randomness import randomise, settle, strengthen

# Smaller than usual where the architecture allows.
SIZES = {"inception_v3": 299, "googlenet": 224, "maxvit_t": 224, "vit_h_14": 56}
ARGUMENTS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
DEFAULT_SIZE = 64
# Those whose outputs are not a fixed number of boxes are taken up to their features, which are what is cut.
BACKBONES = [
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
    "ssd300_vgg16",
]
FRAMES = {"s3d": (16, 224)}  # frames and their size, where its own strides allow no less than this
DEFAULT_FRAMES = (4, DEFAULT_SIZE)


def networks() -> list[str]:
    models = torchvision().models
    return models.list_models(module=models)


def build(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """The classification network in float64, and a batch of two for it."""
    torch.manual_seed(seed)
    size = SIZES.get(name, DEFAULT_SIZE)
    arguments = {"image_size": size} if name.startswith("vit") else ARGUMENTS.get(name, {})
    model = torchvision().models.get_model(name, weights=None, **arguments).double()
    return randomise(model), _images(2, 3, size, size)


def classification(name: str, seed: int) -> Network:
    model, x = build(name, seed)
    return Network(settle(model, x), torch.randn_like(x[:1]), x)


def beyond() -> list[str]:
    return _segmentation() + _video() + BACKBONES


def build_beyond(name: str, seed: int) -> Network:
    """A network for segmentation or video, or a detector's backbone."""
    torch.manual_seed(seed)
    video = name in _video()
    model = _of_video(name) if video else torchvision().models.get_model(name, weights=None, weights_backbone=None)
    model = model.backbone if name in BACKBONES else model
    frames, size = FRAMES.get(name, DEFAULT_FRAMES)
    shape = (frames, size, size) if video else _plane(name)
    model = strengthen(randomise(model.double()))
    inputs = _images(2, 3, *shape)
    return Network(settle(model, inputs), _images(1, 3, *shape), inputs)


def _segmentation() -> list[str]:
    models = torchvision().models
    return models.list_models(module=models.segmentation)


def _video() -> list[str]:
    models = torchvision().models
    return models.list_models(module=models.video)


def _of_video(name: str) -> nn.Module:
    """The MViTs have embeddings of positions for one size, which their constructors do not let one choose."""
    video = torchvision().models.video
    (frames, size), of_any_size = DEFAULT_FRAMES, video.mvit.MViT

    def small(**arguments: Any) -> nn.Module:
        return of_any_size(**{**arguments, "spatial_size": (size, size), "temporal_size": frames})

    with patch.object(video.mvit, "MViT", small):
        return torchvision().models.get_model(name, weights=None)


def _plane(name: str) -> tuple[int, int]:
    """Height and width."""
    return (300, 300) if name.startswith("ssd300") else (64, 96)


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
