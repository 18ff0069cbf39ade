"""Random networks of every kind of block: a cut equals the masked dense network, or is refused and changes nothing.

``NETWORKS=2000 python -m pytest tests/test_random_networks.py`` tries as many, and others each time; ``python -m
tests.random_networks`` counts and shrinks without stopping at the first.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from taylorkern.coupling import couple
from tests.random_blocks import KINDS
from tests.random_networks import (
    LENIENT,
    Outcome,
    Plan,
    WrongCutError,
    build,
    difference,
    draw,
    examine,
    masked,
    plans,
    same,
    shrunk,
    state,
    survey,
)

COUNT = int(os.environ.get("NETWORKS", 0))
COUNTED = {"max_examples": COUNT or 150, "derandomize": not COUNT, "database": None, **LENIENT}


@settings(**COUNTED)
@given(plans())
def test_cuts_are_equal_or_refused(plan):
    examine(plan, verify=True)


@settings(**COUNTED)
@given(plans())
def test_the_coupling_is_right_without_surgerys_verification(plan):
    examine(plan, verify=False)


def alone(where: str, kind: str, picks: tuple[int, ...] = ()) -> Plan:
    return Plan(where, ((where, ((kind, picks, ()),)),))


@pytest.mark.parametrize(("where", "kind"), [(where, kind) for where, kinds in KINDS.items() for kind in kinds])
def test_every_kind_of_block_is_cut_or_frozen(where, kind):
    for pick in range(4):
        assert examine(alone(where, kind, (pick,) * 6), verify=False).how in ("equal", "nothing to cut")


@pytest.mark.parametrize("where", KINDS)
def test_a_plain_chain_is_cut_whole(where):
    found = examine(alone(where, "Point"), verify=False)
    assert found == Outcome("equal", found.free, found.channels)
    assert found.channels - found.free == 3  # of the head, which are the network's outputs


def test_a_plan_gives_the_same_network_again():
    plan = Plan("image", (("image", (("Conv", (1,), ()), ("AsTokens", (), ((("Fused", (), ()),),)))),), (), 5)
    (a, x), (b, y) = build(plan), build(plan)
    assert all(torch.equal(s, t) for s, t in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert torch.equal(x[0], y[0]) and len(x[1]) != len(x[0]) and x[1].shape[2:] != x[0].shape[2:]


class Hidden(nn.Module):
    """Runs after any cut, and computes something else."""

    start, modulated, fixed = "tokens", (), True

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x / x.shape[-1])


def test_a_quiet_error_is_seen(monkeypatch):
    """The property has teeth: a network that surgery's verification refuses differs without it."""
    torch.manual_seed(0)
    inputs = [torch.randn(n, 5, 3, dtype=torch.float64) for n in (2, 3)]
    monkeypatch.setattr("tests.random_networks.build", lambda plan: (Hidden().double(), inputs))
    plan = alone("tokens", "Point", (3,))
    assert examine(plan, verify=True).how == "refused"
    with pytest.raises(WrongCutError, match="differs"):
        examine(plan, verify=False)
    assert shrunk(plan, verify=False) == alone("tokens", "Point").__class__("tokens", (("tokens", ()),))


def test_what_a_refusal_changed_is_seen():
    model = Hidden()
    before = state(model)
    assert same(before, state(model))
    model.enter.weight.data[0, 0] += 1
    assert not same(before, state(model))


def test_masks_are_taken_back():
    torch.manual_seed(1)
    model, inputs = build(alone("image", "Conv"))
    coupling = couple(model, inputs[0])
    before = state(model)
    with masked(model, coupling, draw(coupling)):
        assert not same(before, state(model))
    assert same(before, state(model))


def test_differences_are_relative_and_shapes_count():
    assert difference(torch.full((2,), 10.0), torch.tensor([10.0, 11.0])) == pytest.approx(0.1)
    assert difference(torch.ones(2), torch.ones(3)) == float("inf")


def test_a_survey_counts():
    totals, by_kind, wrong = survey(5, first=0, verify=True, kind="Excite")
    assert sum(totals.values()) == sum(by_kind["Excite"][how] for how in totals) == 5
    assert not wrong
