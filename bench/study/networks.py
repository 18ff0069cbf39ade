"""The study's networks for images [N, 1, 8, 8]: a residual, a plain and a densely connected one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorkern.demo.network import DigitsNet

CLASSES = 10


def residual() -> nn.Module:
    """The demo's network, thinner: three stages of one block, batch normalisation, shortcuts."""
    return DigitsNet(widths=(16, 32, 48), blocks=1)


def plain() -> nn.Module:
    """In the manner of LeNet: convolutions and pooling, a hidden linear layer, biases, no normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


class Dense(nn.Module):
    """In the manner of DenseNet: each layer normalises and reads the outputs of all before it in its block."""

    def __init__(self, growth: int = 8, bottleneck: int = 16, layers: tuple[int, ...] = (3, 3)) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for block, count in enumerate(layers):
            if block:
                thinner = [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False)]
                self.transitions.append(nn.Sequential(*thinner, nn.AvgPool2d(2)))
                width //= 2
            self.blocks.append(
                nn.ModuleList(_dense_layer(width + i * growth, bottleneck, growth) for i in range(count))
            )
            width += count * growth
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, layers in enumerate(self.blocks):
            if block:
                x = self.transitions[block - 1](x)
            for layer in layers:
                x = torch.cat([x, layer(x)], 1)
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


def _dense_layer(inputs: int, bottleneck: int, growth: int) -> nn.Module:
    narrow = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, bottleneck, 1, bias=False)]
    grow = [nn.BatchNorm2d(bottleneck), nn.ReLU(), nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False)]
    return nn.Sequential(*narrow, *grow)


# The layer that "one layer" is cut in: one in the middle of each network.
LAYER = {"residual": "blocks.1.bn1", "plain": "5", "dense": "blocks.1.1.3"}
NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual": residual, "plain": plain, "dense": Dense}
