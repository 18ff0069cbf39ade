"""The check of the CUDA sources: what it refuses, and how it reads what ptxas says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(CSRC / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | environment)


@needs_nvcc
def test_headers_and_kernels_compile_without_a_warning_or_a_spill():
    """For one architecture; make nvcc-check does the others."""
    checked = run("nvcc_check.sh", "sm_90")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for source in ("headers.cu", *(path.name for path in (CSRC / "cuda").glob("*.cu"))):
        assert f"nvcc-check: {source} compiles for sm_90" in checked.stdout
    assert "every_formula<double>" in checked.stdout


SPILLING = """
template <int K>
__global__ void __launch_bounds__(1024) held(const float* x, float* y, int n) {
  float t[K];
  for (int k = 0; k < K; ++k) t[k] = x[k];
  for (int r = 0; r < n; ++r) {
#pragma unroll
    for (int k = 0; k < K; ++k) t[k] = t[k] * t[(k * 7 + 3) % K] + 1;
  }
  for (int k = 0; k < K; ++k) y[k] = t[k];
}
template __global__ void held<4>(const float*, float*, int);
template __global__ void held<200>(const float*, float*, int);
"""


@needs_nvcc
def test_a_kernel_that_spills_is_refused_and_named(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    checked = run("nvcc_check.sh", "sm_80", "sm_90", source)
    assert checked.returncode == 1
    for architecture in ("sm_80", "sm_90"):
        assert f"held<200> spills on {architecture}" in checked.stderr
    assert "held<4> spills" not in checked.stderr


@needs_nvcc
@pytest.mark.parametrize(
    "text",
    [
        "__global__ void kernel(float* y) { int unused; y[0] = 1; }",
        "static int never() { return 1; }\n__global__ void kernel(float* y) { y[0] = 1; }",  # the host's compiler
        '__global__ void kernel(float* y) { asm("no such instruction;"); }',
    ],
    ids=["warning", "host", "ptx"],
)
def test_a_warning_is_an_error(text, tmp_path):
    source = tmp_path / "warned.cu"
    source.write_text(text)
    checked = run("nvcc_check.sh", "sm_90", source)
    assert checked.returncode == 1
    assert "warned.cu is broken on sm_90" in checked.stderr
    assert len(checked.stderr.splitlines()) > 1  # the compiler's own words


@needs_nvcc
def test_one_broken_architecture_among_several_is_named(tmp_path):
    source = tmp_path / "old.cu"
    source.write_text("#if __CUDA_ARCH__ == 750\n#error too old\n#endif\n__global__ void kernel() {}")
    checked = run("nvcc_check.sh", "sm_90", "sm_75", source)
    assert checked.returncode == 1
    assert "old.cu is broken on sm_75\n" in checked.stderr
    assert "too old" in checked.stderr


def test_without_nvcc_nothing_is_checked():
    assert run("nvcc_check.sh", NVCC="no-such-compiler").returncode == 77


def test_other_arguments_are_refused():
    refused = run("nvcc_check.sh", "90")
    assert refused.returncode == 1
    assert "neither an architecture" in refused.stderr


def entry(name: str, architecture: str, uses: str, frame: str = "0 0 0") -> str:
    stack, stores, loads = frame.split()
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{architecture}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
        f"ptxas info    : Used {uses}\n"
        "ptxas info    : Compile time = 1.152 ms\n"
    )


SCALE, HIDDEN = "_Z5scaleIdEvPKT_PS0_i", "_ZN36_GLOBAL__N__487ec368_4_k_cu_537ee4c05spillIfLi400EEEvPKT_PS1_i"


@pytest.fixture
def table(tmp_path):
    def read(*logs: str) -> tuple[int, list[list[str]], str]:
        for i, log in enumerate(logs):
            (tmp_path / f"{i}.log").write_text("ptxas info    : 0 bytes gmem\n" + log)
        done = run("nvcc_table.sh", *(tmp_path / f"{i}.log" for i in range(len(logs))))
        return done.returncode, [line.split("  ") for line in done.stdout.splitlines()[1:]], done.stderr

    return read


def cells(row: list[str]) -> list[str]:
    return [cell.strip() for cell in row if cell.strip()]


needs_demangler = pytest.mark.skipif(not (shutil.which("c++filt") or shutil.which("cu++filt")), reason="no c++filt")


@needs_demangler
def test_the_table_has_a_row_a_kernel_and_a_column_an_architecture(table):
    used = "10 registers, used 0 barriers, 372 bytes cmem[0]"
    code, rows, errors = table(
        entry(SCALE, "sm_75", used) + entry(HIDDEN, "sm_75", "64 registers, used 1 barriers, 512 bytes smem", "96 0 0"),
        entry(HIDDEN, "sm_90", "32 registers, used 0 barriers, 96 bytes cumulative stack size", "96 0 0"),
    )
    assert (code, errors) == (0, "")
    assert [cells(row) for row in rows] == [
        ["sm_75", "sm_90"],
        ["scale<double>", "10"],  # and nothing for sm_90
        ["spill<float, 400>", "64 +512 ~96", "32 ~96"],
    ]


@needs_demangler
@pytest.mark.parametrize("frame", ["0 8 0", "0 0 8"])
def test_stores_or_loads_alone_are_a_spill(table, frame):
    code, rows, errors = table(entry(SCALE, "sm_80", "24 registers", frame))
    assert code == 1
    assert errors.startswith("nvcc-check: scale<double> spills on sm_80: ")
    assert cells(rows[1])[1].startswith("24 !")


def test_functions_that_are_no_kernels_count_too(table):
    helper = (
        "ptxas info    : Function properties for helper\n"
        "    16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
    )
    code, rows, errors = table(entry("kernel", "sm_86", "9 registers") + helper)
    assert code == 1
    assert errors.startswith("nvcc-check: helper spills on sm_86")
    assert [cells(row) for row in rows[1:]] == [["kernel", "9"], ["helper", "- ~16 !4/4"]]


@pytest.mark.parametrize(
    "log",
    [
        entry("kernel", "sm_90", "9 of them"),
        entry("kernel", "sm_90", "9 registers").replace("stack frame", "frame"),
    ],
    ids=["registers", "frame"],
)
def test_a_log_that_says_something_else_is_refused(table, log):
    code, _, errors = table(log)
    assert code == 1
    assert errors.startswith("nvcc-check: of ")


def test_a_source_may_have_no_kernel(table):
    assert table("")[::2] == (0, "")
