"""A small residual network in plain PyTorch, for 8x8 images: nothing in it knows about scoring or pruning."""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256)
BLOCKS = 2
CLASSES = 10


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, [N, inputs, H, W] to [N, outputs, H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages, inputs = [], widths[0]
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stages.append(Block(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))
