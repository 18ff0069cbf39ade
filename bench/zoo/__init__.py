"""Networks of torchvision, timm and transformers, cut at random and compared with their masked dense selves."""

from taylorkern.companion import torchvision

from .comparison import draw, error, masked, outputs
from .examination import Row, examine
from .torchvision_networks import build, networks

__all__ = ["Row", "build", "draw", "error", "examine", "masked", "networks", "outputs", "torchvision"]
