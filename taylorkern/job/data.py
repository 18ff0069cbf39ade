"""Data of a job: classes, and minibatches for training from any step on and for measuring."""

from collections.abc import Collection, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from taylorkern.errors import CommandError, listing
from taylorkern.resolve import resolve

from . import folder, images, randomness
from .checks import check_labels
from .loader import ImageFiles, Minibatch, Order, loader
from .settings import Settings


class Data(Protocol):
    """``per_epoch`` minibatches make an epoch; ``counts`` are the images of "train" and "val"."""

    classes: list[str]
    per_epoch: int
    counts: dict[str, int]
    digest: str
    warnings: tuple[str, ...]
    batch: int  # images in a minibatch, but for one that lacks some

    def unmeasured(self, skipped: Collection[str]) -> list[str]:
        """Warnings of classes of which no held-out image is left without the files ``skipped``."""

    def train(self, start: int) -> Iterator[Minibatch]:
        """Minibatches for ever, the first being that of step ``start``."""

    def val(self, most: int | None = None) -> Iterator[Minibatch]:
        """The held-out images, of about ``most`` of them where that is given."""

    def ready(self, batch: Tensor) -> Tensor:
        """What the network is given."""

    def shape(self) -> torch.Size:
        """Of one image, as the network is given it."""


def open_data(settings: Settings) -> Data:
    """The data that ``settings.data`` names: a folder of images, or FILE.py:FUNCTION.

    Raises CommandError or ResolveError where there is none.
    """
    return OfFunction(settings) if ".py:" in settings.data else OfFolder(settings)


class OfFolder:
    """Images in folders of classes."""

    def __init__(self, settings: Settings) -> None:
        images.check_pillow()
        found = folder.look(Path(settings.data), settings.val_share)
        augment = settings.seed if settings.augment else None
        self._train = ImageFiles(found.root, found.train, settings.size, augment)
        self._val = ImageFiles(found.root, found.val, settings.size)
        self.batch, self._seed, self._workers = min(settings.batch, len(found.train)), settings.seed, settings.workers
        self.classes, self.digest, self.warnings = list(found.classes), found.digest, found.warnings
        self.per_epoch = len(found.train) // self.batch
        self.counts = {"train": len(found.train), "val": len(found.val)}

    def unmeasured(self, skipped: Collection[str]) -> list[str]:
        held = {label for _, label in self._val.files}
        lost = sorted(held - {label for file, label in self._val.files if file not in skipped})
        names = listing([self.classes[label] for label in lost])
        return [f"no held-out image of {names} can be read: accuracy says nothing about it"] if lost else []

    def train(self, start: int) -> Iterator[Minibatch]:
        order = Order(len(self._train), self.batch, self._seed, start)
        return iter(loader(self._train, order, self._workers))

    def val(self, most: int | None = None) -> Iterator[Minibatch]:
        stride = 1 if most is None else max(1, -(-len(self._val) // most))
        places = [(0, index) for index in range(0, len(self._val), stride)]
        batches = [places[at : at + self.batch] for at in range(0, len(places), self.batch)]
        return iter(loader(self._val, batches, self._workers))

    def ready(self, batch: Tensor) -> Tensor:
        return images.normalised(batch)

    def shape(self) -> torch.Size:
        return torch.Size([3, self._train.size, self._train.size])


class OfFunction:
    """What the user's function returns: (train, val), two iterables of (images, labels) that start anew each time.

    Before every epoch, Python's, numpy's and torch's global random numbers are seeded by its number, and so are the
    generators of a DataLoader and its samplers, so that one that shuffles by them has the same order again when the run
    goes on; what it draws from other sources is its own affair.
    """

    digest = ""
    warnings: tuple[str, ...] = ()

    def __init__(self, settings: Settings) -> None:
        self._named, self._seed = settings.data, settings.seed
        pair = resolve(settings.data)(settings.seed)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise CommandError(f"--data {settings.data} must return (train, val); it gave a {type(pair).__name__}")
        self._train, self._val = pair
        with randomness.kept():
            looked = {name: self._look(each, name) for name, each in (("train", self._train), ("val", self._val))}
        self.per_epoch, images_train, highest, self._shape = looked["train"]
        self.batch = -(-images_train // self.per_epoch)
        self.counts = {"train": images_train, "val": looked["val"][1]}
        own = getattr(self._train, "classes", None) or getattr(getattr(self._train, "dataset", None), "classes", None)
        highest = max(highest, looked["val"][2])
        self.classes = [str(name) for name in own or range(1 + highest)]
        if highest >= len(self.classes):
            raise CommandError(f"--data {settings.data} has the label {highest} and {len(self.classes)} classes")

    def unmeasured(self, skipped: Collection[str]) -> list[str]:
        return []

    def train(self, start: int) -> Iterator[Minibatch]:
        first, skip = divmod(start, self.per_epoch)
        for epoch in count(first):
            batches = self._epoch(epoch, skip)
            for place in range(skip, self.per_epoch):
                if (pair := next(batches, None)) is None:
                    told = f"epoch {epoch} ended after {place} of {self.per_epoch} minibatches"
                    raise CommandError(f"{self._named}: {told}; every epoch needs as many as the first")
                yield Minibatch(pair[0], pair[1], [])
            skip = 0

    def val(self, most: int | None = None) -> Iterator[Minibatch]:
        seen = 0
        randomness.seed_generators(self._val, self._seed, 0)
        for batch, labels in self._val:
            yield Minibatch(batch, labels, [])
            seen += len(labels)
            if most is not None and seen >= most:
                return

    def ready(self, batch: Tensor) -> Tensor:
        return batch

    def shape(self) -> torch.Size:
        return self._shape

    def _epoch(self, epoch: int, skip: int) -> Iterator[Any]:
        """An epoch's minibatches after the first ``skip``, which leave no trace in the random numbers."""
        if not skip:
            self._seed_all(epoch)
            return iter(self._train)
        with randomness.kept():
            self._seed_all(epoch)
            batches = iter(self._train)
            for _ in islice(batches, skip):
                pass
        return batches

    def _seed_all(self, epoch: int) -> None:
        randomness.seed(self._seed, epoch)
        randomness.seed_generators(self._train, self._seed, epoch)

    def _look(self, batches: Iterable[Any], name: str) -> tuple[int, int, int, torch.Size]:
        """One pass: minibatches, images, the highest label, the shape of an image."""
        minibatches, found, highest, shape = 0, 0, -1, torch.Size()
        for pair in batches:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
                raise CommandError(f"{self._named}: {name} must give (images, labels), two tensors each time")
            check_labels(f"{self._named}: {name}", pair[1])
            minibatches, found = minibatches + 1, found + len(pair[1])
            highest, shape = max(highest, int(pair[1].max())), pair[0].shape[1:]
        if not minibatches or iter(batches) is batches:
            raise CommandError(f"{self._named}: {name} must hold minibatches, and be iterable again and again")
        return minibatches, found, highest, shape
