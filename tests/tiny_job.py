"""A pruning job that takes a second: a folder of small digits, and a network and data for FILE.py:FUNCTION."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from taylorkern.job.settings import Settings
from tests import digits_folder

FILE = Path(__file__)


def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes),
    )  # fmt: skip


def batches(generator=None, size=8):
    """Shuffled by torch's global random numbers."""
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = (images.mean((1, 2, 3)) > 0.5).long()
    return _shuffled(images, labels, generator, size), [(images[:9], labels[:9])]


def own_batches():
    """Shuffled by a generator of their own."""
    return batches(torch.Generator())


def single_images():
    """Minibatches of one."""
    return batches(size=1)


def _shuffled(images, labels, generator, size):
    return DataLoader(TensorDataset(images, labels), batch_size=size, shuffle=True, generator=generator)


def folder(path, per_class=10):
    digits_folder.write(path, size=8, per_class=per_class)
    return path


def settings(data, out, **others):
    """8 steps of training, some rounds of pruning and 8 steps of fine-tuning on :func:`folder`'s 80 images."""
    given = {"size": 8, "batch": 10, "workers": 0, "every": 2, "epochs": 1, "finetune_epochs": 1, "checkpoint_every": 3}
    return Settings(**{"model": f"{FILE}:build", "data": str(data), "out": str(out), **given, **others})
