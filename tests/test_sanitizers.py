"""The kernels' C++ sources: free of warnings, of bad memory accesses, of undefined behaviour and of torch."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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


def test_sources_know_nothing_of_torch_and_kernels_nothing_of_python():
    includes = {
        path: re.findall(r'#include [<"]([^>"]+)', path.read_text())
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
    }
    assert len(includes) >= 8
    for path, names in includes.items():
        assert not [n for n in names if n.startswith(("torch", "ATen", "c10"))], path
        if not path.name.startswith(("bind", "module")):
            assert not [n for n in names if n.lower().startswith(("python", "pybind11"))], path


def test_cuda_compiles_the_shared_headers():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    checked = run([str(ROOT / "csrc" / "nvcc_check.sh")])
    assert checked.returncode == 0, checked.stdout + checked.stderr
