"""Each activation behind a normalisation, in each spelling: gradients, scores and statistics are the unfused ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from taylorkern import deferred
from tests.cases import LAYOUTS, distance, in_layout, normal
from tests.fused import build, needs_kernels, pair, same, sequential, spelled
from tests.fused import caller as caller
from tests.fused import ran as ran

pytestmark = [needs_kernels, pytest.mark.usefixtures("caller")]

# What is written, the operation that runs, its slope, and whether it can stand behind an addition.
MODULES = {
    "ReLU": (nn.ReLU(), "relu", 0.0, True),
    "ReLU in place": (nn.ReLU(inplace=True), "relu", 0.0, True),
    "ReLU6": (nn.ReLU6(), "relu6", 0.0, True),
    "ReLU6 in place": (nn.ReLU6(inplace=True), "relu6", 0.0, True),
    "LeakyReLU": (nn.LeakyReLU(), "leaky_relu", 0.01, True),
    "LeakyReLU in place": (nn.LeakyReLU(0.3, inplace=True), "leaky_relu", 0.3, True),
    "LeakyReLU of 0": (nn.LeakyReLU(0, inplace=True), "leaky_relu", 0.0, True),
    "LeakyReLU above 1": (nn.LeakyReLU(1.5, inplace=True), "leaky_relu", 1.5, True),
    "LeakyReLU below 0": (nn.LeakyReLU(-0.2), "leaky_relu", -0.2, True),
    "SiLU": (nn.SiLU(), "silu", 0.0, False),
    "SiLU in place": (nn.SiLU(inplace=True), "silu", 0.0, False),
    "Hardswish": (nn.Hardswish(), "hardswish", 0.0, False),
    "Hardswish in place": (nn.Hardswish(inplace=True), "hardswish", 0.0, False),
}


class Moduled(nn.Module):
    def __init__(self, activation, added):
        super().__init__()
        self.bn, self.activation, self.added = nn.BatchNorm2d(3), activation, added

    def forward(self, x):
        y = self.bn(x)
        if self.added:
            y += 3 * x
        return self.activation(y)


def scored(plain, fused, x, layers=("bn",)):
    """A scored step of each: the same outputs, gradients, statistics and scores."""
    scores = [tk.Scores(model, None, layers=layers) for model in (plain, fused)]
    same(plain, fused, x)
    want, got = (s.importance("taylor_fg") for s in scores)
    assert distance(got, want) < 1e-9 and want.count_nonzero() > len(want) / 2


@pytest.fixture
def operations(monkeypatch):
    """What ran fused: name, slope, and whether behind an addition."""
    found = []
    fused = deferred.fused_batch_norm

    def recorded(layer, gate, x, residual, *activation):
        found.append((*activation, residual is not None))
        return fused(layer, gate, x, residual, *activation)

    monkeypatch.setattr(deferred, "fused_batch_norm", recorded)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, added, training, layout, operations):
    activation, operation, slope, behind_sums = MODULES[name]
    plain, fused = pair(lambda: Moduled(activation, added))
    x = in_layout(normal((3, 3, 5, 5), 1, torch.float64), layout)
    scored(tk.convert(plain).train(training), fused.train(training), x)
    assert operations == [(operation, slope, added)] * (not added or behind_sums)


@pytest.mark.parametrize("name", MODULES)
def test_sequentials(name, operations):
    activation, operation, slope, _ = MODULES[name]
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity(), activation, nn.Conv2d(4, 2, 1)).double()
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    scored(tk.convert(plain), fused, normal((3, 3, 5, 5), 1, torch.float64), layers=("0", "1"))
    assert operations == [(operation, slope, False)]


def relu6(self, x):
    return F.relu6(self.bn(x))


def relu6_in_place(self, x):
    y = self.bn(x)
    F.relu6(y, inplace=True)
    return y


def relu6_of_a_sum(self, x):
    return F.relu6(3 * x + self.bn(x), inplace=True)


def leaky_relu(self, x):
    return F.leaky_relu(self.bn(x))


def leaky_relu_of_a_sum(self, x):
    return F.leaky_relu(self.bn(x) + 3 * x, inplace=True)


def overwritten_afterwards(self, x):
    y = F.relu6(self.bn(x) + 3 * x)
    y += 1
    z = F.leaky_relu(self.other(x) + y)
    z *= 2
    return z


def leaky_relu_of_a_position(self, x):
    return F.leaky_relu(self.bn(x), 0.3)


def leaky_relu_of_a_name(self, x):
    y = self.bn(x)
    y = F.leaky_relu(y, negative_slope=0.3, inplace=True)
    return y


def leaky_relu_of_an_attribute(self, x):
    y = self.bn(x)
    F.leaky_relu(y, self.scale, True)
    return y


def leaky_relu_in_place(self, x):
    y = self.bn(x)
    F.leaky_relu_(y, 0.3)
    return y


def leaky_relu_below_zero(self, x):
    return F.leaky_relu(self.bn(x), -0.2)


def leaky_relu_below_zero_of_a_sum(self, x):
    return F.leaky_relu(self.bn(x) + 3 * x, -0.2)


def silu(self, x):
    return F.silu(self.bn(x))


def silu_in_place(self, x):
    y = self.bn(x)
    F.silu(y, inplace=True)
    return y


def silu_of_a_sum(self, x):
    return F.silu(self.bn(x) + 3 * x)


def hardswish(self, x):
    return F.hardswish(3 * self.bn(x), inplace=True) + F.hardswish(self.other(3 * x), True)


def hardswish_of_a_sum(self, x):
    y = self.bn(x)
    y += 3 * x
    F.hardswish(y, inplace=True)
    return y


def hardtanh(self, x):
    return F.hardtanh(self.bn(x), 0.0, 6.0)


def slope_of_a_tensors_number(self, x):
    return F.leaky_relu(self.bn(x), self.bn.eps)


FUNCTIONALS = [
    (relu6, [("relu6", 0.0, False)]),
    (relu6_of_a_sum, [("relu6", 0.0, True)]),
    (relu6_in_place, [("relu6", 0.0, False)]),
    (leaky_relu, [("leaky_relu", 0.01, False)]),
    (leaky_relu_of_a_sum, [("leaky_relu", 0.01, True)]),
    (overwritten_afterwards, [("relu6", 0.0, True), ("leaky_relu", 0.01, True)]),
    (leaky_relu_of_a_position, [("leaky_relu", 0.3, False)]),
    (leaky_relu_of_a_name, [("leaky_relu", 0.3, False)]),
    (leaky_relu_of_an_attribute, [("leaky_relu", 0.5, False)]),
    (leaky_relu_in_place, [("leaky_relu", 0.3, False)]),
    (leaky_relu_below_zero, [("leaky_relu", -0.2, False)]),
    (leaky_relu_below_zero_of_a_sum, [("leaky_relu", -0.2, True)]),
    (silu, [("silu", 0.0, False)]),
    (silu_in_place, [("silu", 0.0, False)]),
    (silu_of_a_sum, []),
    (hardswish, [("hardswish", 0.0, False)]),
    (hardswish_of_a_sum, []),
    (hardtanh, []),
    (slope_of_a_tensors_number, []),
]


@pytest.mark.parametrize(("forward", "expected"), FUNCTIONALS, ids=lambda f: getattr(f, "__name__", ""))
def test_functions(forward, expected, operations):
    plain, fused = pair(spelled(forward))
    scored(tk.convert(plain), fused, normal((3, 3, 5, 5), 1, torch.float64))
    assert operations == expected


def test_a_slope_changed_later_is_the_one_that_runs(operations):
    plain, fused = pair(lambda: sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1)))
    plain[3].negative_slope = fused[3].negative_slope = 0.7
    same(plain, fused, normal((3, 3, 5, 5), 1, torch.float64))
    assert operations == [("leaky_relu", 0.7, False)]


def test_a_relu6_with_other_bounds_is_not_one(operations):
    plain, fused = pair(lambda: sequential(nn.BatchNorm2d(4), nn.ReLU6(inplace=True)))
    plain[3].max_val = fused[3].max_val = 0.5
    same(plain, fused, normal((3, 3, 5, 5), 1, torch.float64))
    assert not operations


def twice(self, x):
    return F.leaky_relu(self.bn(x), 0.3, negative_slope=0.2)


def unknown(self, x):
    return F.silu(self.bn(x), slope=0.3)


def too_many(self, x):
    return F.relu6(self.bn(x), True, True)


def argument_of_a_module(self, x):
    return self.relu(self.bn(x), True)


@pytest.mark.parametrize("forward", [twice, unknown, too_many, argument_of_a_module])
def test_calls_that_torch_refuses_are_refused_in_its_words(forward):
    said = []
    for model in pair(spelled(forward)):
        with pytest.raises(TypeError) as caught:
            model(normal((3, 3, 5, 5), 1, torch.float64))
        said.append(str(caught.value))
    assert said[0] == said[1]


# By hand. MobileNetV2: stem, head, one in the first block and two in each of 16. V3 small: stem and head; of 11 blocks
# one has one activation and ten have two, the first three blocks' five ReLUs. EfficientNet: as V2, in 16 blocks.
NETWORKS = {
    "mobilenet_v2": {"relu6": 35},
    "mobilenet_v3_small": {"relu": 5, "hardswish": 18},
    "efficientnet_b0": {"silu": 33},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, operations):
    plain = tk.convert(build(name).double())
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    scored(plain, fused, normal((3, 3, 32, 32), 1, torch.float64), layers=None)
    assert {kind: operations.count((kind, 0.0, False)) for kind in NETWORKS[name]} == NETWORKS[name]
    assert len(operations) == sum(NETWORKS[name].values())
