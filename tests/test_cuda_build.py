"""The CUDA build: its key, its units, and when it is made again."""

import shutil
from pathlib import Path

import pytest

from taylorkern.backends import architectures, build, native, nvcc, recipe, toolchain
from taylorkern.backends.architectures import parsed
from taylorkern.backends.recipe import CPU, CUDA
from tests.toolkits import see, toolkit

pytestmark = pytest.mark.usefixtures("no_cuda_tools")


def test_key_depends_on_tools_and_architectures(tools, tmp_path, monkeypatch):
    keys = [build.Wanted.here(CUDA).key]
    assert build.Wanted.here(CUDA).key == keys[0]
    monkeypatch.setenv(architectures.VARIABLE, "9.0+PTX")
    keys.append(build.Wanted.here(CUDA).key)
    monkeypatch.setenv(architectures.VARIABLE, "9.0;8.0")
    keys.append(build.Wanted.here(CUDA).key)
    monkeypatch.setenv("NVCC", str(toolkit(tmp_path / "another")))
    keys.append(build.Wanted.here(CUDA).key)
    monkeypatch.setenv("NVCC", str(toolkit(tmp_path / "newer", release="13.1")))
    keys.append(build.Wanted.here(CUDA).key)
    monkeypatch.setenv("CXX", "g++ -m64")
    keys.append(build.Wanted.here(CUDA).key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("flags", ["FLAGS", "BINDING_FLAGS"])
def test_key_depends_on_the_flags(flags, tools, monkeypatch):
    before = build.Wanted.here(CUDA).key
    monkeypatch.setattr(nvcc, flags, [*getattr(nvcc, flags), "-DANOTHER"])
    assert build.Wanted.here(CUDA).key != before


@pytest.mark.parametrize(
    "fact", ["taylorkern", "sources", "cuda", "machine", "python", "pybind11", "flags", "architectures"]
)
def test_key_depends_on_every_fact(fact, tools):
    facts = nvcc.host_facts()
    assert toolchain.key(facts | {fact: "another"}, tools) != toolchain.key(facts, tools)


def test_neither_build_is_made_again_for_the_other(tools, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(toolchain.sources(), tmp_path / "csrc"))
    monkeypatch.setattr(toolchain, "sources", lambda: folder)

    def changed(path: Path) -> dict[str, bool]:
        before = [wanted.key for wanted in map(build.Wanted.here, (CPU, CUDA))]
        path.write_text(path.read_text() + "\n")
        after = [wanted.key for wanted in map(build.Wanted.here, (CPU, CUDA))]
        return dict(zip(("CPU", "CUDA"), (a != b for a, b in zip(after, before, strict=True)), strict=True))

    shared, cpu, gpu = {"CPU": True, "CUDA": True}, {"CPU": True, "CUDA": False}, {"CPU": False, "CUDA": True}
    for path in [p for p in folder.rglob("*") if p.suffix in toolchain.SOURCE_SUFFIXES]:
        name = path.relative_to(folder).as_posix()
        wanted = gpu if name.startswith(("cuda/", "bind_cuda")) else shared if name.endswith(".h") else cpu
        assert changed(path) == (cpu if name.startswith(("cpu/", "autograd")) else wanted), name


def test_the_cpu_build_asks_no_nvcc(tmp_path, monkeypatch):
    path = toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("NVCC", str(path))
    assert build.Wanted.here().toolchain
    recipe.ninja_file(toolchain.find_toolchain(), "key")
    native.status()
    assert not (tmp_path / "toolkit" / "log").exists()


def test_every_unit_is_compiled_once_with_its_flags(tools):
    text = recipe.ninja_file(tools, "key", CUDA.parts)
    binding, kernels, link = (
        next(line for line in text.splitlines() if line.startswith("  command") and mark in line)
        for mark in ("-DTAYLORKERN_MODULE=_taylorkern_cuda_key ", "-gencode=arch=compute_90,code=sm_90", "-shared")
    )
    assert {*nvcc.BINDING_FLAGS} <= {*binding.split()}
    assert {*nvcc.FLAGS, tools.nvcc[0]} <= {*kernels.split()}
    assert str(tools.runtime) in link
    assert "torch/include" not in text
    units = [line.split()[-1] for line in text.splitlines() if line.startswith("build ") and ".o:" in line]
    csrc = toolchain.sources()
    assert sorted(units) == sorted(map(str, [csrc / "bind_cuda.cpp", *csrc.rglob("*.cu")]))
    assert not {*map(str, (unit for part in CPU.parts for unit in part.units()))} & {*units}


@pytest.mark.parametrize(
    ("built", "wanted", "serves"),
    [("8.0 9.0", "9.0", True), ("8.0 9.0", "8.6 9.0", True), ("8.0", "9.0", False), ("8.0+PTX", "9.0", True)],
)
def test_a_build_for_more_gpus_serves_where_there_is_no_nvcc(built, wanted, serves, tools, tmp_path, monkeypatch):
    monkeypatch.setenv(architectures.VARIABLE, built)
    monkeypatch.setattr(build, "_compile", lambda _, __, work: (work / "taylorkern_cuda.so").write_bytes(b"code"))
    path = build.build_ahead(tmp_path / "cache", CUDA)
    monkeypatch.delenv(architectures.VARIABLE)
    see(monkeypatch, *((one.major, one.minor) for one in parsed(wanted)))
    assert build.Wanted.here(CUDA).find(tmp_path / "cache") is None  # nvcc would make another
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    assert build.Wanted.here(CUDA).find(tmp_path / "cache") == (path if serves else None)
    monkeypatch.setattr(nvcc, "torch_cuda", lambda: "12.8")
    assert build.Wanted.here(CUDA).find(tmp_path / "cache") is None


def test_a_damaged_library_is_compiled_anew(tools, tmp_path, monkeypatch):
    compiled = []

    def compile_(wanted, key, work):
        compiled.append(key)
        (work / "taylorkern_cuda.so").write_bytes(b"code")

    monkeypatch.setattr(build, "_compile", compile_)
    path = build.build_ahead(tmp_path, CUDA)
    assert build.build_ahead(tmp_path, CUDA) == path
    path.write_bytes(b"cod")
    assert build.Wanted.here(CUDA).find(tmp_path) is None
    assert build.build_ahead(tmp_path, CUDA) == path
    assert path.read_bytes() == b"code"
    assert compiled == [path.parent.name] * 2
    assert build.Wanted.here(CPU).find(tmp_path) is None
