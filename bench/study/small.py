"""A network small enough for its full gate Hessian: four convolutions, with or without normalisation and a skip."""

import copy
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorkern.demo.data import Digits, minibatches

WIDTHS = (16, 24)
CLASSES = 10
TRAINING_BATCH = 64
RATE = 0.05


class SmallNet(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]; ``widths`` are of the first and third, and of the second and fourth layer.

    The skip adds the first layer's output to the third's, so that their channels go together in pairs: 64 units, 16 of
    them of two channels, where there are 80 without it.
    """

    def __init__(self, batch_norm: bool, skip: bool, widths: tuple[int, int] = WIDTHS) -> None:
        super().__init__()
        self.skip = skip
        outer, inner = widths
        self.layer1 = _layer(1, outer, batch_norm)
        self.layer2 = _layer(outer, inner, batch_norm)
        self.layer3 = _layer(inner, outer, batch_norm)
        self.layer4 = _layer(outer, inner, batch_norm)
        self.classifier = nn.Linear(inner, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.layer1(images)), 2)
        y = self.layer3(F.relu(self.layer2(x)))
        y = F.relu(y + x if self.skip else y)
        return self.classifier(F.relu(self.layer4(y)).mean((2, 3)))


def _layer(inputs: int, outputs: int, batch_norm: bool) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs)) if batch_norm else convolution


def trained(data: Digits, model: SmallNet, stages: Mapping[str, int], seed: int) -> Iterator[tuple[str, nn.Module]]:
    """``model`` in training: a copy, in float64 and evaluation mode, after as many minibatches as each stage says."""
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    batches = minibatches(data, TRAINING_BATCH, torch.Generator().manual_seed(seed))
    done = 0
    for stage, steps in sorted(stages.items(), key=lambda item: item[1]):
        for images, labels in (next(batches) for _ in range(steps - done)):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
        done = steps
        yield stage, copy.deepcopy(model).double().eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return float((model(images.double()).argmax(1) == labels).double().mean())
