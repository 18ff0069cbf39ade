"""Networks and data for FILE.py:FUNCTION that a job must refuse."""

from pathlib import Path

import torch
from torch import nn

from tests import tiny_job

FILE = Path(__file__)


class Wrapped(nn.Module):
    """A network for 10 classes whose logits come as ``wrap`` makes them."""

    def __init__(self, wrap):
        super().__init__()
        self.network, self.wrap = tiny_job.build(10), wrap

    def forward(self, images):
        return self.wrap(self.network(images))


def two_outputs():
    return tiny_job.build(2)


def many_outputs():
    return tiny_job.build(1000)


def in_a_tuple():
    return Wrapped(lambda logits: (logits, logits))


def in_a_dict():
    return Wrapped(lambda logits: {"logits": logits})


def for_large_images():
    return nn.Sequential(nn.Conv2d(3, 4, 9), nn.Flatten(), nn.Linear(4, 10))


def mistaken():
    return Wrapped(lambda logits: {}["logits"])


class Named(list):
    classes = ("no", "yes")


def label_beyond():
    return Named([(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 3, 0]))]), [(torch.rand(1, 3, 8, 8), torch.tensor([1]))]


def label_below():
    return [(torch.rand(4, 3, 8, 8), torch.tensor([0, -1, 1, 0]))], []


def labels_of_shares():
    return [(torch.rand(4, 3, 8, 8), torch.rand(4, 2))], []
