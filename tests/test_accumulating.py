"""Adding a minibatch to the statistics: all of it or nothing, by a kernel and by torch alike."""

import pytest
import torch

from taylorkern import backends
from taylorkern.backends import native, reference
from tests.cases import normal
from tests.fused import needs_kernels

SHAPES = [(7,), (), (3, 4), (0,)]


@pytest.fixture(params=["kernel", "torch"])
def accumulate(request, monkeypatch):
    """By whom, asserted."""
    served = {"kernel": native, "torch": reference}[request.param]
    if request.param == "torch":
        monkeypatch.setattr(native, "accumulates", lambda totals, more: False)
    elif backends.provider("channel_scores", torch.zeros(2, 2)) is not native:
        pytest.skip("no kernels here")
    calls, own = [], served.accumulate
    monkeypatch.setattr(served, "accumulate", lambda *pair: calls.append(1) or own(*pair))
    yield backends.accumulate
    assert calls


def made(seed):
    return [normal(shape, seed + i, torch.float64) for i, shape in enumerate(SHAPES)]


def test_everything_is_added(accumulate):
    totals, more = made(0), made(10)
    want = [a + b for a, b in zip(totals, more, strict=True)]
    found, finite = accumulate(totals, more)
    assert int(finite) == 1
    assert all(torch.equal(got, expected) for got, expected in zip(found, want, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nothing_is_added_where_one_number_is_not_finite(accumulate, which, value):
    totals, more = made(0), made(10)
    before, given = [t.clone() for t in totals], [t.clone() for t in more]
    more[which].view(-1)[-1] = given[which].view(-1)[-1] = value
    found, finite = accumulate(totals, more)
    assert int(finite) == 0
    assert all(map(torch.equal, found, before))
    assert all(torch.equal(a, b) or which == i for i, (a, b) in enumerate(zip(more, given, strict=True)))


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.float(),
        lambda t: torch.cat([t, t])[::2],
        lambda t: t._neg_view(),
        lambda t: t[:-1],
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
    ],
    ids=["float32", "strided", "negated", "another shape", "meta", "sparse"],
)
def test_a_kernel_takes_only_what_it_can_read(change):
    plain = torch.ones(4, dtype=torch.float64)
    backends.provider("channel_scores", torch.zeros(2, 2))
    assert native.accumulates([plain], [plain])
    assert not native.accumulates([plain], [change(plain)])
    assert not native.accumulates([change(plain)], [plain])
