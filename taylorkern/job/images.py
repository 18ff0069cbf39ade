"""One image file as a tensor, and the random changes made to it in training."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taylorkern.errors import CommandError, one_line

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those that torchvision's weights were trained with
EIGHT_BITS, SIXTEEN_BITS = 255, 65535  # white


class UnreadableError(Exception):
    """The file holds no whole image; the message says why."""


def check_pillow() -> None:
    """Raise CommandError where Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise CommandError("images are read by Pillow: pip install pillow") from error


def read(path: Path, size: int) -> Tensor:
    """The image in ``path`` as bytes [3, size, size], upright, resized and in colour; 16 bits of grey become 8.

    Raises UnreadableError where it is truncated, damaged or none at all, or its numbers have no known white.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, once per file and worker
            with Image.open(path) as image:
                resized = _eight_bits(_upright(image)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except Exception as error:  # on damaged files, Pillow's readers raise nearly everything
        raise UnreadableError(one_line(error).replace(str(path), path.name)) from error
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _upright(image: Any) -> Any:
    """Turned as its EXIF data say; damaged ones say nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged pixels are told of where they are converted
        return image


def _eight_bits(image: Any) -> Any:
    """An image of larger numbers as one of bytes. Raises UnreadableError where it isn't known which is white."""
    from PIL import Image

    if image.mode == "F":
        raise UnreadableError("its pixels are floating-point numbers, so that white is not known; save it as 8 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    numbers = np.asarray(image).astype(np.int64)
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or most > SIXTEEN_BITS:
        raise UnreadableError(f"its numbers go from {least} to {most}, so that white is not known; save it as 8 bits")
    if image.mode == "I" and most <= EIGHT_BITS:
        return Image.fromarray(numbers.astype(np.uint8))
    return Image.fromarray((numbers * EIGHT_BITS / SIXTEEN_BITS).round().astype(np.uint8))


def altered(image: Tensor, draw: random.Random) -> Tensor:
    """``image`` [3, S, S], mirrored or not and moved by up to an eighth of its size; the edge is black."""
    most = max(1, image.shape[-1] // 8)
    down, right = draw.randint(0, 2 * most), draw.randint(0, 2 * most)
    size = image.shape[-1]
    moved = F.pad(image, (most,) * 4)[:, down : down + size, right : right + size]
    return (moved.flip(2) if draw.random() < 0.5 else moved).contiguous()


def normalised(images: Tensor) -> Tensor:
    """Bytes [N, 3, S, S] as numbers, by the mean and deviation of ImageNet's images.

    >>> normalised(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).shape
    torch.Size([1, 3, 2, 2])
    """
    mean, deviation = (torch.tensor(each, device=images.device).view(1, 3, 1, 1) for each in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation
