"""scikit-learn's handwritten digits as a folder of images: ``python -m tests.digits_folder DIR``.

DIR/train/CLASS/NUMBER.png and DIR/val/CLASS/NUMBER.png, for the commands that read such folders. The same bytes every
time: the first image of each five of a class is held out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT = 5  # one image of so many is for validation
BRIGHTEST = 16


def write(folder: Path, size: int = 32, per_class: int | None = None) -> int:
    """Write ``per_class`` images of each digit (default: all, about 180), [size, size] in grey; how many they were."""
    digits = load_digits()
    seen = dict.fromkeys(digits.target_names, 0)
    for image, label in zip(digits.images, digits.target, strict=True):
        number = seen[label]
        if per_class is not None and number >= per_class:
            continue
        seen[label] += 1
        place = folder / ("train" if number % HELD_OUT else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image * (255 / BRIGHTEST)).round().astype(numpy.uint8))
        grey.resize((size, size), Image.Resampling.BILINEAR).save(place / f"{number:03}.png")
    return sum(seen.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.digits_folder", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="width and height (default 32)")
    parser.add_argument("--per-class", type=int, metavar="N", help="images of each digit (default: all)")
    options = parser.parse_args(arguments)
    print(f"{write(options.folder, options.size, options.per_class)} images are in {options.folder}")


if __name__ == "__main__":
    main()
