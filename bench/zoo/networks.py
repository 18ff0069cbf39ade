"""What a source of networks gives, and the families of sources."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Network:
    """A network in float64, with an example to couple it by and others to compare it on."""

    model: nn.Module
    example: Any  # batch 1
    inputs: Any  # batch 2, other numbers


@dataclass(frozen=True)
class Family:
    names: Callable[[], list[str]]
    build: Callable[[str, int], Network]  # name, seed
    package: str  # without which there are none
    about: Callable[[], str]  # for the page: which networks these are, and which are left out
