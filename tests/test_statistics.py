"""Statistics: sums over minibatches, whole or not at all; saved, merged and gathered over processes."""

import pytest
import torch

from taylorkern import backends
from taylorkern.statistics import Statistics, gathered
from tests.cases import normal

SHAPES = {"gate": (), "shares": (3,)}


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def by(request, monkeypatch):
    """Who adds."""
    if request.param == "torch":
        monkeypatch.setattr(backends.native, "accumulates", lambda *_: False)


def minibatch(seed, units=5):
    return {name: normal((units, *shape), seed, torch.float64) for name, shape in SHAPES.items()}


def made(*seeds, units=5):
    here = Statistics(SHAPES, units)
    for seed in seeds:
        here.add(minibatch(seed, units))
    return here


def same(a, b):
    assert all(torch.equal(a.sums[name], b.sums[name]) for name in SHAPES)
    assert [int(n) for n in (a.count, a.curved, a.dropped)] == [int(n) for n in (b.count, b.curved, b.dropped)]


def test_sums_and_counts():
    here = made(1, 2)
    here.add(minibatch(3), curved=True)
    for name, total in here.sums.items():
        assert torch.equal(total, minibatch(1)[name] + minibatch(2)[name] + minibatch(3)[name])
    assert (int(here.count), int(here.curved), int(here.dropped)) == (3, 1, 0)


def test_a_minibatch_that_is_not_finite_is_dropped_whole_and_told():
    here, bad = made(1), minibatch(2)
    bad["shares"][4, 2] = torch.inf
    assert int(here.add(bad, curved=True)) == 0
    assert all(torch.equal(here.sums[name], minibatch(1)[name]) for name in SHAPES)
    assert (int(here.count), int(here.curved), int(here.dropped)) == (1, 0, 1)
    assert int(here.add(minibatch(3), curved=True)) == 1


def test_names_that_a_minibatch_lacks_stay_as_they_are():
    here = made(1)
    here.add({"gate": minibatch(2)["gate"]})
    assert torch.equal(here.sums["shares"], minibatch(1)["shares"]) and int(here.count) == 2


def test_everything_stays_in_its_memory():
    here = made(1)
    held = [*here.sums.values(), here.count, here.curved, here.dropped]
    where = [t.data_ptr() for t in held]
    here.add(minibatch(2), curved=True)
    here.merge(made(3).state_dict())
    now = [*here.sums.values(), here.count, here.curved, here.dropped]
    assert [t.data_ptr() for t in now] == where and all(a is b for a, b in zip(held, now, strict=True))


def test_kept_units_go_on_and_a_reset_forgets():
    here, kept = made(1, 2), torch.tensor([0, 3, 4])
    here.keep(kept)
    assert all(torch.equal(here.sums[name], made(1, 2).sums[name][kept]) for name in SHAPES)
    here.add(minibatch(3, 3))
    assert int(here.count) == 3
    here.reset(2)
    assert [t.shape for t in here.sums.values()] == [(2,), (2, 3)]
    assert not any(t.any() for t in (*here.sums.values(), here.count, here.curved, here.dropped))


def test_a_state_is_a_copy_that_goes_on_to_the_bit():
    here = made(1)
    state = here.state_dict()
    here.add(minibatch(2))
    there = Statistics(SHAPES, 5)
    there.load_state_dict(state)
    there.add(minibatch(2))
    same(there, here)
    assert state["minibatches"] == 1 and torch.equal(state["sums"]["gate"], minibatch(1)["gate"])


def test_a_state_that_lacks_a_statistic_is_refused():
    state = Statistics({"gate": ()}, 5).state_dict()
    with pytest.raises(ValueError, match=r"lack the statistics \['shares'\]; pass the same criteria="):
        made(1).check(state)
    Statistics({"gate": ()}, 5).check(made(1).state_dict())


def test_merging_adds_everything():
    here, other = made(1), made(2, 3)
    other.add(minibatch(4), curved=True)
    other.add({name: value * torch.nan for name, value in minibatch(5).items()})
    here.merge(other.state_dict())
    for name, total in here.sums.items():
        assert torch.equal(total, minibatch(1)[name] + other.sums[name])
    assert (int(here.count), int(here.curved), int(here.dropped)) == (4, 1, 1)


def test_inference_mode_leaves_nothing_that_nobody_may_write_to():
    with torch.inference_mode():
        here = made(1)
        here.load_state_dict(here.state_dict())
    here.merge(made(2).state_dict())
    here.add(minibatch(3))
    assert int(here.count) == 3


def test_gathering_without_a_group_says_what_to_do():
    with pytest.raises(RuntimeError, match="init_process_group"):
        gathered({})
