"""torchvision, also where its compiled library was built for another torch and does not load."""

import importlib
from typing import Any

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[torch.library.Library] = []  # a library that is collected takes its operators with it


def torchvision() -> Any:
    """The package. Raises ImportError or RuntimeError where it can't be had.

    Without its library the import fails for want of two operators' names. They are declared then, without any
    implementation, and it is imported again: its classification networks are plain PyTorch and call neither.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    _kept.append(library)
    for schema in _SCHEMAS:
        library.define(schema)
    return importlib.import_module("torchvision")
