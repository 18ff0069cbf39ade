"""The curvature of gates by BackPACK and by curvlinops, two other implementations, against taylorkern's.

They come with the bench extra: pip install -c constraints.txt -e '.[bench]'
"""

from functools import partial

import pytest
import torch

from tests.cases import distance

NOT_THERE = "not installed: pip install -c constraints.txt -e '.[bench]'"
extensions = pytest.importorskip("backpack.extensions", reason=f"BackPACK is {NOT_THERE}")
curvlinops = pytest.importorskip("curvlinops", reason=f"curvlinops is {NOT_THERE}")

from bench import peers  # noqa: E402  imports both

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # BackPACK's, at the first layer
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # of what BackPACK's converter calls
]

CASES = ["chain", "residual"]
EXACT = {
    "BackPACK": lambda p: peers.by_backpack(p, extensions.DiagGGNExact()),
    "curvlinops": lambda p: peers.by_operator(p, curvlinops.GGNLinearOperator, peers.by_columns),
}


def small(network, linked=False):
    return peers.problem(network, width=4, size=8, classes=5, batch=6, linked=linked)


@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize("peer", EXACT)
def test_exact_diagonals_agree(network, peer):
    p = small(network)
    want = peers.ours(p, "exact")()
    assert distance(EXACT[peer](p)(), want) < 1e-9
    narrow = peers.in_float32(p)
    assert distance(EXACT[peer](narrow)().double(), peers.ours(narrow, "exact")()) < 1e-6


def test_linked_channels_agree_where_a_peer_can_share_a_gate():
    p = small("residual", linked=True)
    assert any(len(unit.places) > 1 for unit in p.scores().units)
    want = peers.ours(p, "exact")()
    assert distance(EXACT["curvlinops"](p)(), want) < 1e-9


@pytest.mark.parametrize("network", CASES)
def test_empirical_fishers_agree(network):
    p = small(network)
    want = peers.our_fisher(p)()
    assert distance(peers.by_backpack(p, extensions.SumGradSquared(), factor=len(p.x))(), want) < 1e-9
    assert distance(peers.by_operator(p, curvlinops.EFLinearOperator, peers.by_columns)(), want) < 1e-9


def by_fisher(p):
    fisher = partial(curvlinops.FisherMCLinearOperator, mc_samples=200)
    return peers.by_operator(p, peers.seeded(fisher), peers.by_columns)


def by_hutchinson(p):
    return peers.by_operator(p, curvlinops.GGNLinearOperator, partial(curvlinops.hutchinson_diag, num_matvecs=12))


# Name: how many means are taken, and the side that draws for each.
ESTIMATES = {
    "taylorkern, mc": (20, lambda p: peers.ours(p, "mc", 50)),
    "taylorkern, sketch": (20, lambda p: peers.ours(p, "sketch", 50)),
    "BackPACK, mc": (20, lambda p: peers.by_backpack(p, extensions.DiagGGNMC(200))),
    "curvlinops, mc": (20, by_fisher),
    "curvlinops, Hutchinson": (250, by_hutchinson),
}


@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_of_all_meet_our_exact_diagonal_in_the_mean(network, name):
    """Every unit within 5 standard errors of independent means; a bias of 10 % in the sum over units would be 5."""
    p = small(network)
    count, side = ESTIMATES[name]
    want, run = peers.ours(p, "exact")(), side(p)
    means = torch.stack([run().double() for _ in range(count)])
    error = means.std(0) / count**0.5
    assert bool(((means.mean(0) - want).abs() <= 5 * error + 1e-12 * want.max()).all())
    assert float(means.sum(1).std()) / count**0.5 < 0.02 * float(want.sum())
