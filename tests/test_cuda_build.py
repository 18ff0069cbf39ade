"""The CUDA build: for which GPUs, by which nvcc, and what is said where there is none. Little here needs a GPU."""

import itertools
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension

from taylorkern import backends, cli, doctor
from taylorkern.backends import architectures, build, cuda, native, nvcc, recipe, reference, toolchain
from taylorkern.backends.architectures import Architecture, cover, gencode, parsed
from taylorkern.backends.recipe import CPU, CUDA
from taylorkern.backends.toolchain import BuildError
from tests import emulated

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


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """A torch of CUDA 13, nothing chosen, nothing installed, nothing loaded."""
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH", "CXX", architectures.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(nvcc, "USUAL", Path("/nowhere/nvcc"))
    monkeypatch.setattr(cuda, "_outcome", None)
    monkeypatch.setattr(cuda, "_served", frozenset())


@pytest.fixture
def hopper(monkeypatch):
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9.0", "9.0"),
        ("8.0;9.0+PTX", "8.0 9.0+PTX"),
        ("9.0+PTX 8.0", "8.0 9.0+PTX"),
        ("8.0, 9.0,", "8.0 9.0"),
        (";8.0;;", "8.0"),
        ("10.0 9.0 8.6", "8.6 9.0 10.0"),
        ("9.0a", "9.0a"),
        ("9.0a;9.0", "9.0 9.0a"),
        ("9.0;9.0+PTX;9.0", "9.0+PTX"),
        ("10.0f", "10.0f"),
        ("12.1a+PTX", "12.1a+PTX"),
        ("Hopper", "9.0+PTX"),
        ("Ampere;Ada", "8.0 8.6+PTX 8.9+PTX"),
        ("Ampere+Tegra", "8.7"),
    ],
)
def test_a_list_of_architectures(text, expected):
    assert " ".join(map(str, parsed(text))) == expected
    assert parsed(expected) == parsed(text)


@pytest.mark.parametrize(
    "text", ["9", "sm_90", "9.0b", "9.0+ptx", "Hopper+PTX", "hopper", "8.0;banana", "-1.0", "9.00"]
)
def test_what_is_unknown_is_named_with_its_variable(text, monkeypatch):
    monkeypatch.setenv(architectures.VARIABLE, text)
    with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST=") as raised:
        architectures.wanted()
    assert repr(text) in str(raised.value)
    assert repr(text.split(";")[-1]) in str(raised.value)


@pytest.mark.parametrize("text", [";", " , ;"])
def test_a_list_of_nothing_is_no_list(text, monkeypatch):
    monkeypatch.setenv(architectures.VARIABLE, text)
    with pytest.raises(BuildError, match="names no architecture"):
        architectures.wanted()


@pytest.mark.parametrize(
    "text", ["9.0", "9.0a", "8.0;9.0+PTX", "7.5 8.0 8.6+PTX", "12.0a+PTX", *(n for n in architectures._NAMED)]
)
def test_nvcc_is_told_what_torch_tells_it(text, monkeypatch):
    monkeypatch.setenv(architectures.VARIABLE, text)
    assert sorted(gencode(architectures.wanted())) == cpp_extension._get_cuda_arch_flags()


@pytest.mark.parametrize("text", ["", " ", "native"])
def test_visible_devices_are_compiled_for_each_kind_once(text, monkeypatch):
    monkeypatch.setenv(architectures.VARIABLE, text)
    see(monkeypatch, (10, 0), (9, 0), (8, 6), (9, 0))
    assert list(map(str, architectures.wanted())) == ["8.6", "9.0", "10.0"]
    assert gencode([Architecture(9, 0)]) == ["-gencode=arch=compute_90,code=sm_90"]


def test_a_list_goes_before_what_is_visible(monkeypatch, hopper):
    see(monkeypatch, (8, 0))
    assert architectures.wanted() == (Architecture(9, 0),)


def test_no_visible_device_is_a_reason(monkeypatch):
    see(monkeypatch)
    with pytest.raises(BuildError, match=r"no GPU is visible.*TORCH_CUDA_ARCH_LIST"):
        architectures.wanted()


def test_devices_that_do_not_answer_are_a_reason(monkeypatch):
    def fail(device):
        raise RuntimeError("driver too old\nand more")

    see(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    with pytest.raises(BuildError, match=r"driver too old$"):
        architectures.wanted()


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("8.0;9.0", (9, 0), True),
        ("10.0", (12, 0), False),
    ],
)
def test_which_code_runs_where(built, capability, runs):
    assert cover(parsed(built), [capability]) is runs
    assert not cover(parsed(built), [capability, (5, 0)])


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


