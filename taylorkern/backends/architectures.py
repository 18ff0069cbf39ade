"""For which GPUs the CUDA kernels are compiled: those that are visible, or those that TORCH_CUDA_ARCH_LIST names."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from .toolchain import BuildError

VARIABLE = "TORCH_CUDA_ARCH_LIST"
_FORM = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
# Torch's own names, of torch.utils.cpp_extension
_NAMED = {
    "Kepler": "3.5+PTX",
    "Kepler+Tesla": "3.7",
    "Maxwell": "5.0;5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


@dataclass(frozen=True, order=True)
class Architecture:
    """A GPU's compute capability, 9.0. ``only`` is "a" (or "f") where code takes what no later GPU (or family) has.

    With ``ptx`` the code can be compiled for later GPUs too, by their driver.
    """

    major: int
    minor: int
    only: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.only}{'+PTX' if self.ptx else ''}"

    @property
    def number(self) -> str:
        """As nvcc writes it, without what is special."""
        return f"{self.major}{self.minor}"

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this capability runs the code: its own kind's, an earlier one's of its major, or PTX."""
        here = (self.major, self.minor)
        if self.only == "a":
            return here == capability
        return here <= capability and (self.major == capability[0] or (self.ptx and not self.only))


def wanted() -> tuple[Architecture, ...]:
    """What TORCH_CUDA_ARCH_LIST names, or the visible devices are: sorted, distinct, at least one.

    Raises BuildError where there is neither, and where a name is unknown.
    """
    text = os.environ.get(VARIABLE, "").strip()
    return parsed(text) if text not in ("", "native") else _distinct(Architecture(*c) for c in visible())


def parsed(text: str) -> tuple[Architecture, ...]:
    """The architectures of a list, separated by ";", "," or spaces.

    >>> [str(architecture) for architecture in parsed("9.0a, 8.0;Hopper")]
    ['8.0', '9.0+PTX', '9.0a']

    Raises BuildError where it names none, or one that is unknown.
    """
    words = [word for name in _words(text) for word in _words(_NAMED.get(name, name))]
    forms = [_FORM.fullmatch(word) for word in words]
    unknown = [word for word, form in zip(words, forms, strict=True) if form is None]
    if unknown or not words:
        said = f"doesn't know {unknown[0]!r}" if unknown else "names no architecture"
        raise BuildError(
            f"{VARIABLE}={text!r} {said}; write it as in '8.0;9.0+PTX', or unset it to compile for the visible GPUs"
        )
    return _distinct(Architecture(int(f[1]), int(f[2]), f[3], bool(f[4])) for f in forms if f)


def visible() -> list[tuple[int, int]]:
    """The compute capabilities of the visible devices, device by device. Raises BuildError where there is none."""
    try:
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:
        raise BuildError(f"the GPUs can't be asked what they are: {str(error).splitlines()[0]}") from error
    if not found:
        raise BuildError(
            f"no GPU is visible to compile for; set {VARIABLE}, as in {VARIABLE}='8.0;9.0+PTX', to compile without one"
        )
    return found


def gencode(architectures: Sequence[Architecture]) -> list[str]:
    """What tells nvcc to make real code for each, and PTX where it is asked for."""
    flags = []
    for one in architectures:
        virtual = f"compute_{one.number}{one.only}"
        flags.append(f"-gencode=arch={virtual},code=sm_{one.number}{one.only}")
        flags += [f"-gencode=arch={virtual},code={virtual}"] if one.ptx else []
    return flags


def cover(built: Iterable[Architecture], capabilities: Iterable[tuple[int, int]]) -> bool:
    """Whether a build for ``built`` runs on GPUs of all these capabilities."""
    offered = list(built)
    return all(any(one.serves(capability) for one in offered) for capability in capabilities)


def _words(text: str) -> list[str]:
    return re.split(r"[;,\s]+", text.strip("; ,\t\n")) if text.strip("; ,\t\n") else []


def _distinct(architectures: Iterable[Architecture]) -> tuple[Architecture, ...]:
    """Sorted; one that is named with and without PTX has it."""
    merged: dict[Architecture, bool] = {}
    for one in architectures:
        bare = replace(one, ptx=False)
        merged[bare] = merged.get(bare, False) or one.ptx
    return tuple(replace(bare, ptx=merged[bare]) for bare in sorted(merged))
