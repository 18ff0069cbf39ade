"""What the provider of CUDA C++ kernels hands to its library: the emulated one, on the CPU."""

from pathlib import Path

import pytest
import torch

from taylorkern.backends import build, cuda, reference
from tests import emulated
from tests.nonsense import refuses_nonsense

pytestmark = pytest.mark.usefixtures("no_cuda_tools")


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
