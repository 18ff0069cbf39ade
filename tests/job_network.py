"""The tiny network that the tests of ``taylorkern prune`` train and cut: it names this file."""

from torch import Tensor, nn


class Tiny(nn.Module):
    """A convolution, two that are added, a hidden layer behind dropout: linked units, free ones, and random numbers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12))
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1))
        self.classes = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        return self.classes(self.head(self.down(stem + self.inner(stem))))


def build(classes: int) -> nn.Module:
    return Tiny(classes)
