"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, one third of them held out."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SPLIT_SEED = 20190618  # the same images are held out whatever the run's seed
HELD_OUT = 1 / 3


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8], normalised by the training images' mean and deviation, and labels [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order.tensor_split([round(len(labels) * HELD_OUT)])
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], labels[train], images[test], labels[test])


def minibatches(data: Digits, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Training minibatches for ever: shuffled anew each epoch, each image shifted by up to one pixel."""
    while True:
        order = torch.randperm(len(data.train_labels), generator=generator)
        for chosen in order.split(size):
            if len(chosen) == size:
                yield shifted(data.train_images[chosen], generator), data.train_labels[chosen]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [1, H, W] of [N, 1, H, W] moved by -1, 0 or 1 pixel each way; the background fills in."""
    samples, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))[:, 0]
    down, right = torch.randint(0, 3, (2, samples, 1), generator=generator)
    rows = (down + torch.arange(height)).unsqueeze(2)  # [N, H, 1]
    columns = (right + torch.arange(width)).unsqueeze(1)  # [N, 1, W]
    return padded[torch.arange(samples)[:, None, None], rows, columns].unsqueeze(1)
