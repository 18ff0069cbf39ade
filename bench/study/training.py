"""Trained networks: one run per architecture and seed, with a copy kept at each stage."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorkern.demo.data import Digits, minibatches

from .networks import NETWORKS

BATCH = 64


def train(model: nn.Module, data: Digits, steps: int, rate: float, seed: int) -> None:
    """``steps`` minibatches of shifted training images by SGD at a constant rate, in training mode."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    stream = minibatches(data, BATCH, torch.Generator().manual_seed(seed))
    model.train()
    for _ in range(steps):
        images, labels = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def stages(network: str, data: Digits, steps: dict[str, int], rate: float, seed: int) -> dict[str, nn.Module]:
    """The network after each number of ``steps`` of one training, in evaluation mode."""
    torch.manual_seed(seed)
    model, done, kept = NETWORKS[network](), 0, {}
    for stage, target in steps.items():
        train(model, data, target - done, rate, seed=1000 * seed + done)
        kept[stage], done = copy.deepcopy(model).eval(), target
    return kept


def fixed_batches(data: Digits, count: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """``count`` minibatches of ``size`` training images as they are, none twice."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    chosen = order[: count * size].split(size)
    return [(data.train_images[batch], data.train_labels[batch]) for batch in chosen]
