"""A folder of images: which files there are, of which class, for training or held out."""

import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from taylorkern.errors import CommandError, listing

ENDINGS = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
UNREAD = {
    ".avif",
    ".cr2",
    ".dng",
    ".exr",
    ".hdr",
    ".heic",
    ".heif",
    ".ico",
    ".j2k",
    ".jp2",
    ".jpe",
    ".jxl",
    ".nef",
    ".npy",
    ".pbm",
    ".pnm",
    ".psd",
    ".raw",
    ".svg",
    ".tga",
}  # images by their ending, that are left out
TRAIN = ("train", "training")
HELD_OUT = ("val", "validation", "valid", "test", "testing")  # the first that is there


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
    """The images of ``root``: train/CLASS/* and val/CLASS/* (or others of ``TRAIN`` and ``HELD_OUT``, in capitals or
    not), or CLASS/* and a part held out. Links are followed.

    Of CLASS/*, ``share`` of each class is held out, the same files every time and at least one where there are two.
    Classes are sorted by name; files that are no images by their ending, and hidden ones, don't count.

    Raises CommandError where there is no such folder, no image, a class without images or one in validation alone, or
    the classes seem to lie one level below. A class without held-out images is a warning, and files that look like
    images and are left out are another.
    """
    if not root.is_dir():
        raise CommandError(f"--data {root}: there is no such folder")
    if not 0 < share < 1:
        raise CommandError(f"--val-share {share} must be between 0 and 1")
    split, held = _part(root, TRAIN), _part(root, HELD_OUT)
    if split and not held:
        raise CommandError(
            f"{root} has {split.name}/ but no val/, validation/ or test/: put held-out images into val/CLASS/"
        )
    train = _by_class(root, split or root)
    _check_classes(root, train)
    if split and held:
        val = _by_class(root, held)
    else:
        _check_level(root, train)
        val = {name: _drawn(name, files, share) for name, files in train.items()}
    _check_held(root, train, val)
    if not split:
        train = {name: [file for file in files if file not in set(val[name])] for name, files in train.items()}
    classes = tuple(train)
    bare = [name for name in classes if not val.get(name)]
    warnings = [f"no image is held out of {listing(bare)}: accuracy says nothing about it"] if bare else []
    warnings += _left_out(root, [split, held] if split and held else [root])
    return Folder(root, classes, _numbered(classes, train), _numbered(classes, val), tuple(warnings))


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder that is called by the first of ``names``, in small letters where there are several."""
    there = [each for each in root.iterdir() if each.name.lower() in names and each.is_dir()]
    return min(there, key=lambda each: (names.index(each.name.lower()), each.name.swapcase()), default=None)


def _by_class(root: Path, folder: Path) -> dict[str, list[str]]:
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    return {name: _images(root, folder / name) for name in classes}


def _images(root: Path, folder: Path) -> list[str]:
    return [
        os.path.relpath(os.path.join(where, name), root)
        for where, files in _walked(root, folder)
        for name in files
        if _ending(name) in ENDINGS
    ]


def _walked(root: Path, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder from ``folder`` downwards, once however many links lead to it, and its files that are not hidden."""
    seen = {os.path.realpath(root)}
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield where, [name for name in sorted(files) if not name.startswith(".")]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _left_out(root: Path, parts: list[Path]) -> list[str]:
    """Warnings of files of no class, directly in one of ``parts``, and of images of a kind that isn't read."""
    images = ENDINGS | UNREAD
    loose = [
        os.path.relpath(each, root)
        for part in parts
        for each in sorted(part.iterdir())
        if _ending(each.name) in images and not each.name.startswith(".") and each.is_file()
    ]
    unread = [
        os.path.relpath(os.path.join(where, name), root)
        for part in parts
        for each in sorted(part.iterdir())
        if each.is_dir() and not each.name.startswith(".")
        for where, files in _walked(root, each)
        for name in files
        if _ending(name) in UNREAD
    ]
    told = [f"{len(loose)} images lie in no class's folder and are left out: {listing(loose)}"] if loose else []
    kinds = " ".join(sorted({_ending(name) for name in unread}))
    return told + (
        [f"{len(unread)} files that end in {kinds} are left out, convert them: {listing(unread)}"] if unread else []
    )


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


def _check_level(root: Path, train: Mapping[str, list[str]]) -> None:
    """Folders that hold no images but the same folders each are parts of the data, and what they hold are classes."""
    inside = [{Path(file).parts[1:-1][:1] for file in files} for files in train.values()]
    shared = sorted(names[0] for names in set[tuple[str, ...]].intersection(*inside) if names)
    if len(shared) > 1 and not any(() in names for names in inside):
        raise CommandError(
            f"{root}: {listing(list(train))} hold no images but {listing(shared)} each, which look like the classes; "
            "call them train and val, or put the images of a class directly into its folder"
        )


def _check_held(root: Path, train: Mapping[str, list[str]], val: Mapping[str, list[str]]) -> None:
    foreign = [name for name, files in val.items() if files and name not in train]
    if foreign:
        raise CommandError(f"{root}: class {listing(foreign)} is in validation and not in train/; move or remove it")
    if not any(val.values()):
        raise CommandError(f"{root} has no held-out image; put some into val/CLASS/, or at least two into each CLASS/")


def _numbered(classes: tuple[str, ...], files: Mapping[str, list[str]]) -> tuple[tuple[str, int], ...]:
    return tuple((file, number) for number, name in enumerate(classes) for file in files.get(name, []))
