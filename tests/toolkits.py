"""CUDA toolkits that compile nothing, and GPUs that are not there: what tests of the CUDA library begin with."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from taylorkern.backends import architectures, cuda, nvcc, toolchain

MADE = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"

# A toolkit's nvcc that answers questions, and logs and fails at everything else
NVCC = """#!/bin/sh
echo "$@" >> {folder}/log
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-code) printf '%s\\n' {made} ;;
  --dryrun) echo "#\\$ TOP={folder}/bin/.." >&2 ;;
  *) echo "nothing is compiled here"; exit 1 ;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(folder: Path, release: str = "13.0", made: str = MADE) -> Path:
    """A folder with an nvcc and the runtime; returns nvcc."""
    (folder / "lib64").mkdir(parents=True)
    (folder / "lib64" / "libcudart.so.13").touch()
    return script(folder / "bin" / "nvcc", NVCC.format(folder=folder, release=release, made=made))


@pytest.fixture
def no_cuda_tools(monkeypatch):
    """A torch of CUDA 13, nothing chosen, nothing installed, nothing loaded."""
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH", "CXX", architectures.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(nvcc, "USUAL", Path("/nowhere/nvcc"))
    monkeypatch.setattr(cuda, "_outcome", None)
    monkeypatch.setattr(cuda, "_served", frozenset())


@pytest.fixture
def hopper(no_cuda_tools, monkeypatch):
    monkeypatch.setenv(architectures.VARIABLE, "9.0")


@pytest.fixture
def tools(tmp_path, monkeypatch, hopper) -> nvcc.CudaToolchain:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "toolkit").parent.parent))
    return nvcc.find_toolchain()


def see(monkeypatch, *capabilities: tuple[int, int]) -> None:
    """Make devices of these capabilities visible."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])


def without_nvcc_on_path(monkeypatch, *folders: Path) -> None:
    """PATH with these folders alone; the C++ compiler stays."""
    compiler = shutil.which("g++")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setattr(toolchain, "_ninja", lambda: "ninja")
