"""What the tests of fusion share: networks, a plain and a fused twin, who calls the kernels, and what ran fused."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from bench.zoo import torchvision
from taylorkern import backends, deferred, direct
from tests.cases import distance, normal
from tests.networks import randomised, residual

needs_kernels = pytest.mark.skipif(
    backends.provider("batch_norm_act", torch.zeros(2, 2)) is backends.reference, reason="no kernels here"
)

CALLERS = ("C++", "Python")
X = normal((2, 3, 5, 5), 1)


@contextmanager
def called_from(caller: str) -> Iterator[Counter]:
    """Has C++ call the kernels, or Python; gives how often "fused" and "gated" ran in C++."""
    counts: Counter = Counter()

    def counted(name, function):
        def call(*arguments):
            y = function(*arguments)
            counts[name] += y is not None
            return y

        return call

    with pytest.MonkeyPatch.context() as patch:
        if caller == "Python":
            patch.setattr(direct, "library", lambda: None)
        for name in ("fused", "gated"):
            patch.setattr(direct, name, counted(name, getattr(direct, name)))
        yield counts


@pytest.fixture(params=CALLERS)
def caller(request):
    """A test under each of them; both have to say the same."""
    backends.provider("batch_norm_act", X)  # loads the libraries
    if request.param == "C++" and direct.library() is None:
        pytest.skip("there is no library of autograd functions here")
    with called_from(request.param) as counts:
        yield request.param
    assert request.param == "C++" or not counts.total()


@pytest.fixture
def ran(monkeypatch):
    """What ran fused, counted: "act" without and "add" with a residual."""
    counts = Counter()
    fused = deferred.fused_batch_norm

    def counted(layer, gate, x, residual, *activation):
        counts["act" if residual is None else "add"] += 1
        return fused(layer, gate, x, residual, *activation)

    monkeypatch.setattr(deferred, "fused_batch_norm", counted)
    return counts


def build(name, arguments=None):
    """A network of torchvision's with ten classes and normalisations as after some training."""
    models = torchvision().models
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, num_classes=10, **(arguments or {}))
    if isinstance(model, models.VGG):
        model.classifier = nn.Linear(512 * 7 * 7, 10)  # its own takes most of the time, and normalises nothing
    return randomised(model)


def pair(kind):
    """A network and its fused twin; that something may be left is not the question here."""
    torch.manual_seed(0)
    plain = randomised(kind()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain, tk.convert(copy.deepcopy(plain), fuse=True)


def step(model, x):
    torch.manual_seed(1)  # dropout's mask
    out = model(x)
    out.sin().sum().backward()
    return out


def state(model):
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([*gradients, torch.ones(1)]), torch.cat([b.double().flatten() for b in model.buffers()])


def same(plain, fused, x, tolerance=1e-9):
    """One step of each: the same output, gradients and buffers."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [step(model, leaf * 1) for model, leaf in zip((plain, fused), leaves, strict=True)]
    assert distance(outputs[1], outputs[0]) < tolerance
    assert distance(leaves[1].grad, leaves[0].grad) < tolerance
    for want, got in zip(state(plain), state(fused), strict=True):
        assert distance(got, want) < tolerance


class Written(nn.Module):
    """Normalisations and what a forward may need; the spelling is the subclass's."""

    def __init__(self):
        super().__init__()
        self.bn, self.other, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.skip, self.norms, self.scale, self.on = nn.Identity(), nn.ModuleList([nn.BatchNorm2d(3)]), 0.5, True
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


class Plain(Written):
    def forward(self, x):
        return self.relu(self.bn(x))


class Summed(Written):
    def forward(self, x):
        return F.relu(self.bn(x) + x)


def spelled(forward):
    """The class with that forward."""
    return type(forward.__name__, (Written,), {"forward": forward})


class SqueezeExcite(nn.Conv2d):
    def __init__(self, c):
        super().__init__(c, c, 1)

    def forward(self, x):
        return x * super().forward(x.mean((2, 3), keepdim=True)).sigmoid()


class Bottleneck(nn.Module):
    """The way timm writes it."""

    def __init__(self, c=4, stride=1, se=False):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, stride, 1), nn.BatchNorm2d(c)
        self.drop_block, self.act2, self.aa = nn.Identity(), nn.ReLU(inplace=True), nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)
        self.se = SqueezeExcite(c) if se else None
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(c, c, 1, stride), nn.BatchNorm2d(c)) if stride > 1 else None
        self.drop_path = None

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)
        x = self.conv3(x)
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act3(x)
        return x


def sequential(*more):
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *more, nn.ReLU(), nn.Conv2d(4, 2, 1))


def trained(fuse):
    """A scored network after three steps."""
    torch.manual_seed(0)
    model = tk.convert(residual().double(), fuse=fuse)
    x = normal((4, 2, 8, 8), 1, torch.float64)
    scores = tk.Scores(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    return model, x, scores, optimizer
