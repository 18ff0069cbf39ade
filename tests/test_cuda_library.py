"""The CUDA library as this machine's nvcc makes it; on a GPU, streams, graphs and devices."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from taylorkern.backends import architectures, build, cuda, nvcc, reference
from taylorkern.backends.recipe import CUDA
from taylorkern.backends.toolchain import BuildError
from tests.nonsense import refuses_nonsense

pytestmark = pytest.mark.usefixtures("no_cuda_tools")


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
