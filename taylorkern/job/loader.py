"""Minibatches of a folder's images, each a function of (seed, step) alone, so that a run can go on anywhere."""

import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import images

Place = tuple[int, int]  # epoch, number of the image


class Skip(NamedTuple):
    """A file that was left out."""

    file: str
    why: str


class Minibatch(NamedTuple):
    """Images [N, ...] and labels [N]; N is smaller where files were left out."""

    images: Tensor
    labels: Tensor
    skipped: list[Skip]


class ImageFiles(Dataset):
    """Files below ``root``, with labels; by (epoch, index), so that random changes depend on nothing else."""

    def __init__(self, root: Path, files: Sequence[tuple[str, int]], size: int, augment: int | None = None) -> None:
        self.root, self.files, self.size, self.augment = root, files, size, augment

    def __getitem__(self, place: Place) -> tuple[Tensor, int] | Skip:
        epoch, index = place
        file, label = self.files[index]
        try:
            image = images.read(self.root / file, self.size)
        except images.UnreadableError as error:
            return Skip(file, str(error))
        if self.augment is not None:
            image = images.altered(image, random.Random(f"{self.augment} {epoch} {index}"))
        return image, label

    def __len__(self) -> int:
        return len(self.files)

    def collate(self, items: Sequence[tuple[Tensor, int] | Skip]) -> Minibatch:
        """One minibatch of what was readable, [0, 3, S, S] where nothing was."""
        skipped = [item for item in items if isinstance(item, Skip)]
        pairs = [item for item in items if not isinstance(item, Skip)]
        empty = torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        stacked = torch.stack([image for image, _ in pairs]) if pairs else empty
        return Minibatch(stacked, torch.tensor([label for _, label in pairs], dtype=torch.int64), skipped)


class Order(Sampler[list[Place]]):
    """Minibatches for ever from ``start`` on, every epoch in an order of its own, the incomplete last one left out."""

    def __init__(self, files: int, batch: int, seed: int, start: int) -> None:
        self.files, self.batch, self.seed, self.start = files, batch, seed, start

    def __iter__(self) -> Iterator[list[Place]]:
        shuffled, order = -1, list[int]()
        for step in count(self.start):
            epoch, place = divmod(step, self.files // self.batch)
            if epoch != shuffled:
                shuffled, order = epoch, permutation(self.files, self.seed, epoch)
            yield [(epoch, index) for index in order[place * self.batch :][: self.batch]]


def permutation(length: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch.

    >>> permutation(3, 0, 5) == permutation(3, 0, 5), sorted(permutation(3, 0, 5))
    (True, [0, 1, 2])
    """
    bits = random.Random(f"order {seed} {epoch}").getrandbits(63)
    return torch.randperm(length, generator=torch.Generator().manual_seed(bits)).tolist()


def loader(files: ImageFiles, order: Sampler[list[Place]] | list[list[Place]], workers: int) -> DataLoader:
    """Reads ``order`` in so many processes, each of one thread; draws nothing of the global random numbers."""
    return DataLoader(
        files, batch_sampler=order, num_workers=workers, collate_fn=files.collate, generator=torch.Generator()
    )  # fmt: skip
