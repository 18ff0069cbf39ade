"""What the tests of batch normalisation in C++ share: a network, and its results from C++ and from Python."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from taylorkern import direct
from tests.fused import CALLERS, X, called_from, needs_kernels
from tests.networks import randomised

needs_library = [needs_kernels, pytest.mark.skipif(direct.library() is None, reason="no library of autograd functions")]


def strides(t):
    """Those that mean something."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def equal(got, want):
    """Values, dtypes and layouts."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            assert (a.dtype, strides(a)) == (b.dtype, strides(b)), i
            assert torch.equal(a, b), i


class Net(nn.Module):
    """A normalisation with an activation, one with an addition too, and one by itself: two are fused, one is gated."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(3) for _ in range(3))
        self.conv = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv(x)))
        y = F.relu(self.bn2(y) + y)
        return self.bn3(y)


def net():
    torch.manual_seed(5)
    return tk.convert(randomised(Net()), fuse=True)


def results(model, y=None):
    """The model's gradients, what its gates have got, and its statistics."""
    gates = [s for m in model.modules() if getattr(m, "gate", None) is not None for s in m.gate.drain()]
    return [*([] if y is None else [y]), *(p.grad for p in model.parameters()), *gates, *model.buffers()]


def each(use, calls, x=X):
    """``use(model, x)`` from C++, in so many ``calls`` of it, and from Python; both have the same results."""
    found = []
    for caller in CALLERS:
        model = net()
        scores = tk.Scores(model, None)
        with called_from(caller) as counts:
            y = use(model, x)
        assert counts.total() == (calls if caller == "C++" else 0)
        found.append(results(model, y))
        del scores
    equal(*found)
    return found[0]


def step(model, x):
    y = model(x)
    y.sin().sum().backward()
    return y.detach()


def refusals(use, calls):
    """The error of ``use(model, x)`` from C++ and from Python: the same."""
    errors = []
    for caller in CALLERS:
        model = net()
        scores = tk.Scores(model, None)
        with called_from(caller) as counts, pytest.raises(Exception) as caught:
            use(model, X.clone())
        assert counts.total() == (calls if caller == "C++" else 0) and scores.dropped == 0
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    return caught.value


def either(use):
    """The calls in C++ of ``use(model)``, which gives the same results or errors from C++ and from Python."""
    found, calls = [], []
    for caller in CALLERS:
        model = net()
        scores = tk.Scores(model, None)
        with called_from(caller) as counts:
            try:
                y = use(model)
                found.append((None, results(model, y)))
            except Exception as error:
                found.append((type(error), [*model.buffers()]))
        calls.append(counts.total())
        del scores
    assert found[0][0] == found[1][0]
    equal(found[0][1], found[1][1])
    assert not calls[1]
    return calls[0]
