"""The networks and minibatches whose training steps are timed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.zoo import torchvision

Run = Callable[[], None]


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def tiny(classes: int) -> nn.Module:
    """A stem and a residual block as torchvision writes them, for trying the bench itself."""
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), TinyBlock(8)]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


@dataclass(frozen=True)
class Workload:
    """One network's minibatch: the same weights, images and labels each time they are asked for."""

    network: str
    size: int
    batch: int
    classes: int
    layout: str = "channels_last"
    dtype: torch.dtype = torch.float32
    training: bool = True
    compiler: str = ""  # torch.compile's backend, or none
    pairs: int = 15
    seed: int = 0
    device: str = "cpu"
    autocast: torch.dtype | None = None  # forwards run under torch.autocast to this dtype

    def __str__(self) -> str:
        return f"{self.network}-{self.layout}"

    def double(self) -> "Workload":
        return replace(self, dtype=torch.float64)

    def compiled(self, backend: str) -> "Workload":
        return replace(self, compiler=backend)

    def small(self) -> "Workload":
        """On images of 32x32 at most: in float64 most of torch's convolutions are slow."""
        return replace(self, size=min(self.size, 32))

    def seeded(self, seed: int) -> "Workload":
        """With other weights, images and labels."""
        return replace(self, seed=seed)

    def evaluating(self) -> "Workload":
        """With the running statistics in place of the batch's."""
        return replace(self, training=False)

    @property
    def subject(self) -> dict[str, object]:
        return {"network": self.network, "size": self.size, "batch": self.batch, "layout": self.layout}

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = tiny(self.classes) if self.network == "tiny" else _by_torchvision(self.network, self.classes)
        model = model.to(self.device, self.dtype).train(self.training)
        if self.layout == "channels_last":
            return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def images(self) -> Tensor:
        """[N, 3, size, size]."""
        shape = (self.batch, 3, self.size, self.size)
        x = torch.randn(shape, generator=self._generator(1), device=self.device).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else x

    def labels(self) -> Tensor:
        return torch.randint(self.classes, (self.batch,), generator=self._generator(2), device=self.device)

    def _generator(self, of: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed + of)

    def precision(self) -> AbstractContextManager[object]:
        """What a forward runs under."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device, dtype=self.autocast)

    def step(self, model: nn.Module, weights: list[nn.Parameter], behind: Run | None = None) -> Run:
        """One training step; ``behind`` runs between backward and the optimiser's step."""
        x, target = self.images(), self.labels()
        forward = torch.compile(model, backend=self.compiler) if self.compiler else model
        optimizer = torch.optim.SGD(weights, 1e-4, momentum=0.9)

        def run() -> None:
            with self.precision():
                loss = nn.functional.cross_entropy(forward(x), target)
            loss.backward()
            if behind:
                behind()
            optimizer.step()
            optimizer.zero_grad()  # here, so that between steps no gradient is held

        return run


def _by_torchvision(network: str, classes: int) -> nn.Module:
    return torchvision().models.get_model(network, weights=None, num_classes=classes)


WHOLE = [
    Workload(network, size, batch, classes, layout, pairs=pairs)
    for network, size, batch, classes, pairs in (
        ("resnet18", 32, 64, 10, 21),
        ("resnet50", 224, 8, 1000, 15),
        ("mobilenet_v2", 224, 8, 1000, 15),
    )
    for layout in ("channels_last", "contiguous")
]
QUICK = [Workload("tiny", 8, 4, 5, layout) for layout in ("channels_last", "contiguous")]
