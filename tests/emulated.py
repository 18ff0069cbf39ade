"""The CUDA kernels on a CPU: csrc/cuda compiled against the headers of tests/cuda, as a provider of operations."""

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pybind11
import torch
from torch import Tensor

from taylorkern.backends import frame
from taylorkern.backends.build import cache_root

ROOT = Path(__file__).parent.parent
HEADERS = (ROOT / "tests" / "cuda", ROOT / "csrc")
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
EMULATOR = [ROOT / "tests" / "cuda" / f"{name}.cpp" for name in ("emulator", "fiber", "races")]
BINDINGS = [ROOT / "csrc" / "bind_cuda.cpp", ROOT / "tests" / "cuda" / "controls.cpp"]
# -fno-strict-aliasing: kernels take elements 16 bytes at a time. The pragmas are nvcc's, to unroll.
FLAGS = "-std=c++17 -fno-strict-aliasing -Wall -Wextra -Werror -Wno-unknown-pragmas".split()
# Of what is watched for races, and of what watches. A loop that becomes a call of memset would not be seen.
WATCHED = ["-O1", "-fsanitize=thread", "-fno-tree-loop-distribute-patterns"]
WATCHING = ["-O2", "-DEMULATOR_RACES"]
COMPILE_TIMEOUT = 300  # seconds
GUARD = 256  # bytes of a pattern, before and behind a workspace
PATTERN = 0xA5
NOT_A_NUMBER = 0xFF  # a byte of one


def compiler() -> str | None:
    """The one whose warnings and sanitizers the tests know."""
    return shutil.which("g++")


def objects(folder: Path, sources: list[Path], flags: list[str]) -> list[Path]:
    """Compile ``sources``, as many at once as there are processors.

    Raises RuntimeError with what the compiler says.
    """
    made = [folder / f"{source.name}.o" for source in sources]
    headers = [f"-I{path}" for path in HEADERS]
    commands = [
        [compiler() or "g++", *FLAGS, *flags, *headers, "-x", "c++", "-c", str(source), "-o", str(to)]
        for source, to in zip(sources, made, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    return made


def link(made: list[Path], to: Path, flags: list[str]) -> Path:
    """Raises RuntimeError with what the linker says."""
    _run([compiler() or "g++", *flags, *map(str, made), "-o", str(to)])
    return to


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[:4000]}")


@dataclass(frozen=True)
class Library:
    """The bindings of the emulated kernels, and the emulator's controls."""

    module: ModuleType
    controls: ctypes.CDLL


@cache
def library() -> Library:
    """Compiled now, or from the cache."""
    name = f"emulated_{_key()}"
    path = cache_root() / "emulated" / f"{name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
            facts = [f"-DTAYLORKERN_MODULE={name}", '-DTAYLORKERN_CUDA="none"', '-DTAYLORKERN_ARCHITECTURES="emulated"']
            flags = ["-O2", "-fPIC", "-fvisibility=hidden", *facts, *includes]
            made = objects(Path(work), [*BINDINGS, *KERNELS, *EMULATOR], flags)
            os.replace(link(made, Path(work) / path.name, ["-shared"]), path)
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    controls = ctypes.CDLL(str(path))
    controls.emulator_order.argtypes = [ctypes.c_uint64]
    controls.emulator_launches.restype = ctypes.c_uint64
    return Library(module, controls)


def _key() -> str:
    version = subprocess.run([compiler() or "g++", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + f"{platform.machine()} {sysconfig.get_config_var('SOABI')}".encode())
    for folder in HEADERS:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:20]


class Provider:
    """Operations on CPU tensors by the emulated CUDA kernels, with so many bytes to stay resident in.

    ``order`` is the emulator's: of threads and of blocks.
    """

    __name__ = "tests.emulated"
    DTYPES: ClassVar = {dtype: code for dtype, code in frame.DTYPES.items() if dtype is not torch.float64}

    def __init__(self, resident_bytes: int = 0, order: int = 0) -> None:
        self.resident_bytes, self.order = resident_bytes, order

    def supports(self, operation: str, tensor: Tensor) -> bool:
        return tensor.dtype in self.DTYPES and tensor.is_cpu

    def channel_scores(self, a: Tensor, g: Tensor) -> Tensor:
        return frame.channel_scores(self._frame(a), a, g)

    def batch_norm_act(self, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return frame.batch_norm_act(self._frame(x), x, *rest)

    def batch_norm_act_backward(self, dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return frame.batch_norm_act_backward(self._frame(x), dy, x, *rest)

    def follow(
        self, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbias: float
    ) -> None:
        self._run(
            library().module.follow,
            *(t.data_ptr() for t in (mean, var, running_mean, running_var)),
            momentum,
            unbias,
            len(mean),
            frame.DTYPES[mean.dtype],
            0,
        )

    def _run(self, kernel: Callable[..., None], *arguments: Any) -> None:
        library().controls.emulator_order(self.order)
        kernel(*arguments)

    def _frame(self, x: Tensor) -> frame.Frame:
        return _Frame(x, self)


class _Frame(frame.Frame):
    __slots__ = ("provider",)

    def __init__(self, x: Tensor, provider: Provider) -> None:
        super().__init__(x)
        self.provider = provider

    def call(self, kernel: str, *arguments: Tensor | float | None) -> None:
        shape = (*self.sizes(), self.layout, frame.DTYPES[self.dtype])
        workspace = _Workspace(library().module.workspace_bytes(*shape))
        passed = [t.data_ptr() if isinstance(t, Tensor) else 0 if t is None else t for t in arguments]
        where = (0, workspace.address, self.provider.resident_bytes)
        self.provider._run(getattr(library().module, kernel), *passed, *shape, *where)
        workspace.check(kernel)


class _Workspace:
    """As many bytes as are asked for, full of NaN, between guards, and aligned to 16 bytes and no more."""

    def __init__(self, count: int) -> None:
        self.memory = torch.full((count + 2 * GUARD,), PATTERN, dtype=torch.uint8)
        self.begin = GUARD - 32 + (16 - self.memory.data_ptr()) % 32
        self.end = self.begin + count
        self.memory[self.begin : self.end] = NOT_A_NUMBER
        self.address = self.memory.data_ptr() + self.begin

    def check(self, kernel: str) -> None:
        around = torch.cat([self.memory[: self.begin], self.memory[self.end :]])
        assert bool((around == PATTERN).all()), f"{kernel} has written beside its workspace"
