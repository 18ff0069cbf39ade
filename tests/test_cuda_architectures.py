"""For which GPUs the CUDA kernels are compiled."""

import pytest
import torch
from torch.utils import cpp_extension

from taylorkern.backends import architectures
from taylorkern.backends.architectures import Architecture, cover, gencode, parsed
from taylorkern.backends.toolchain import BuildError
from tests.toolkits import see

pytestmark = pytest.mark.usefixtures("no_cuda_tools")


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
