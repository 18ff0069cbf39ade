"""Folding: sums over units against plain loops over places, whatever the blocks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taylorkern import backends, folding
from taylorkern.backends import native
from taylorkern.folding import Folding
from tests.cases import distance, normal


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def by(request, monkeypatch):
    """Who folds."""
    usable = backends.provider("channel_scores", torch.zeros(2, 2)) is native
    if request.param == "torch":
        monkeypatch.setattr(native, "folds", lambda pieces: False)
    elif not usable:
        pytest.skip("no kernels here")
    return request.param


def by_hand(s, units, count):
    rows = torch.zeros(len(s), count, dtype=torch.float64)
    for channel, unit in enumerate(units.tolist()):
        if unit >= 0:
            rows[:, unit] += s[:, channel]
    return rows.sum(0), rows.square().sum(0)


def whole_numbers(*shape):
    """Sums of these are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).float()


CASES = {
    "one place each, in order": (torch.arange(7), 7),
    "one place each, shuffled": (torch.tensor([3, 0, 6, 2, 5, 1, 4]), 7),
    "several places": (torch.tensor([1, 1, 0, 3, 1, 3, 5, 0, 3, 3]), 6),
    "channels of no unit": (torch.tensor([-1, 2, -1, 0, 2, -1]), 4),
    "no channel of any unit": (torch.tensor([-1, -1]), 3),
    "no channel": (torch.zeros(0, dtype=torch.int64), 3),
}


@pytest.mark.parametrize("block", [1, 16, 2**17])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_a_loop_over_places(name, samples, block, monkeypatch):
    monkeypatch.setattr(folding, "BLOCK", block)
    units, count = CASES[name]
    s = whole_numbers(samples, len(units))
    for got, want in zip(Folding(units, count)(s), by_hand(s, units, count), strict=True):
        assert got.dtype == torch.float64 and torch.equal(got, want)


@pytest.mark.parametrize("widths", [(10,), (3, 7), (1,) * 10, (0, 4, 0, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_follow_one_another(widths, dtype):
    units = torch.tensor([2, 3, 4, 5, 1, 2, -1, 0, 1, 5])
    s = whole_numbers(3, 10).to(dtype)
    pieces = [piece.contiguous() for piece in s.split(widths, dim=1)]
    for got, want in zip(Folding(units, 7)(*pieces), by_hand(s, units, 7), strict=True):
        assert torch.equal(got, want)


def test_pieces_of_several_kinds_are_folded_too():
    units = torch.tensor([0, 1, 0, 1])
    s = whole_numbers(5, 4)
    for pieces in ([s[:, :2].double(), s[:, 2:].contiguous()], [s[:, :2], s[:, 2:]]):
        for got, want in zip(Folding(units, 2)(*pieces), by_hand(s, units, 2), strict=True):
            assert torch.equal(got, want)


def test_pieces_of_other_sample_counts_are_refused():
    with pytest.raises(RuntimeError, match="size"):
        Folding(torch.tensor([0, 1]), 2)(torch.zeros(3, 1), torch.zeros(2, 1))


def test_a_kernel_refuses_runs_that_reach_outside(by):
    if by == "torch":
        pytest.skip("torch's own indexing refuses by itself")
    s = torch.zeros(2, 3)
    for run in ([0, 1, 0, 3], [0, 0, 3, 2], [1, 0, 0, 1], [0, -1, 0, 1], [0, 0, -1, 1], [0, 0, 0, -1]):
        with pytest.raises(ValueError, match="reaches outside"):
            native.fold([s], torch.tensor([run]), 4)


def test_places_are_added_before_the_square_and_in_float64():
    s = torch.tensor([[1e8, 1.0, -1e8]])
    sums, squares = Folding(torch.tensor([0, 0, 0]), 1)(s)
    assert sums.tolist() == [1.0] and squares.tolist() == [1.0]


def test_the_gradients_are_left_as_they_are():
    s = whole_numbers(3, 4).double()
    before = s.clone()
    Folding(torch.arange(4), 4)(s)
    assert torch.equal(s, before)


def test_the_same_gradients_give_the_same_bits():
    units = torch.randint(-1, 300, (1000,), generator=torch.Generator().manual_seed(1))
    s = torch.randn(9, 1000, generator=torch.Generator().manual_seed(2))
    first, again = Folding(units, 300)(s), Folding(units, 300)(s)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# Who folds is the same for all examples of a run.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(-1, 6), min_size=0, max_size=20),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_rows_are_what_folding_sums(units, samples, dtype, seed):
    pieces = [part.contiguous() for part in normal((samples, len(units)), seed, dtype).tensor_split(3, dim=1)]
    fold = Folding(torch.tensor(units, dtype=torch.int64), 7)
    rows = fold.rows(*pieces)
    want = torch.zeros(samples, 7, dtype=torch.float64)
    for channel, unit in enumerate(units):
        if unit >= 0:
            want[:, unit] += torch.cat(pieces, dim=1)[:, channel]
    assert rows.dtype == torch.float64 and torch.equal(rows, want)
    sums, squares = fold(*pieces)
    assert distance(sums, rows.sum(0)) < 1e-12 and distance(squares, rows.square().sum(0)) < 1e-12
