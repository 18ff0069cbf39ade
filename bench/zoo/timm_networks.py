"""timm's distinct architectures, as ``bench.zoo.choosing`` has chosen them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from taylorkern.companion import torchvision

from .networks import Network
from .randomness import randomise, settle, strengthen

CHOICE = Path(__file__).parent / "timm_choice.json"


def timm() -> Any:
    """The package, which imports torchvision."""
    torchvision()
    import timm

    return timm


@cache
def choice() -> dict[str, dict[str, Any]]:
    """What is known of every chosen network, by its name."""
    return {chosen["name"]: chosen for chosen in json.loads(CHOICE.read_text())["chosen"]}


def about() -> str:
    """For the page."""
    whole = json.loads(CHOICE.read_text())
    shallow = [c["name"] for c in whole["chosen"] if "depth" in c["arguments"]]
    return (
        f"Of the {whole['networks']} networks of timm {whole['timm']} the smallest of each class and of each family of "
        "names in every module, and some more that share a family and not their layers (`bench/zoo/choosing.py`). All "
        "of them build without weights, so none is left out; the others are wider, deeper or differently trained. "
        f"With fewer blocks than their own: {', '.join(shallow)}."
    )


def networks() -> list[str]:
    return list(choice())


def build(name: str, seed: int) -> Network:
    torch.manual_seed(seed)
    chosen = choice()[name]
    model = timm().create_model(name, pretrained=False, num_classes=10, **chosen["arguments"]).double()
    model = strengthen(randomise(model))
    example, inputs = (torch.randn(batch, *chosen["shape"], dtype=torch.float64) for batch in (1, 2))
    return Network(settle(model, inputs), example, inputs)
