"""By which nvcc the CUDA kernels are compiled, and what is said of one that does not fit."""

import shutil
from pathlib import Path

import pytest
import torch

from taylorkern.backends import architectures, nvcc
from taylorkern.backends.architectures import Architecture
from taylorkern.backends.toolchain import BuildError
from tests.toolkits import MADE, NVCC, script, toolkit, without_nvcc_on_path

pytestmark = pytest.mark.usefixtures("no_cuda_tools")


def test_a_sound_toolkit_is_taken(tools, tmp_path):
    assert tools.nvcc == (str(tmp_path / "toolkit" / "bin" / "nvcc"),)
    assert tools.release == "13.0.88"
    assert tools.runtime == tmp_path / "toolkit" / "lib64" / "libcudart.so.13"
    assert f"-Wl,-rpath,{tmp_path / 'toolkit' / 'lib64'}" in tools.links
    assert tools.architectures == (Architecture(9, 0),)


def test_places_are_asked_in_order(tmp_path, monkeypatch, hopper):
    names = ("NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "USUAL")
    found = {name: toolkit(tmp_path / name) for name in names}
    without_nvcc_on_path(monkeypatch, found["PATH"].parent, Path("/usr/bin"), Path("/bin"))
    monkeypatch.setenv("NVCC", f"{found['NVCC']} --an-option")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "CUDA_HOME"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "CUDA_PATH"))
    monkeypatch.setattr(nvcc, "USUAL", found["USUAL"])
    assert nvcc._command() == (str(found["NVCC"]), "--an-option")
    monkeypatch.delenv("NVCC")
    for name in names[1:]:
        assert nvcc.find_toolchain().nvcc == (str(found[name]),)
        found[name].unlink()
    with pytest.raises(BuildError, match="there is no nvcc in CUDA_HOME"):
        nvcc.find_toolchain()


def test_a_script_for_nvcc_finds_the_toolkit_behind_it(tmp_path, monkeypatch, hopper):
    real = toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("NVCC", str(script(tmp_path / "elsewhere" / "nvcc", f'#!/bin/sh\nexec {real} "$@"\n')))
    assert nvcc.find_toolchain().runtime.parent == real.parent.parent / "lib64"


def test_a_runtime_without_a_version_in_its_name_comes_first(tools, tmp_path):
    (tmp_path / "toolkit" / "lib").mkdir()
    (tmp_path / "toolkit" / "lib" / "libcudart.so").touch()
    assert nvcc.find_toolchain().runtime == tmp_path / "toolkit" / "lib" / "libcudart.so"


ANSWERS = {
    "wrong major": (NVCC.replace("{release}", "12.8"), "is of CUDA 12.8.88 and torch .* of CUDA 13.0: .*CUDA_HOME"),
    "too old": (NVCC.replace("{made}", "sm_75 sm_80"), "of CUDA 13.0.88 can't .* architecture 9.0, only for 7.5 8.0;"),
    "failing": ("#!/bin/sh\nexit 3\n", "doesn't run.*exit status 3.*NVCC"),
    "hanging": ("#!/bin/sh\nexec sleep 99\n", "doesn't run.*timed out.*NVCC"),
    "mute": ("#!/bin/sh\necho hello\n", "names no release of CUDA.*hello"),
    "not a program": ("", "doesn't run|names no release"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_nvcc_that_does_not_fit_is_a_reason(answer, tmp_path, monkeypatch, hopper):
    text, says = ANSWERS[answer]
    path = toolkit(tmp_path / "toolkit")
    path.write_text(
        text.replace("{folder}", str(path.parent.parent)).replace("{release}", "13.0").replace("{made}", MADE)
    )
    monkeypatch.setenv("NVCC", str(path))
    monkeypatch.setattr(nvcc, "ANSWER_TIMEOUT", 0.5)
    with pytest.raises(BuildError, match=says):
        nvcc.find_toolchain()


def test_another_minor_version_is_welcome(tmp_path, monkeypatch, hopper):
    monkeypatch.setenv("NVCC", str(toolkit(tmp_path / "toolkit", release="13.2")))
    assert nvcc.find_toolchain().release == "13.2.88"


def test_variants_are_made_by_who_makes_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.setenv("NVCC", str(toolkit(tmp_path / "toolkit")))
    monkeypatch.setenv(architectures.VARIABLE, "9.0a")
    assert "-gencode=arch=compute_90a,code=sm_90a" in nvcc.find_toolchain().commands[".cu"]
    monkeypatch.setenv(architectures.VARIABLE, "11.0a;3.5")
    with pytest.raises(BuildError, match=r"can't compile for architecture 3\.5 or 11\.0a"):
        nvcc.find_toolchain()


def test_a_toolkit_without_a_shared_runtime_is_a_reason(tmp_path, monkeypatch, hopper):
    path = toolkit(tmp_path / "toolkit")
    (tmp_path / "toolkit" / "lib64" / "libcudart.so.13").unlink()
    monkeypatch.setenv("NVCC", str(path))
    with pytest.raises(BuildError, match=f"libcudart.so of {path} is in none of .*{tmp_path / 'toolkit' / 'lib64'}"):
        nvcc.find_toolchain()


def test_a_chosen_nvcc_that_is_not_there_is_named(monkeypatch, hopper):
    monkeypatch.setenv("NVCC", "/nowhere/bin/nvcc --option")
    with pytest.raises(BuildError, match=r"named by NVCC, .*/nowhere/bin/nvcc"):
        nvcc.find_toolchain()


def test_torch_without_cuda_is_the_first_reason(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", None)
    for find in (nvcc.find_toolchain, nvcc.host_facts):
        with pytest.raises(BuildError, match="is built without CUDA"):
            find()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, []),
        ("g++", ["-ccbin", shutil.which("g++")]),
        ("g++ -m64 '-DA=b c'", ["-ccbin", shutil.which("g++"), "-Xcompiler=-m64", "-Xcompiler=-DA=b c"]),
        ("/bin/ccache g++", ["-ccbin", shutil.which("g++")]),
    ],
)
def test_nvcc_takes_the_compiler_that_is_chosen(chosen, expected, tmp_path, monkeypatch, hopper):
    monkeypatch.setenv("NVCC", str(toolkit(tmp_path / "toolkit")))
    if chosen:
        launcher = script(tmp_path / "ccache", '#!/bin/sh\nexec "$@"\n')
        monkeypatch.setenv("CXX", chosen.replace("/bin/ccache", str(launcher)))
    command = nvcc.find_toolchain().commands[".cu"]
    assert list(command)[1 : 1 + len(expected)] == expected
    assert ("-ccbin" in command) is bool(expected)
