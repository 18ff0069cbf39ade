"""What the examples train: a small network, on the same minibatches of handwritten digits in every loop."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCH, STEPS = 32, 24
PRUNING = {"target": 0.4, "of": "flops", "every": 4, "step": 4}


class Network(nn.Module):
    """Three convolutions and a classifier; with labels it returns the loss as well, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.classifier = nn.Linear(16, 10)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        logits = self.classifier(F.relu(self.bn3(self.conv3(x))).mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def samples() -> list[dict[str, Tensor]]:
    """``BATCH * STEPS`` images [1, 8, 8] with their labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    pairs = zip(images, torch.from_numpy(labels), strict=True)
    return [{"images": image, "labels": label} for image, label in pairs][: BATCH * STEPS]


def minibatches() -> DataLoader:
    return DataLoader(samples(), BATCH)


def example() -> dict[str, Tensor]:
    return {"images": torch.zeros(1, 1, 8, 8)}