def fake(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    """A tensor on a GPU that isn't there."""
    with FakeTensorMode():
        return torch.empty(shape or (2, 3, 4), dtype=dtype, device="cuda")


def first_uses() -> list[str]:
    """What is warned where both providers are asked, more than once, and neither can serve."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for provider, operation in itertools.product([cuda.streamed, cuda.resident] * 2, cuda.OPERATIONS):
            assert not provider.supports(operation, fake())
    return [str(warning.message) for warning in caught if "taylorkern" in str(warning.message)]


def compile_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TAYLORKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setenv("NVCC", str(toolkit(tmp_path / "toolkit")))
    monkeypatch.setenv(architectures.VARIABLE, "9.0")


def unwritable(monkeypatch, tmp_path):
    compile_error(monkeypatch, tmp_path)
    (tmp_path / "cache").touch()


def no_nvcc(monkeypatch, tmp_path):
    compile_error(monkeypatch, tmp_path)
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")


def no_gpu(monkeypatch, tmp_path):
    see(monkeypatch)


def unknown(monkeypatch, tmp_path):
    monkeypatch.setenv(architectures.VARIABLE, "banana")


def no_cuda(monkeypatch, tmp_path):
    def refuse():
        raise BuildError("torch is built without CUDA")

    monkeypatch.setattr(nvcc, "torch_cuda", refuse)


REASONS = {
    compile_error: "nvcc failed; repair it or set NVCC or CXX to another.*nothing is compiled here",
    unwritable: "nvcc failed.*nothing is compiled here",
    no_nvcc: "named by NVCC",
    no_gpu: "no GPU is visible",
    unknown: "TORCH_CUDA_ARCH_LIST='banana'",
    no_cuda: "built without CUDA",
}


@pytest.mark.parametrize("reason", REASONS, ids=lambda function: function.__name__)
def test_one_line_says_why_and_who_serves(reason, monkeypatch, tmp_path):
    reason(monkeypatch, tmp_path)
    (warning,) = first_uses()
    assert "Triton serves" in warning and "PyTorch reference" in warning
    assert re.search(f"(?s){REASONS[reason]}", warning), warning
    status = cuda.streamed.status()
    assert not status.usable
    assert status.reason in warning
    assert not cuda.follows(*[torch.ones(3)] * 4)


def test_a_hanging_compilation_is_ended(tools, tmp_path, monkeypatch):
    text = Path(tools.nvcc[0]).read_text().replace("exit 1", "exec sleep 99")
    script(Path(tools.nvcc[0]), text)
    monkeypatch.setattr(build, "COMPILE_TIMEOUT", 0.5)
    with pytest.raises(BuildError, match=r"nvcc didn't finish in 1.5 s; try another NVCC or CXX"):
        build.build_ahead(tmp_path / "cache", CUDA)


class Module:
    """What a library of CUDA kernels says of itself."""

    compiler, cuda, architectures = "12.2", "13.0", "8.0"


def test_gpus_that_the_library_has_no_code_for_are_left_to_others(monkeypatch):
    library = build.Library(Module, Path("/lib.so"), "cache")
    monkeypatch.setattr(build, "load", lambda recipe: library)
    see(monkeypatch, (8, 6), (9, 0))
    with pytest.warns(
        RuntimeWarning, match=r"/lib.so is for 8.0, not for GPU 1 \(9.0\); .*TORCH_CUDA_ARCH_LIST"
    ) as told:
        assert [cuda.serves(index) for index in (0, 1, 0, 1)] == [True, False, True, False]
    assert len(told) == 1
    status = cuda.resident.status()
    assert status.usable
    assert status.detail == {"path": "/lib.so", "compiler": "nvcc 13.0 with 12.2", "architectures": "8.0"}
    monkeypatch.setattr(cuda, "_served", frozenset())
    assert not cuda.resident.status().usable


def test_what_is_served(monkeypatch):
    monkeypatch.setattr(cuda, "_outcome", build.Library(Module, Path("/lib.so"), "cache"))
    monkeypatch.setattr(cuda, "_served", frozenset({0}))
    monkeypatch.setattr(build, "load", None)  # it is loaded already
    for dtype, provider in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (cuda.streamed, cuda.resident)
    ):
        assert all(provider.supports(operation, fake(dtype)) for operation in backends.OPERATIONS)
        assert dtype in provider.DTYPES
    assert not cuda.streamed.supports("channel_scores", fake(torch.float64))
    assert not cuda.streamed.supports("channel_scores", fake(torch.float32, 3))
    assert not cuda.streamed.supports("channel_scores", torch.ones(2, 3))
    assert not cuda.streamed.supports("fold", fake())
    assert (cuda.streamed.__name__, cuda.resident.__name__) == ("cuda", "cuda resident")


def test_the_command_builds_both_and_names_what_it_skips(monkeypatch, capsys, tools):
    monkeypatch.setattr(build, "build_ahead", lambda out, recipe=CPU: out / f"{recipe.device}.so")
    assert cli.main(["build", "--out", "/image", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"library": "/image/CPU.so", "cuda": "/image/CUDA.so"}
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    assert cli.main(["build", "--out", "/image"]) == 0
    out, err = capsys.readouterr()
    assert "CUDA" not in out
    assert "no CUDA kernels are compiled: the CUDA compiler named by NVCC" in err


def test_the_doctor_tells_of_these_providers(monkeypatch, tools, tmp_path):
    monkeypatch.setenv("TAYLORKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(backends.PROVIDERS, "cuda", (cuda.streamed, cuda.resident, reference))
    facts = doctor.examine()
    serving = facts["operations"]["channel_scores"]["cuda"]
    assert {dtype: told["backend"] for dtype, told in serving.items()} == {
        "float32": "cuda", "float64": "reference", "bfloat16": "cuda", "float16": "cuda",
    }  # fmt: skip
    assert "not built yet" in serving["float32"]["why"] and "13.0.88 for 9.0" in serving["float32"]["why"]
    assert facts["nvcc"] == {"command": tools.nvcc[0], "version": "13.0.88 for 9.0", "missing": None}
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    facts = doctor.examine()
    assert "named by NVCC" in facts["nvcc"]["missing"]
    why = facts["operations"]["channel_scores"]["cuda"]["float32"]["why"]
    assert why.startswith("cuda can't: the CUDA compiler named by NVCC") and "cuda resident can't" in why
    assert why in doctor.tell(facts)


@pytest.fixture
def on_the_processor(monkeypatch):
    """The provider with emulated kernels, for tensors on the CPU; what it launched, with which last arguments."""
    if emulated.compiler() is None:
        pytest.skip("there is no g++")
    module, launched = emulated.library().module, []

    class Recording:
        def __getattr__(self, name):
            function = getattr(module, name)
            return (
                function
                if name == "workspace_bytes"
                else lambda *given: (launched.append((name, *given)), function(*given))
            )

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(cuda, "_outcome", build.Library(Recording(), Path("/lib.so"), "cache"))
    monkeypatch.setattr(cuda, "_resident_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    return launched


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_address_of_a_tensor_changes_no_bit(channels_last, on_the_processor):
    of = [torch.randn(3, 32, 7, 11, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    of = [t.contiguous(memory_format=torch.channels_last) if channels_last else t for t in of]

    def shifted(t):
        memory = torch.empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride(), 1)
        assert memory.data_ptr() % 16
        return memory.copy_(t)

    def results(x, dy):
        y, mean, var, _ = cuda.streamed.batch_norm_act(x, None, None, None, None, None, True, 1e-3, "relu", 0.0)
        back = cuda.streamed.batch_norm_act_backward(
            dy, x, y, None, None, mean, var, True, 1e-3, "relu", 0.0, True
        )  # fmt: skip
        return [cuda.streamed.channel_scores(x, dy), y, mean, var, *back]

    for got, want in zip(results(*map(shifted, of)), results(*of), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_arguments_arrive_where_they_belong(dtype, channels_last, on_the_processor):
    generator = torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, dy, residual = (random(3, 5, 4, 2).to(dtype) for _ in range(3))
    if channels_last:
        x, dy, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, residual))
    weight, bias, mean, var = random(5), random(5), random(5), random(5).abs() + 0.5
    results = []
    for provider in (cuda.streamed, cuda.resident, reference):
        found = [provider.channel_scores(x, dy)]
        for training, activation, beside in ((True, "relu6", residual), (False, "leaky_relu", None)):
            y, *statistics, mask = provider.batch_norm_act(
                x, beside, weight, bias, mean, var, training, 1e-3, activation, 0.2
            )
            back = provider.batch_norm_act_backward(
                dy, x, mask if mask.numel() else None, weight, bias, *statistics, training, 1e-3, activation, 0.2,
                beside is not None,
            )  # fmt: skip
            found += [y, *statistics, mask.float(), *back]
        results.append(found)
    streamed, resident, expected = results
    for one, other, right in zip(streamed, resident, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.float(), right.float(), rtol=2e-2, atol=2e-2)
    waves = [given[-1] for given in on_the_processor]
    assert waves == [0] * 5 + [1 << 20] * 5


def test_running_statistics_follow(on_the_processor):
    given = [torch.arange(4.0), torch.ones(4), torch.full((4,), 2.0), torch.full((4,), 3.0)]
    expected = [t.clone() for t in given]
    reference.follow(*expected, 0.25, 1.5)
    cuda.follow(*given, 0.25, 1.5)
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
    assert not torch.equal(given[0], torch.arange(4.0))


def test_a_tensor_of_another_device_has_it_made_the_current_one(on_the_processor, monkeypatch):
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            assert len(on_the_processor) == 1  # launched inside

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    cuda.streamed.channel_scores(torch.ones(2, 3), torch.ones(2, 3))
    assert entered == [torch.device("cpu")]


def test_the_bindings_refuse_what_no_kernel_takes(on_the_processor):
    refuses_nonsense(emulated.library().module)


def refuses_nonsense(module) -> None:
    """Every argument that could make a kernel read or write where it must not is refused, before a launch."""
    memory = torch.zeros(4096)
    at = memory.data_ptr() // 16 * 16 + 16
    shape = {"N": 1, "C": 2, "S": 3, "layout": 0, "dtype": 0}

    def scores(a=at, workspace=at, resident=0, **changed):
        module.channel_scores(a, at, at, *(shape | changed).values(), 0, workspace, resident)

    for changed, says in (
        ({"dtype": 1}, "no float64"),
        ({"dtype": 4}, "unknown dtype code 4"),
        ({"dtype": -1}, "unknown dtype"),
        ({"layout": 2}, "unknown layout code 2"),
        ({"N": -1}, "negative: -1"),
        ({"S": 1 << 62}, "overflow"),
        ({"a": 0}, "null pointer for a"),
        ({"workspace": at + 8}, "aligned to 16"),
        ({"resident": -1}, "resident_bytes is negative"),
    ):
        with pytest.raises(ValueError, match=says):
            scores(**changed)
    if module.workspace_bytes(*shape.values()):
        with pytest.raises(ValueError, match="null pointer for workspace"):
            scores(workspace=0)
    with pytest.raises(ValueError, match="no float64"):
        module.workspace_bytes(1, 2, 3, 0, 1)
    for code in (6, -1):
        with pytest.raises(ValueError, match="unknown activation"):
            module.batch_norm_act(at, 0, 0, 0, at, 0, at, at, 1e-5, True, code, 0.0, *shape.values(), 0, at, 0)
        with pytest.raises(ValueError, match="unknown activation"):
            module.batch_norm_act_backward(
                at, at, 0, 0, 0, 0, at, at, at, 0, at, at, at, 1e-5, True, code, 0.0, *shape.values(), 0, at, 0
            )
    for dtype, says in ((1, "no float64"), (2, "are float32")):
        with pytest.raises(ValueError, match=says):
            module.follow(at, at, at, at, 0.1, 1.0, 2, dtype, 0)
    with pytest.raises(ValueError, match="null pointer for running_var"):
        module.follow(at, at, at, 0, 0.1, 1.0, 2, 0, 0)
    assert not memory.any()


@pytest.fixture(scope="module")
def real() -> build.Library:
    """The real kernels, compiled by this machine's nvcc into the cache, for the GPUs it has or else for Hopper."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CXX", *([] if torch.cuda.is_available() else [architectures.VARIABLE])):
            patch.delenv(name, raising=False)
        if not torch.cuda.is_available():
            patch.setenv(architectures.VARIABLE, "9.0")
        try:
            release = torch.version.cuda or nvcc._release(nvcc._command())
            patch.setattr(nvcc, "torch_cuda", lambda: release)
            nvcc.find_toolchain()
        except BuildError as error:
            pytest.skip(str(error))
        path = build.build_ahead(None, CUDA)
        return build._load(path, "cache", CUDA)


def test_the_real_library_is_a_module_by_itself(real):
    content = real.path.read_bytes()
    assert b"libcudart.so." in content
    assert b"libtorch" not in content and b"libc10" not in content
    assert real.autograd is None
    built = json.loads((real.path.parent / "build.json").read_text())["facts"]
    assert real.module.architectures == built["architectures"]
    assert real.module.cuda.split(".")[0] == built["cuda"].split(".")[0]
    assert real.module.workspace_bytes(2, 64, 49, 0, 0) >= 0
    assert {name for name in dir(real.module) if not name.startswith("_")} == {
        "addresses", "architectures", "batch_norm_act", "batch_norm_act_backward", "channel_scores", "compiler", "cuda",
        "follow", "workspace_bytes",
    }  # fmt: skip


def test_the_real_bindings_refuse_what_no_kernel_takes(real):
    refuses_nonsense(real.module)


def test_without_a_gpu_cuda_itself_says_what_is_wrong(real):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    memory = torch.zeros(1 << 16)
    at = memory.data_ptr() // 16 * 16 + 16
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"could not be launched: .*(driver|device)"):
            real.module.channel_scores(at, at, at, 2, 3, 4, 0, 0, 0, at, 0)
        with pytest.raises(RuntimeError, match=r"could not be launched: .*(driver|device)"):
            real.module.follow(at, at, at, at, 0.1, 1.0, 4, 0, 0)
    real.module.channel_scores(0, 0, 0, 0, 3, 4, 0, 0, 0, at, 0)  # nothing to be done
    assert not memory.any()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def served(real, monkeypatch):
    """The providers as a first use finds them, without a word."""
    monkeypatch.setattr(nvcc, "torch_cuda", lambda: str(torch.version.cuda))
    monkeypatch.setattr(nvcc, "USUAL", Path("/usr/local/cuda/bin/nvcc"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.streamed.supports("channel_scores", torch.ones(2, 3, device="cuda"))
    return cuda.streamed, cuda.resident


@needs_gpu
def test_the_library_serves(served):
    status = cuda.status()
    assert status.usable and status.detail["path"]
    a, g = (torch.randn(4, 8, 7, 7, device="cuda") for _ in range(2))
    for provider in served:
        exact = reference.channel_scores(a.double(), g.double()).float()
        torch.testing.assert_close(provider.channel_scores(a, g), exact, rtol=1e-5, atol=1e-5)


@needs_gpu
def test_work_is_put_on_the_current_stream(served):
    """The inputs are written on a stream that is kept busy: a kernel on any other would read them too early."""
    stream = torch.cuda.Stream()
    a, g = (torch.zeros(8, 16, 28, 28, device="cuda") for _ in range(2))
    for provider in served:
        provider.channel_scores(a, g)  # loads its kernels, for which CUDA may wait
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        a.fill_(2)
        g.fill_(3)
        found = [provider.channel_scores(a, g) for provider in served]
    stream.synchronize()
    for s in found:
        assert torch.equal(s, torch.full((8, 16), 6.0 * 28 * 28, device="cuda"))


@needs_gpu
def test_streams_do_not_share_a_workspace(served):
    shape = (4, 32, 56, 56)
    inputs = [torch.full(shape, float(i), device="cuda") for i in range(1, 5)]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, t in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append([provider.channel_scores(t, t) for provider in served])
        torch.cuda.synchronize()
        for i, pair in enumerate(found, start=1):
            assert all(torch.equal(s, torch.full(shape[:2], float(i * i * 56 * 56), device="cuda")) for s in pair)


@needs_gpu
def test_a_graph_captures_every_operation(served):
    x, dy = (torch.randn(4, 8, 14, 14, device="cuda") for _ in range(2))
    weight, bias = torch.rand(8, device="cuda"), torch.rand(8, device="cuda")

    def work(provider):
        y, mean, var, _ = provider.batch_norm_act(x, None, weight, bias, None, None, True, 1e-5, "relu", 0.0)
        back = provider.batch_norm_act_backward(dy, x, None, weight, bias, mean, var, True, 1e-5, "relu", 0.0, False)
        return [provider.channel_scores(x, dy), y, mean, var, *back]

    for provider in served:
        for _ in range(2):
            work(provider)  # kernels are loaded outside of a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work(provider)
        x.normal_()
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, work(provider), strict=True))


@needs_gpu
def test_running_statistics_follow_on_a_gpu(served):
    given = [torch.rand(5, device="cuda") for _ in range(4)]
    assert cuda.follows(*given)
    expected = [t.clone() for t in given]
    reference.follow(*expected, 0.1, 1.25)
    cuda.follow(*given, 0.1, 1.25)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other)


@needs_gpu
def test_another_device_than_the_current_one(served):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    a = torch.ones(2, 3, 4, device="cuda:1")
    with torch.cuda.device(0):
        assert torch.equal(cuda.streamed.channel_scores(a, a), torch.full((2, 3), 4.0, device="cuda:1"))
