"""The library of autograd functions with CUDA kernels: the emulated ones, told to it as if the CPU were a GPU."""

import ctypes
import itertools

import pytest
import torch

import taylorkern as tk
from taylorkern import autograd, backends, direct, layers, ops
from taylorkern.backends import native
from tests import emulated
from tests.cases import LAYOUTS, normal

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no g++ to compile the emulated kernels with")
SHAPE = (3, 19, 7, 5)
SLOPE = 0.1
CPU = 0  # c10's number of the device type
STREAM = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
FORMS = [(activation, False) for activation in ops.ACTIVATIONS]
FORMS += [(activation, True) for activation in ops.ACTIVATIONS if ops.maskable(activation)]


class Connection:
    """The library with the emulated kernels in place of the CPU's; a stream was ``asked`` of these devices."""

    def __init__(self):
        self.asked, self.answer = [], 0
        backends.provider("batch_norm_act", torch.zeros(2, 2))  # loads the libraries
        self.library = direct.library()
        if self.library is None:
            pytest.skip("there is no library of autograd functions here")
        self.stream = STREAM(self._stream)
        address = ctypes.cast(self.stream, ctypes.c_void_p).value
        self.library.connect_cuda(CPU, *emulated.library().module.addresses, address)

    def _stream(self, device, to):
        self.asked.append(device)
        to[0] = None
        return self.answer

    def end(self):
        _, addresses = native.autograd()
        self.library.connect(*addresses, autograd.gradients, autograd.overwritten)


@pytest.fixture
def connection(poisoned):
    found = Connection()
    yield found
    found.end()


def launches():
    return emulated.library().controls.emulator_launches()


class Case:
    def __init__(self, dtype, layout, residual, training, shape=SHAPE):
        self.x = normal(shape, 1, dtype, layout).requires_grad_()
        self.residual = normal(shape, 2, dtype, layout).requires_grad_() if residual else None
        self.dy = normal(shape, 3, dtype, layout)
        self.layer = tk.BatchNorm2d(shape[1]).train(training)
        with torch.no_grad():
            self.layer.weight.copy_(normal(shape[1:2], 4))
            self.layer.bias.copy_(normal(shape[1:2], 5))
            self.layer.running_mean.copy_(normal(shape[1:2], 6))
        self.z = torch.ones(shape[:2]).requires_grad_()

    def results(self, y):
        leaves = [self.x, self.layer.weight, self.layer.bias, self.z]
        leaves += [] if self.residual is None else [self.residual]
        found = torch.autograd.grad(y, leaves, self.dy)
        return [y.detach(), *found, self.layer.running_mean.clone(), self.layer.running_var.clone()]


def by_python(monkeypatch, case, activation, resident_bytes=0):
    """The same by the functions of taylorkern/autograd.py and the same kernels."""
    provider = emulated.Provider(resident_bytes)
    with monkeypatch.context() as patch:
        patch.setitem(backends.PROVIDERS, "cpu", (provider,))
        patch.setattr(backends, "follow", provider.follow)
        y = layers._fused_in_python(case.layer, case.x, case.residual, case.z, activation, SLOPE)
        return case.results(y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_calls_the_kernels_as_python_does(connection, monkeypatch, dtype, layout):
    for training, (activation, residual) in itertools.product((True, False), FORMS):
        case, twin = (Case(dtype, layout, residual, training) for _ in range(2))
        before = launches()
        y = direct.fused(case.layer, case.x, case.residual, case.z, activation, SLOPE)
        assert y is not None and y.stride() == case.x.stride()
        found = case.results(y)
        assert launches() > before
        want = by_python(monkeypatch, twin, activation)
        for got, expected in zip(found, want, strict=True):
            assert torch.equal(got, expected), (training, activation, residual)
            assert got.dtype == expected.dtype and got.stride() == expected.stride()
    assert connection.asked and set(connection.asked) == {-1}  # a tensor of the CPU has no index


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unfused_normalisation_is_torchs_own_and_its_backward_the_kernels(connection, layout):
    case, twin = (Case(torch.float32, layout, False, True) for _ in range(2))
    before = launches()
    y = direct.gated(case.layer, case.x, case.z)
    assert launches() == before
    found = case.results(y)
    assert launches() > before
    plain = torch.nn.BatchNorm2d.forward(twin.layer, twin.x)
    assert torch.equal(y, plain)
    dx, dweight, dbias = torch.autograd.grad(plain, [twin.x, twin.layer.weight, twin.layer.bias], twin.dy)
    for got, want in zip(found[1:4], (dx, dweight, dbias), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[4].sum(0), (dweight * twin.layer.weight + dbias * twin.layer.bias).detach())


def test_waves_are_those_of_each_direction_and_change_no_bit(connection, monkeypatch):
    samples, positions, group = 2, 35, 64  # channels of one block of threads, for rows so short
    tensor = 4 * samples * positions * group  # bytes of a tensor that such a group has

    def run(waves):
        monkeypatch.setattr(direct, "_waves", lambda x: waves)
        case = Case(torch.float32, "contiguous", False, True, (samples, 150, 7, 5))
        begin = launches()
        y = direct.fused(case.layer, case.x, None, case.z, "relu", 0.0)
        middle = launches()
        return case.results(y), middle - begin, launches() - middle

    whole, forward, backward = run((0, 0))
    # The forward reads one tensor twice, the backward two; what is too little for a group is in vain.
    for waves, more in (((tensor, 0), (2, 0)), ((0, 2 * tensor), (0, 2)), ((tensor - 1, 2 * tensor - 1), (0, 0))):
        found, in_forward, in_backward = run(waves)
        assert (in_forward - forward, in_backward - backward) == tuple(3 * waves_more for waves_more in more)
        for got, want in zip(found, whole, strict=True):
            assert torch.equal(got, want)


def test_float64_is_left_to_others_and_incoming_gradients_alone(connection):
    case = Case(torch.float64, "contiguous", False, True)
    case.layer.double()
    assert direct.fused(case.layer, case.x, None, case.z.double(), "relu", 0.0) is None
    before = connection.library.written_over()
    case = Case(torch.float32, "channels_last", False, True)
    y = direct.fused(case.layer, case.x, None, case.z, "relu", 0.0)
    (y * 2).sum().backward()  # the engine alone holds what comes in
    assert case.x.grad is not None and connection.library.written_over() == before


def test_a_stream_that_torch_does_not_tell_is_an_error(connection):
    connection.answer = 1
    case = Case(torch.float32, "contiguous", False, True)
    with pytest.raises(RuntimeError, match="torch tells no CUDA stream"):
        direct.fused(case.layer, case.x, None, case.z, "relu", 0.0)


def test_without_cuda_kernels_nothing_is_taken_from_a_gpu(monkeypatch):
    class Pretender:
        is_cpu, is_cuda, device = False, True, torch.device("cuda:0")

    serving = {"batch_norm_act": backends.cuda.resident, "batch_norm_act_backward": backends.cuda.streamed}
    monkeypatch.setattr(backends, "provider", lambda operation, x: serving[operation])
    monkeypatch.setattr(backends.cuda, "_resident_bytes", lambda device: 77)
    monkeypatch.setattr(direct, "_connect_cuda", lambda: False)
    assert direct._waves(Pretender()) is None and direct._waves(None) is None
    monkeypatch.setattr(direct, "_connect_cuda", lambda: True)  # asked again: nobody remembers a failure
    assert direct._waves(Pretender()) == (77, 0)
    serving["batch_norm_act_backward"] = backends.triton_operations
    assert direct._waves(Pretender()) is None
