"""What a build is made of: its libraries, each with its sources, flags and headers, and the file that tells ninja.

There are two builds, the CPU's and CUDA's, which know nothing of each other.
"""

import operator
import shlex
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pybind11
import torch

from . import nvcc, toolchain
from .toolchain import Toolchain

_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Part:
    """One library. ``name`` begins its file's and its module's name; ``needed``: without it there is no build."""

    name: str
    patterns: tuple[str, ...]  # of its units, the files that are compiled one by one, in csrc
    flags: tuple[str, ...]  # of units in C++
    headers: tuple[Path, ...] = ()  # besides Python's
    links: tuple[str, ...] = ()
    needed: bool = True
    device_flags: tuple[str, ...] = ()  # of units in CUDA C++

    def units(self) -> list[Path]:
        folder = toolchain.sources()
        return [path for pattern in self.patterns for path in sorted(folder.glob(pattern))]

    def module(self, key: str) -> str:
        """The name of its module in the build ``key``: builds with other keys can be in the same process."""
        return f"_{self.name}_{key}"

    def libraries(self, folder: Path) -> list[Path]:
        """This library's files in a build's ``folder``, as their checksums name them."""
        return sorted(folder.glob(f"{self.name}-*.so"))


KERNELS = Part(
    "taylorkern",
    ("module.cpp", "bind_cpu.cpp", "cpu/*.cpp"),
    tuple(toolchain.FLAGS),
    (Path(pybind11.get_include()),),
)
# Torch's headers take a newer C++ than the kernels, and change from release to release.
AUTOGRAD = Part(
    "taylorkern_autograd",
    ("autograd.cpp",),
    (*toolchain.AUTOGRAD_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
    (_TORCH / "include", _TORCH / "include" / "torch" / "csrc" / "api" / "include"),
    (f"-L{_TORCH / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"),
    needed=False,
)
CUDA_KERNELS = Part(
    "taylorkern_cuda",
    ("bind_cuda.cpp", "cuda/*.cu"),
    tuple(nvcc.BINDING_FLAGS),
    (Path(pybind11.get_include()),),
    device_flags=tuple(nvcc.FLAGS),
)


@dataclass(frozen=True)
class Recipe:
    """A build. The first of its parts holds the kernels.

    ``facts``: what it depends on besides its tools, which ``tools`` finds; both raise BuildError where there is none.
    ``fits``: whether one that was made with some facts, by whatever tools, serves where others are wanted.
    """

    device: str  # as messages name it
    parts: tuple[Part, ...]
    facts: Callable[[], dict[str, str | None]]
    tools: Callable[[], Toolchain]
    advice: str  # where the tools fail
    usual_seconds: int  # of a compilation on two cores
    patience: int = 1  # how many times longer than usual everything may take
    fits: Callable[[dict[str, str | None], dict[str, str | None]], bool] = operator.eq

    @property
    def kernels(self) -> Part:
        return self.parts[0]


PARTS = (KERNELS, AUTOGRAD)
CPU = Recipe("CPU", PARTS, toolchain.host_facts, toolchain.find_toolchain, "CXX", usual_seconds=30)
CUDA = Recipe(
    "CUDA", (CUDA_KERNELS,), nvcc.host_facts, nvcc.find_toolchain, "NVCC or CXX", 60, patience=3, fits=nvcc.fits
)


def ninja_file(tools: Toolchain, key: str, parts: Sequence[Part] = PARTS) -> str:
    """Rules that make <name>.so of every part."""
    return "\n".join([*(line for part in parts for line in _lines(tools, key, part)), ""])


def _lines(tools: Toolchain, key: str, part: Part) -> list[str]:
    headers = [f"-isystem{path}" for path in (*part.headers, sysconfig.get_paths()["include"])]
    options = {
        ".cpp": [*part.flags, f"-DTAYLORKERN_MODULE={part.module(key)}", *headers],
        ".cu": part.device_flags,
    }
    rules = {".cpp": f"compile_{part.name}", ".cu": f"compile_{part.name}_device"}
    units = part.units()
    objects = [f"{part.name}.{number}.o" for number in range(len(units))]
    links = (*part.links, *tools.links)
    return [
        *(_rule(rules[suffix], [*command, *options[suffix], "-c"], []) for suffix, command in tools.commands.items()),
        # A library has its name once it is whole.
        _rule(f"link_{part.name}", [*tools.compiler, *part.flags, "-shared"], links, out="$out.part")
        + " && mv $out.part $out",
        *(f"build {o}: {rules[u.suffix]} {_path(u)}" for o, u in zip(objects, units, strict=True)),
        f"build {part.name}.so: link_{part.name} {' '.join(objects)}",
    ]


def _rule(name: str, before: Sequence[str], behind: Sequence[str], out: str = "$out") -> str:
    quoted = [shlex.join(words).replace("$", "$$") for words in (before, behind)]
    return f"rule {name}\n  command = {quoted[0]} $in -o {out} {quoted[1]}".rstrip()


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
