"""Gates folded into parameters of every dtype and layout: rounded once, what they were otherwise, or refused."""

import copy

import pytest
import torch
from torch import nn

from taylorkern.compensation import rounded
from taylorkern.coupling import couple
from taylorkern.surgery import SurgeryError, cut
from tests.networks import plain, residual
from tests.test_coupling import Net, conv
from tests.test_surgery import same, snapshot

IMAGE = torch.randn(2, 2, 8, 8)


def test_identity_dtype_layout_flags_and_gradients_stay():
    model = residual().to(memory_format=torch.channels_last).train()
    model[0].weight.requires_grad_(False)
    model[3].bn1.weight.requires_grad_(False)
    model(IMAGE).sum().backward()
    plainly = copy.deepcopy(model)
    before = [(p, p.requires_grad, p.dtype) for p in model.parameters()]
    for p, q in zip(model.parameters(), plainly.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    coupling = couple(model, IMAGE)
    z = torch.linspace(-1, 2, len(coupling.units))
    cut(plainly, coupling, [0, 1, 7], IMAGE)
    cut(model, coupling, [0, 1, 7], IMAGE, gates=z)
    for p, (old, requires_grad, dtype), q in zip(model.parameters(), before, plainly.parameters(), strict=True):
        assert p is old
        assert (p.requires_grad, p.dtype, p.stride()) == (requires_grad, dtype, q.stride())
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    for p, q in zip(model.buffers(), plainly.buffers(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kernel", [1, 3])
def test_scaled_filters_keep_their_memory_format(kernel):
    layers = [conv(4, 4, kernel), nn.ReLU(), nn.ConvTranspose2d(4, 6, kernel), nn.ReLU(), conv(6, 2, kernel)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)).to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    x = torch.randn(2, 4, 8, 8)
    coupling = couple(model, x)
    grads = [torch.randn_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    cut(model, coupling, [], x, gates=torch.linspace(-1, 2, len(coupling.units)))
    assert [p.stride() for p in model.parameters()] == strides
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype):
    """Verified at 1e-9 all the same: no rounding stands in the way of seeing a wrong channel."""
    torch.manual_seed(0)
    model, x = residual().to(dtype), IMAGE.to(dtype)
    wide = copy.deepcopy(model).double()
    coupling = couple(model, x)
    z = 0.4 + torch.randn(len(coupling.units), dtype=torch.float64)
    cut(model, coupling, [0, 8], x, gates=z)
    cut(wide, coupling, [0, 8], x.double(), gates=z)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, q.to(dtype))


HALF = torch.eye(2, dtype=torch.bfloat16)  # no cast that could be widened


def halved(net, x):
    return net.head(net.conv(x.bfloat16()).relu().mean((2, 3))) @ HALF


def test_networks_bound_to_half_precision_are_verified_in_it():
    torch.manual_seed(0)
    model = Net(halved, conv=conv(2, 64), head=nn.Linear(64, 2)).bfloat16()
    coupling = couple(model, IMAGE)
    with pytest.warns(UserWarning, match="in its own precision") as caught:
        cut(model, coupling, range(0, 64, 3), IMAGE, gates=torch.linspace(-1, 2, 64))
    assert caught[0].filename == __file__
    assert model.head.in_features == 42


def test_a_gate_that_overflows_is_refused():
    model = plain()
    coupling = couple(model, IMAGE)
    before = snapshot(model.half())
    z = torch.ones(len(coupling.units), dtype=torch.float64)
    z[0] = 1e9
    with pytest.raises(ValueError, match=r"0\.weight overflows torch\.float16"):
        cut(model, coupling, [1], IMAGE.half(), gates=z)
    assert same(before, snapshot(model))


def test_gates_that_overflow_on_the_way_are_named():
    model = plain().double()
    coupling, before = couple(model, IMAGE.double()), snapshot(model)
    z = torch.full((len(coupling.units),), 1e200, dtype=torch.float64)
    with pytest.raises(
        SurgeryError, match=r"before any cut, with these gates, the network computes non-finite numbers"
    ):
        cut(model, coupling, [0], IMAGE.double(), gates=z)
    assert same(before, snapshot(model))


def test_rounding_keeps_what_was_not_finite():
    weight = torch.tensor([torch.inf, 1.0, torch.nan])
    assert torch.equal(rounded("w", weight, weight.double()).isfinite(), weight.isfinite())
