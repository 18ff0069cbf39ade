"""What turns csrc into libraries for this processor: sources, compiler, ninja, flags, and a build's key."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .._version import __version__

FLAGS = (
    "-O3 -std=c++17 -march=native -fopenmp -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-ffp-contract=off -fno-trapping-math -fno-math-errno"
).split()
AUTOGRAD_FLAGS = "-O2 -std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra".split()
COMPILERS = ("g++", "c++", "clang++")
SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
# In csrc, what the build for the other device does without: neither is compiled anew for the other's sake.
CPU_SOURCES = {"cpu", "bind_cpu.cpp", "module.cpp", "autograd.cpp", "autograd_kernels.h"}
CUDA_SOURCES = {"cuda", "bind_cuda.cpp"}
GRACE = 5  # seconds for ninja to end what it started
VERSION_TIMEOUT = 60  # seconds for a compiler to say which it is


class BuildError(RuntimeError):
    """Compiled kernels can't be had; the message says why and what to do."""


@dataclass(frozen=True)
class Toolchain:
    """Everything a compilation needs. ``compiler`` is a command with its arguments: ("/usr/bin/ccache", "g++")."""

    compiler: tuple[str, ...]
    version: str
    ninja: str

    @property
    def commands(self) -> dict[str, tuple[str, ...]]:
        """What compiles a unit, by the end of its name."""
        return {".cpp": self.compiler}

    @property
    def links(self) -> tuple[str, ...]:
        """What every library is linked with, besides its own."""
        return ()

    @property
    def command(self) -> str:
        """As messages name it."""
        return shlex.join(self.compiler)

    @property
    def identity(self) -> str:
        """In one line, which it is."""
        return self.version.splitlines()[0]

    def traits(self) -> dict[str, str]:
        """What a build depends on here."""
        return {"compiler": shlex.join(self.compiler), "version": self.version}


def sources() -> Path:
    """The csrc folder: inside an installed package, or beside the package in a checkout.

    Raises BuildError where neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "ops.h").is_file():
            return folder
    raise BuildError(f"the C++ sources are missing beside {package}; reinstall taylorkern")


def find_toolchain() -> Toolchain:
    """The compiler ($CXX, or the first of g++, c++, clang++), ninja and Python's headers.

    Raises BuildError naming what is missing.
    """
    compiler = _compiler()
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise BuildError(f"Python's headers are missing ({header}); install them (apt install python3-dev)")
    return Toolchain(compiler, _version(compiler), _ninja())


def host_facts() -> dict[str, str | None]:
    """What a build depends on besides its compiler."""
    return shared_facts(CUDA_SOURCES) | {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "isa": _isa(),
        "flags": shlex.join([*FLAGS, *AUTOGRAD_FLAGS]),
    }


def shared_facts(without: Collection[str]) -> dict[str, str | None]:
    """What any build depends on, with the sources that are not among ``without``."""
    return {
        "taylorkern": __version__,
        "sources": _hash_of_sources(sources(), without),
        "python": f"{sys.implementation.cache_tag} {sysconfig.get_config_var('SOABI')}",
        "pybind11": importlib.metadata.version("pybind11"),
    }


def key(facts: Mapping[str, str | None], toolchain: Toolchain) -> str:
    """The name of a build: a hash over everything that it depends on."""
    everything = {**facts, **toolchain.traits()}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:20]


def run(command: Sequence[str], folder: Path, timeout: float) -> tuple[int, str]:
    """Exit status and output of a command whose children all end with it, or after ``timeout`` seconds.

    Raises subprocess.TimeoutExpired.
    """
    environment = os.environ | {"TMPDIR": str(folder), "LC_ALL": "C"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            _end(process)
            raise
    return process.returncode, output


def _end(process: subprocess.Popen[str]) -> None:
    """Ends ninja, which ends its compilers if it is asked politely: they are in process groups of their own."""
    process.terminate()
    try:
        process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _compiler() -> tuple[str, ...]:
    chosen = os.environ.get("CXX", "").strip()
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        path = shutil.which(command[0])
        if path:
            return (path, *command[1:])
    if chosen:
        raise BuildError(f"the C++ compiler named by CXX, {chosen!r}, isn't on PATH; correct or unset CXX")
    raise BuildError("there is no C++ compiler on PATH; install one (apt install g++) or point CXX at it")


def _version(compiler: tuple[str, ...]) -> str:
    try:
        answer = subprocess.run(
            [*compiler, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=VERSION_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        command = shlex.join(compiler)
        raise BuildError(f"the C++ compiler {command!r} doesn't run ({error}); repair it or set CXX") from error
    return answer.stdout.strip()


def _ninja() -> str:
    beside_python = Path(sys.executable).parent / "ninja"
    candidates = [str(beside_python), shutil.which("ninja")]
    try:
        import ninja
    except ImportError:
        pass
    else:
        candidates.insert(0, str(Path(ninja.BIN_DIR) / "ninja"))
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    raise BuildError("ninja is missing; install it (pip install ninja)")


def _hash_of_sources(folder: Path, without: Collection[str] = ()) -> str:
    """``without``: names in ``folder`` of what doesn't count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SOURCE_SUFFIXES):
        within = path.relative_to(folder)
        if within.parts[0] not in without:
            digest.update(within.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _isa() -> str:
    """The processor's features: what -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    names = features.partition(":")[2].split() or [platform.processor()]
    return " ".join([platform.machine(), *sorted(names)])
