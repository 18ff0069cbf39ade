"""What a build is made of: its libraries, each with its sources, flags and headers, and the file that tells ninja."""

import shlex
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pybind11
import torch

from . import toolchain
from .toolchain import Toolchain

_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Part:
    """One library. ``name`` begins its file's and its module's name; ``needed``: without it there is no build."""

    name: str
    patterns: tuple[str, ...]  # of its units, the files that are compiled one by one, in csrc
    flags: tuple[str, ...]
    headers: tuple[Path, ...] = ()  # besides Python's
    links: tuple[str, ...] = ()
    needed: bool = True

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
    ("module.cpp", "bind_*.cpp", "cpu/*.cpp"),
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
PARTS = (KERNELS, AUTOGRAD)


def ninja_file(tools: Toolchain, key: str) -> str:
    """Rules that make <name>.so of every part."""
    lines: list[str] = []
    for part in PARTS:
        headers = [f"-isystem{path}" for path in (*part.headers, sysconfig.get_paths()["include"])]
        compiler = [*tools.compiler, *part.flags]
        units = part.units()
        objects = [f"{part.name}.{number}.o" for number in range(len(units))]
        lines += [
            _rule(f"compile_{part.name}", [*compiler, f"-DTAYLORKERN_MODULE={part.module(key)}", *headers, "-c"], []),
            # A library has its name once it is whole.
            _rule(f"link_{part.name}", [*compiler, "-shared"], part.links, out="$out.part") + " && mv $out.part $out",
            *(f"build {o}: compile_{part.name} {_path(u)}" for o, u in zip(objects, units, strict=True)),
            f"build {part.name}.so: link_{part.name} {' '.join(objects)}",
        ]
    return "\n".join([*lines, ""])


def _rule(name: str, before: Sequence[str], behind: Sequence[str], out: str = "$out") -> str:
    quoted = [shlex.join(words).replace("$", "$$") for words in (before, behind)]
    return f"rule {name}\n  command = {quoted[0]} $in -o {out} {quoted[1]}".rstrip()


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
