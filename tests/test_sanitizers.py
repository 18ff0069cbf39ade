"""The C++ sources: free of warnings; the kernels free of bad memory accesses, of undefined behaviour and of torch."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from taylorkern.backends.recipe import AUTOGRAD
from tests import emulated

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "tests" / "cpp" / "odd_shapes.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
STRICT = "-std=c++17 -O1 -fopenmp -ffp-contract=off -fno-trapping-math -Wall -Wextra -Werror -Wno-psabi".split()
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


@pytest.fixture(scope="module")
def sanitizing_compiler(tmp_path_factory) -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH")
    probe = tmp_path_factory.mktemp("probe") / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = run([compiler, *SANITIZE, str(probe), "-o", str(probe.with_suffix(""))])
    if built.returncode or run([str(probe.with_suffix(""))]).returncode:
        pytest.skip(f"{compiler} has no sanitizer runtime: {built.stderr.strip()[-200:]}")
    return compiler


# The host's own registers, and 32 byte ones that are put together from narrower ones
@pytest.mark.parametrize("isa", [["-march=native"], []], ids=["native", "baseline"])
def test_kernels_are_right_and_clean_over_odd_shapes(sanitizing_compiler, tmp_path, isa):
    program = tmp_path / "odd_shapes"
    command = [sanitizing_compiler, *STRICT, *isa, *SANITIZE, f"-I{ROOT / 'csrc'}", *map(str, SOURCES)]
    built = run([*command, "-o", str(program)])
    assert built.returncode == 0, built.stderr
    ran = run([str(program)], OMP_WAIT_POLICY="passive", LD_PRELOAD="")
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert "every shape is right" in ran.stdout


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_library_of_autograd_functions_compiles_without_a_warning(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on PATH")
    headers = [f"-isystem{path}" for path in (*AUTOGRAD.headers, sysconfig.get_paths()["include"])]
    command = [compiler, *AUTOGRAD.flags, *headers, "-DTAYLORKERN_MODULE=checked", "-Wall", "-Wextra", "-fsyntax-only"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("#include <torch/csrc/autograd/custom_function.h>\n")
    if (probed := run([*command, str(probe)])).returncode:
        pytest.skip(f"{compiler} can't compile torch's own headers: {probed.stderr.strip()[:200]}")
    (unit,) = AUTOGRAD.units()
    compiled = run([*command, "-Werror", str(unit)])
    assert compiled.returncode == 0, compiled.stderr


def test_torch_is_known_to_one_library_and_python_to_no_kernel():
    includes = {
        path: re.findall(r'#include [<"]([^>"]+)', path.read_text())
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
    }
    assert len(includes) >= 8
    for path, names in includes.items():
        of_torch = [n for n in names if n.startswith(("torch", "ATen", "c10"))]
        assert bool(of_torch) == path.name.startswith("autograd"), path
        if not path.name.startswith(("bind", "module", "autograd")):
            assert not [n for n in names if n.lower().startswith(("python", "pybind11"))], path


CUDA_SHAPES = ROOT / "tests" / "cpp" / "cuda_odd_shapes.cpp"
# Of undefined behaviour, what a device would fault at or quietly differ in: all of it takes minutes to compile.
CUDA_SANITIZE = ["-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]


def test_cuda_kernels_touch_only_what_is_theirs(sanitizing_compiler, tmp_path):
    made = emulated.objects(tmp_path, [CUDA_SHAPES, *emulated.KERNELS, *emulated.EMULATOR], ["-O1", *CUDA_SANITIZE])
    ran = run([str(emulated.link(made, tmp_path / "odd_shapes", CUDA_SANITIZE))], LD_PRELOAD="")
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert "every shape is clean" in ran.stdout


def test_cuda_kernels_have_no_races(tmp_path):
    """Under every order at once: no two accesses that a barrier does not order, one of them a write."""
    if emulated.compiler() is None:
        pytest.skip("no g++ on PATH")
    watched = emulated.objects(tmp_path, emulated.KERNELS, emulated.WATCHED)
    made = emulated.objects(tmp_path, [CUDA_SHAPES, *emulated.EMULATOR], emulated.WATCHING)
    ran = run([str(emulated.link([*watched, *made], tmp_path / "odd_shapes", []))])
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert "every shape is clean" in ran.stdout
