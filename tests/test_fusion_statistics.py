"""Running statistics and modes of a fused normalisation: torch's, at every moment at which code can look at them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from tests.cases import distance, normal
from tests.fused import Plain, Summed, Written, X, needs_kernels, pair, same
from tests.fused import caller as caller
from tests.fused import ran as ran

pytestmark = [needs_kernels, pytest.mark.usefixtures("caller")]


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("tracked", [True, False])
def test_running_statistics_are_torchs(momentum, tracked, ran):
    plain = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum, track_running_stats=tracked), nn.ReLU()).double()
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    for seed in range(3):
        x = normal((2, 3, 4, 4), seed, torch.float64) * 2 + 1
        assert distance(fused(x), plain(x)) < 1e-12
    assert ran["act"] == 3 and len(list(plain.buffers())) == 3 * tracked
    for want, got in zip(plain.buffers(), fused.buffers(), strict=True):
        assert distance(got, want) < 1e-12
    assert distance(fused.eval()(x), plain.eval()(x)) < 1e-12


def test_untracked_statistics_stay_put(ran):
    model = tk.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), fuse=True)
    model[0].track_running_stats = False
    before = [b.clone() for b in model.buffers()]
    model(X)
    assert ran["act"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def running_mean_in_between(self, x):
    y = self.bn(x)
    z = self.bn.running_mean.mean()
    y = F.relu(y)
    return y * z


def running_mean_in_the_sum(self, x):
    return F.relu(self.bn(x) + x * self.bn.running_mean.sum())


def running_mean_by_a_variable(self, x):
    for norm in self.norms:
        y = norm(x)
        z = norm.running_mean.mean()
        x = F.relu(y) * z
    return x


def running_mean_in_a_sequential(self, x):
    y = self.tail(x)
    z = self.tail[1].running_mean.mean()
    y = F.relu(y)
    return y * z


def running_mean_of(module):
    return module.bn.running_mean.mean()


def instance_handed_on(self, x):
    y = self.bn(x)
    z = running_mean_of(self)
    y = F.relu(y)
    return y * z


def method_that_looks(self, x):
    y = self.bn(x)
    z = self.look()
    y = F.relu(y)
    return y * z


def looking_in_the_call(self, x):
    y = self.bn(x)
    return torch.mul(self.look(), F.relu(y))


def method_of_the_norm(self, x):
    y = self.bn(x)
    self.bn.eval()
    y = F.relu(y)
    self.bn.train()
    return y


def method_of_its_own(self, x):
    y = self.bn(x)
    self.eval()
    y = F.relu(y)
    self.train()
    return y


def momentum_set(self, x):
    y = self.bn(x)
    self.bn.momentum = 0.9
    y = F.relu(y)
    self.bn.momentum = 0.1
    return y


def weight_changed(self, x):
    y = self.bn(x)
    self.bn.weight.data.mul_(2)
    y = F.relu(y)
    return y


class Looking(Written):
    def look(self):
        return running_mean_of(self)


LOOKING = [
    running_mean_in_between,
    running_mean_in_the_sum,
    running_mean_by_a_variable,
    running_mean_in_a_sequential,
    instance_handed_on,
    method_that_looks,
    looking_in_the_call,
    method_of_the_norm,
    method_of_its_own,
    momentum_set,
    weight_changed,
]


@pytest.mark.parametrize("forward", LOOKING)
def test_code_that_looks_into_a_normalisation_finds_that_it_has_run(forward):
    plain, fused = pair(type(forward.__name__, (Looking,), {"forward": forward}))
    for seed in range(2):
        same(plain, fused, normal((2, 3, 5, 5), seed, torch.float64))


def others_called(self, x):
    y = self.bn(x)
    z = self.tail(x) if self.on is True else x
    for _ in range(2):
        z = self.norms[0](z)
    if self.skip is not None:
        z = self.skip(z)
    y += z * self.scale
    return self.relu(y)


def head_called(self, x):
    y = self.bn(x)
    return self.head(self.relu(y))


class Headed(Written):
    def head(self, y):
        return y * self.bn.running_mean.mean()


@pytest.mark.parametrize(("forward", "act", "add"), [(others_called, 0, 1), (head_called, 1, 0)])
def test_what_can_not_look_may_stand_in_between(forward, act, add, ran):
    plain, fused = pair(type(forward.__name__, (Headed,), {"forward": forward}))
    same(plain, fused, X.double())
    assert (ran["act"], ran["add"]) == (act, add)


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"momentum": 0.0}, {"momentum": 1.0}, {"eps": 0.1}, {"track_running_stats": False}]
)
def test_every_option_of_a_normalisation(options, ran):
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.BatchNorm2d(4)).double()
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    for training in (True, True, False):
        same(plain.train(training), fused.train(training), X.double())
    assert ran["act"] == 3


@pytest.mark.parametrize("weights", [True, False])
def test_a_frozen_normalisation_within_training(weights, ran):
    for kind in (Plain, Summed):
        models = pair(kind)
        for model in models:
            model.bn.eval().requires_grad_(weights)
        same(*models, X.double())
    assert sum(ran.values()) == 2
