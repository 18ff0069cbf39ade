"""Where the CUDA library serves, and what is said where it does not."""

import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from taylorkern import backends, cli, doctor
from taylorkern.backends import architectures, build, cuda, nvcc, reference
from taylorkern.backends.recipe import CPU, CUDA
from taylorkern.backends.toolchain import BuildError
from tests.toolkits import script, see, toolkit

pytestmark = pytest.mark.usefixtures("no_cuda_tools")


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
