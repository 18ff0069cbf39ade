"""Sums of several vectors by units: the order of additions is known, to the bit, and nothing is lost or added twice."""

import pytest
import torch

from taylorkern.backends import native
from taylorkern.weights import ByUnit


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def by(request, monkeypatch):
    """Who folds."""
    if request.param == "torch":
        monkeypatch.setattr(native, "folds", lambda pieces: False)


def by_hand(units, vectors, count):
    """Each vector by itself, in float64, then one vector after the other."""
    total = [0.0] * count
    for of, vector in zip(units, vectors, strict=True):
        own: dict[int, float] = {}
        for unit, number in zip(of.tolist(), vector.double().tolist(), strict=True):
            if unit >= 0:
                own[unit] = own.get(unit, 0.0) + number
        for unit, number in own.items():
            total[unit] += number
    return torch.tensor(total, dtype=torch.float64)


def random(*shape, low=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if low is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(low, 7, shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(40,), (13, 1, 29), (5, 0, 5), (0,)], ids=str)
def test_sums_are_those_of_loops_to_the_bit(lengths, dtype):
    units = [random(n, low=-1, seed=i) for i, n in enumerate(lengths)]
    vectors = [random(n, seed=10 + i).to(dtype) for i, n in enumerate(lengths)]
    got = ByUnit(units, 8)(vectors)
    assert got.dtype == torch.float64
    assert torch.equal(got, by_hand(units, vectors, 8))


def test_vectors_are_added_one_after_the_other():
    """Two small numbers of one vector are added to each other before they meet a large one; alone they are lost."""
    tiny = 2.0**-53
    units = [torch.tensor([0]), torch.tensor([0, 0])]
    vectors = [torch.tensor([1.0]).double(), torch.tensor([tiny, tiny]).double()]
    assert ByUnit(units, 1)(vectors).tolist() == [1.0 + 2 * tiny]
    assert ByUnit(units[::-1], 1)([torch.tensor([1.0, tiny]).double(), torch.tensor([tiny]).double()]).tolist() == [1.0]


def test_a_unit_without_a_number_has_none():
    assert ByUnit([torch.tensor([-1, -1])], 2)([torch.ones(2)]).tolist() == [0.0, 0.0]
