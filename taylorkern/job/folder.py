"""A folder of images: which files there are, of which class, for training or held out."""

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taylorkern.errors import CommandError, listing

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
HELD_OUT = ("val", "validation", "test")


@dataclass(frozen=True)
class Folder:
    """Images as (file below ``root``, number of its class), and what is odd about them."""

    root: Path
    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    val: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of all names: another one means that files came, went or changed places."""
        return hashlib.sha256(repr((self.classes, self.train, self.val)).encode(errors="surrogateescape")).hexdigest()


def look(root: Path, share: float) -> Folder:
    """The images of ``root``: train/CLASS/* and val/CLASS/* (validation/ or test/), or CLASS/* and a part held out.

    Of CLASS/*, ``share`` of each class is held out, the same files every time and at least one where there are two.
    Classes are sorted by name; files that are no images by their ending, and hidden ones, don't count.

    Raises CommandError where there is no such folder, no image, a class without images or one in validation alone. A
    class without held-out images is a warning.
    """
    if not root.is_dir():
        raise CommandError(f"--data {root}: there is no such folder")
    if not 0 < share < 1:
        raise CommandError(f"--val-share {share} must be between 0 and 1")
    held = [root / name for name in HELD_OUT if (root / name).is_dir()]
    split = (root / "train").is_dir()
    if split and not held:
        raise CommandError(f"{root} has train/ but no val/, validation/ or test/: put held-out images into val/CLASS/")
    train = _by_class(root, root / "train" if split else root)
    _check_classes(root, train)
    val = _by_class(root, held[0]) if split else {name: _drawn(name, files, share) for name, files in train.items()}
    _check_held(root, train, val)
    if not split:
        train = {name: [file for file in files if file not in set(val[name])] for name, files in train.items()}
    classes = tuple(train)
    bare = [name for name in classes if not val.get(name)]
    warnings = (f"no image is held out of {listing(bare)}: accuracy says nothing about it",) if bare else ()
    return Folder(root, classes, _numbered(classes, train), _numbered(classes, val), warnings)


def _by_class(root: Path, folder: Path) -> dict[str, list[str]]:
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    return {name: _images(root, folder / name) for name in classes}


def _images(root: Path, folder: Path) -> list[str]:
    found = []
    for where, folders, files in os.walk(folder):
        folders.sort()
        shown = (name for name in sorted(files) if not name.startswith("."))
        found += [
            os.path.relpath(os.path.join(where, name), root)
            for name in shown
            if os.path.splitext(name)[1].lower() in ENDINGS
        ]
    return found


def _drawn(name: str, files: list[str], share: float) -> list[str]:
    """The held-out files of one class: the same whatever the run's seed, so that runs can be compared."""
    most = min(max(1, round(share * len(files))), len(files) - 1)
    return sorted(random.Random(f"held out of {name}").sample(files, most))


def _check_classes(root: Path, train: Mapping[str, list[str]]) -> None:
    if not any(train.values()):
        raise CommandError(
            f"--data {root} has no image: put them into train/CLASS/ and val/CLASS/, or CLASS/ "
            f"(endings {' '.join(sorted(ENDINGS))})"
        )
    empty = [name for name, files in train.items() if not files]
    if empty:
        raise CommandError(f"{root}: no image of class {listing(empty)}; add some, or remove the folder")
    if len(train) < 2:
        raise CommandError(f"{root} has one class alone ({next(iter(train))}); there is nothing to tell apart")


def _check_held(root: Path, train: Mapping[str, list[str]], val: Mapping[str, list[str]]) -> None:
    foreign = [name for name, files in val.items() if files and name not in train]
    if foreign:
        raise CommandError(f"{root}: class {listing(foreign)} is in validation and not in train/; move or remove it")
    if not any(val.values()):
        raise CommandError(f"{root} has no held-out image; put some into val/CLASS/, or at least two into each CLASS/")


def _numbered(classes: tuple[str, ...], files: Mapping[str, list[str]]) -> tuple[tuple[str, int], ...]:
    return tuple((file, number) for number, name in enumerate(classes) for file in files.get(name, []))
