"""The families of networks, by name."""

from . import timm_networks, torchvision_networks, transformers_networks
from .networks import Family

FAMILIES = {
    "torchvision": Family(
        torchvision_networks.networks,
        torchvision_networks.classification,
        "torchvision",
        lambda: "Every classification network that torchvision lists.",
    ),
    "torchvision-beyond": Family(
        torchvision_networks.beyond,
        torchvision_networks.build_beyond,
        "torchvision",
        lambda: (
            "Every network for segmentation and for video, and the backbones of detectors: how many boxes a detector "
            "gives depends on comparisons of every number before."
        ),
    ),
    "timm": Family(timm_networks.networks, timm_networks.build, "timm", timm_networks.about),
    "transformers": Family(
        transformers_networks.networks,
        transformers_networks.build,
        "transformers",
        lambda: "A choice of architectures, each from a small configuration of odd sizes and with random weights.",
    ),
}
