"""What turns csrc/cuda into a library on this machine: nvcc, its toolkit's runtime, flags, and a build's facts."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import architectures, toolchain
from .architectures import Architecture
from .toolchain import BuildError, Toolchain

# For device code, and for the binding, which the C++ compiler makes. Neither takes the machine for granted: a build
# serves every processor that has the GPUs.
FLAGS = (
    "-O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xptxas -warn-spills,-warn-lmem-usage"
).split()
BINDING_FLAGS = "-O2 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra".split()
USUAL = Path("/usr/local/cuda/bin/nvcc")
LAUNCHERS = ("ccache", "sccache", "distcc")  # may stand before a compiler's name in CXX
ANSWER_TIMEOUT = 60  # seconds for nvcc to answer a question


@dataclass(frozen=True)
class CudaToolchain(Toolchain):
    """What makes the CUDA library: besides a C++ compiler, nvcc as a command, its version, and the shared runtime."""

    nvcc: tuple[str, ...]
    release: str
    runtime: Path
    architectures: tuple[Architecture, ...]
    host: tuple[str, ...]  # what tells nvcc of a C++ compiler

    @property
    def commands(self) -> dict[str, tuple[str, ...]]:
        names = " ".join(map(str, self.architectures))
        facts = (f'-DTAYLORKERN_CUDA="{self.release}"', f'-DTAYLORKERN_ARCHITECTURES="{names}"')
        include = f"-I{toolchain.sources()}"
        return {
            ".cpp": (*self.compiler, *facts),
            ".cu": (*self.nvcc, *self.host, *architectures.gencode(self.architectures), include),
        }

    @property
    def links(self) -> tuple[str, ...]:
        # Torch has loaded a runtime of this name already, and the loader takes that one. The path is for a process
        # in which it has not.
        return str(self.runtime), f"-Wl,-rpath,{self.runtime.parent}"

    @property
    def command(self) -> str:
        return shlex.join(self.nvcc)

    @property
    def identity(self) -> str:
        return f"{self.release} for {' '.join(map(str, self.architectures))}"

    def traits(self) -> dict[str, str]:
        nvcc = {"nvcc": shlex.join(self.nvcc), "release": self.release, "runtime": str(self.runtime)}
        return super().traits() | nvcc | {"host": shlex.join(self.host)}


def find_toolchain() -> CudaToolchain:
    """nvcc of the major version of CUDA that torch has, which can make code for every wanted architecture.

    Raises BuildError naming what is missing or doesn't fit.
    """
    having, wanted = torch_cuda(), architectures.wanted()
    host = toolchain.find_toolchain()
    nvcc = _command()
    release = _release(nvcc)
    if release.split(".")[0] != having.split(".")[0]:
        raise BuildError(
            f"{shlex.join(nvcc)} is of CUDA {release} and torch {torch.__version__} of CUDA {having}: their major "
            "versions must be the same; point CUDA_HOME at a toolkit that fits, or NVCC at its nvcc"
        )
    _check_makes(nvcc, release, wanted)
    runtime, tells = _runtime(nvcc), _host_compiler(host.compiler)
    return CudaToolchain(host.compiler, host.version, host.ninja, nvcc, release, runtime, wanted, tells)


def host_facts() -> dict[str, str | None]:
    """What a build depends on besides its tools. Raises BuildError where there is nothing to build for."""
    return toolchain.shared_facts(toolchain.CPU_SOURCES) | {
        "cuda": torch_cuda(),
        "machine": platform.machine(),
        "flags": shlex.join([*FLAGS, *BINDING_FLAGS]),
        "architectures": " ".join(map(str, architectures.wanted())),
    }


def fits(built: dict[str, str | None], wanted: dict[str, str | None]) -> bool:
    """Whether a build serves here: of the same facts, for these architectures or for ones that run on these GPUs."""
    asked = architectures.parsed(wanted["architectures"] or "")
    offered = architectures.parsed(built["architectures"] or "")
    same = built | {"architectures": None} == wanted | {"architectures": None}
    return same and architectures.cover(offered, [(one.major, one.minor) for one in asked])


def torch_cuda() -> str:
    """The version of CUDA that torch is built with. Raises BuildError where it is none."""
    if torch.version.cuda is None:
        raise BuildError(f"torch {torch.__version__} is built without CUDA; install a build with it")
    return str(torch.version.cuda)


def _command() -> tuple[str, ...]:
    """$NVCC, or the first nvcc of CUDA_HOME, CUDA_PATH, PATH, the usual place, and the packages beside torch."""
    if chosen := shlex.split(os.environ.get("NVCC", "")):
        if path := shutil.which(chosen[0]):
            return (path, *chosen[1:])
        raise BuildError(f"the CUDA compiler named by NVCC, {shlex.join(chosen)!r}, isn't there; correct or unset NVCC")
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    beside_torch = sorted(Path(torch.__file__).parent.parent.glob("nvidia/cu*/bin/nvcc"))
    for candidate in (*(str(home / "bin" / "nvcc") for home in homes), "nvcc", str(USUAL), *map(str, beside_torch)):
        if path := shutil.which(candidate):
            return (path,)
    raise BuildError(
        "there is no nvcc in CUDA_HOME, in CUDA_PATH, on PATH or in /usr/local/cuda; install the CUDA toolkit "
        "that torch is built with, or point NVCC at its nvcc"
    )


def _ask(nvcc: Sequence[str], *question: str) -> str:
    try:
        answer = subprocess.run(
            [*nvcc, *question],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=ANSWER_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the CUDA compiler doesn't run ({error}); repair it or point NVCC at another") from error
    return answer.stdout + answer.stderr


def _release(nvcc: Sequence[str]) -> str:
    """13.0.88"""
    answer = _ask(nvcc, "--version")
    if found := re.search(r"release [\d.]+, V([\d.]+)", answer):
        return found[1]
    raise BuildError(f"{shlex.join(nvcc)} --version names no release of CUDA; point NVCC at another. It said: {answer}")


def _check_makes(nvcc: Sequence[str], release: str, wanted: Sequence[Architecture]) -> None:
    # The list names no variants, such as sm_90a: who has one has the other.
    made = re.findall(r"sm_(\d+)", _ask(nvcc, "--list-gpu-code"))
    if missing := [str(one) for one in wanted if one.number not in made]:
        raise BuildError(
            f"{shlex.join(nvcc)} of CUDA {release} can't compile for architecture {' or '.join(missing)}, only for "
            f"{' '.join(f'{code[:-1]}.{code[-1]}' for code in made)}; install another, or set {architectures.VARIABLE}"
        )


def _runtime(nvcc: Sequence[str]) -> Path:
    """The shared libcudart of nvcc's toolkit; a toolkit from packages has no name for it without a version."""
    folders = [home / name for home in _homes(nvcc) for name in ("lib64", "lib", *_targets())]
    for pattern in ("libcudart.so", "libcudart.so.*"):
        for folder in folders:
            if found := sorted(folder.glob(pattern)):
                return found[0].absolute()
    raise BuildError(f"libcudart.so of {shlex.join(nvcc)} is in none of {', '.join(map(str, folders))}; install it")


def _homes(nvcc: Sequence[str]) -> list[Path]:
    """Where the toolkit is: what nvcc says itself, for it may be a script, and the folder above its own."""
    said = re.search(r"^#\$ TOP=(.+)$", _ask(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    beside = Path(os.path.realpath(nvcc[0])).parent.parent
    return [Path(os.path.normpath(said[1].strip())), beside] if said else [beside]


def _targets() -> list[str]:
    machine = platform.machine()
    return [f"targets/{name}-linux/lib" for name in (machine, *(["sbsa"] if machine == "aarch64" else []))]


def _host_compiler(compiler: Sequence[str]) -> tuple[str, ...]:
    """What tells nvcc of the compiler that CXX chooses; otherwise it takes its own."""
    if not os.environ.get("CXX", "").strip():
        return ()
    words = [word for word in compiler if Path(word).name not in LAUNCHERS]
    return "-ccbin", shutil.which(words[0]) or words[0], *(f"-Xcompiler={word}" for word in words[1:])
