"""The Gram matrix over units, in every form: against autograd's matrices in float64, and whose rows it is of."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from bench.study.hessian_matrices import gauss_newton
from taylorkern import backends
from taylorkern import gram as grams
from taylorkern.gram import FORMS
from tests import test_devices
from tests.cases import distance
from tests.grams import EACH_FORM, batch, fisher, made, step, whole, within_layers
from tests.networks import plain, residual

on_meta = test_devices.scored  # a fixture


@pytest.mark.parametrize("build", [lambda: residual(3), plain])
def test_exact_rows_make_autograds_gauss_newton_matrix(build):
    model, scores = made(build)
    seeds, wide = [1, 2, 3], tk.revert(copy.deepcopy(model))
    for seed in seeds:
        step(model, seed, scores=scores, method="exact")
    want = torch.stack([gauss_newton(wide, scores.coupling, batch(seed)[0]) for seed in seeds]).mean(0)
    assert scores.gram_source == "curvature"
    assert distance(whole(scores), want) < 1e-10
    assert distance(whole(scores, "blocks"), within_layers(scores, want)) < 1e-10
    assert build is plain or any(len({layer for layer, _ in unit.places}) > 1 for unit in scores.units)


@pytest.mark.parametrize("training", [False, True])
@EACH_FORM
def test_fisher_rows_are_autograds_sample_by_sample(form, training):
    model, scores = made(form=form)
    model.train(training)
    want = fisher(model, scores, [1, 2])
    for seed in (1, 2):
        step(model, seed)
    assert scores.gram_source == "fisher"
    assert distance(whole(scores), within_layers(scores, want) if form == "blocks" else want) < 1e-10
    assert distance(whole(scores).diag(), scores.importance("taylor_fg")) < 1e-12


@EACH_FORM
def test_batch_sizes_may_change_and_meet_in_one_minibatch(form):
    model, scores = made(form=form)
    both = fisher(model, scores, [1], 7) + fisher(model, scores, [2], 3)
    sum(F.cross_entropy(model(x), target) for x, target in (batch(1, 7), batch(2, 3))).backward()
    step(model, 3, n=1)
    want = (both + fisher(model, scores, [3], 1)) / 2
    assert distance(whole(scores), within_layers(scores, want) if form == "blocks" else want) < 1e-10
    assert distance(whole(scores).diag(), scores.importance("taylor_fg")) < 1e-12


@EACH_FORM
@pytest.mark.parametrize("options", [{"draws": 3}, {"method": "mc", "draws": 2}, {"method": "exact"}, {"every_n": 2}])
def test_the_diagonal_is_the_curvature_of_the_minibatches_that_have_one(form, options):
    model, scores = made(form=form)
    generator = torch.Generator().manual_seed(5)
    step(model, 0)
    assert scores.gram_source == "fisher"
    for seed in (1, 2, 3):
        step(model, seed, scores=scores, generator=generator, **options)
    step(model, 4)
    assert scores.gram_source == "curvature" and scores.minibatches == 5
    assert distance(whole(scores).diag(), 2 * scores.importance("obd")) < 1e-12


def test_draws_average():
    model, scores = made()
    step(model, 1, scores=scores, draws=3, generator=torch.Generator().manual_seed(4))
    together, generator, single = whole(scores), torch.Generator().manual_seed(4), []
    for _ in range(3):
        scores.reset()
        step(model, 1, scores=scores, generator=generator)
        single.append(whole(scores))
    assert distance(together, torch.stack(single).mean(0)) < 1e-12


@EACH_FORM
def test_the_first_curvature_takes_the_place_of_fisher_rows_until_a_reset(form):
    model, scores = made(form=form)
    step(model, 1, scores=scores, method="exact")
    want = whole(scores)
    scores.reset()
    with pytest.raises(RuntimeError, match="no backward has reached a gate"):
        scores.gram()
    for seed in (2, 3):
        step(model, seed)
    assert scores.gram_source == "fisher"
    step(model, 1, scores=scores, method="exact")
    step(model, 4)
    assert scores.gram_source == "curvature" and distance(whole(scores), want) < 1e-14
    scores.reset()
    step(model, 2)
    assert scores.gram_source == "fisher" and distance(whole(scores).diag(), scores.importance("taylor_fg")) < 1e-12


def test_a_curvature_that_no_backward_followed_or_another_replaced_has_no_rows():
    model, scores = made()
    step(model, 1, scores=scores, method="exact")
    want = whole(scores)
    scores.reset()
    scores.curvature(model(batch(2)[0]))
    logits = model(batch(1)[0])
    scores.curvature(logits, method="mc")
    scores.curvature(logits, method="exact")
    F.cross_entropy(logits, batch(1)[1]).backward()
    assert torch.equal(whole(scores), want)
    scores.curvature(model(batch(2)[0]))
    step(model, 3)
    assert torch.equal(whole(scores), want)


def test_a_reservoir_with_room_and_blocks_are_the_full_matrix():
    found = {}
    for form in FORMS:
        model, scores = made(form=form)
        for seed in range(4):
            step(model, seed, n=seed + 1)
        found[form] = scores
    full = whole(found["full"])
    assert distance(whole(found["reservoir"]), full) < 1e-13
    for form in FORMS:
        assert distance(whole(found[form], "blocks"), within_layers(scores, full)) < 1e-13
    units = [block.units for block in found["blocks"].gram()]
    assert torch.equal(torch.cat(units).sort().values, torch.arange(len(scores.units)))
    assert len(units) == len({unit.places[0][0] for unit in scores.units}) > 1
    with pytest.raises(ValueError, match="make the scores with gram='full'"):
        found["blocks"].gram("full")
    with pytest.raises(ValueError, match="form='reservoir' is not one of 'full', 'blocks'"):
        found["reservoir"].gram("reservoir")


@pytest.mark.parametrize("together", [1, 8, 10**6])
@pytest.mark.parametrize("stripe", [1, 4])
@EACH_FORM
def test_how_many_rows_or_columns_go_together_makes_no_difference(form, together, stripe, monkeypatch):
    model, scores = made(form=form)
    monkeypatch.setattr(grams, "_TOGETHER", together)
    monkeypatch.setattr(grams, "_STRIPE", stripe)
    want = fisher(model, scores, [1, 2, 3])
    for seed in (1, 2, 3):
        step(model, seed)
    assert distance(whole(scores), within_layers(scores, want) if form == "blocks" else want) < 1e-10


@pytest.mark.parametrize("by", ["kernel", "torch"])
@EACH_FORM
def test_a_non_finite_minibatch_leaves_no_row(form, by, monkeypatch):
    if by == "torch":
        monkeypatch.setattr(backends.native, "accumulates", lambda *_: False)
    model, scores = made(form=form)
    for curved in (None, scores):
        step(model, 1, scores=curved)
        want = whole(scores)
        x, target = batch(2)
        x[3, 0, 0, 0] = torch.nan
        logits = model(x)
        if curved is not None:
            scores.curvature(logits, target)
        F.cross_entropy(logits, target).backward()
        scores.fold()
        assert distance(whole(scores), want) < 1e-14
    assert (scores.minibatches, scores.dropped) == (2, 2)
    scores.reset()
    (F.cross_entropy(model(x), target)).backward()
    with pytest.raises(RuntimeError, match="all 1 minibatches had non-finite"):
        scores.gram()


def test_training_and_scores_are_undisturbed():
    found = []
    for form in (None, *FORMS):
        model, scores = made(form=form, dtype=torch.float32)
        model.train()
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(7)
        for seed in range(3):
            step(model, seed, scores=scores if seed else None, generator=generator)
        after = torch.rand(3)
        gradients = [p.grad for p in model.parameters()]
        names = ("taylor_fo", "taylor_fg", "taylor_so", "obd")
        found.append([*gradients, *model.state_dict().values(), *map(scores.importance, names), after])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_loss_without_cotangents_is_refused_at_once():
    model, scores = made()
    with pytest.raises(ValueError, match="gave no cotangent"):
        scores.curvature(model(batch(0)[0]), loss=lambda logits, targets: [])
    assert not scores.expects_forward


class Folded(nn.Module):
    """Tokens folded into the samples for one layer."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.relu(self.tokens(x.flatten(0, 1))).view(len(x), -1))


def test_layers_that_do_not_see_the_samples_are_named():
    model = nn.Sequential(Folded(), nn.ReLU(), nn.Linear(2, 2))
    model = tk.convert(model)
    x = torch.randn(5, 2, 3)
    scores = tk.Scores(model, x, gram="full")
    model(x).square().mean().backward()
    for read in (scores.gram, lambda: scores.importance("taylor_so_fisher")):
        with pytest.warns(UserWarning, match=r"0\.tokens was given \[10\] samples and 0\.head \[5\]") as caught:
            read()
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores.importance("taylor_fo")


def test_forms_and_budgets():
    units = 3 + 3 + 6 + 6
    model, scores = made(form="auto", gram_budget=8 * units**2)
    assert len(scores.units) == units and scores.state_dict()["gram"]["form"] == "full"
    assert made(form="auto", gram_budget=8 * units**2 - 1)[1].state_dict()["gram"]["form"] == "blocks"
    x = batch(0)[0]
    for options, match in (
        ({"gram": "full", "gram_budget": 8 * units**2 - 1}, r"takes 2592 bytes for 18 units.*'blocks'.*'reservoir'"),
        ({"gram": "blocks", "gram_budget": 8 * (9 + 9 + 36 + 36) - 1}, "gram='blocks' takes 720 bytes.*'reservoir'"),
        ({"gram": "auto", "gram_budget": 700}, "gram='blocks' takes 720 bytes"),
        ({"gram": "reservoir", "gram_rows": 10, "gram_budget": 1439}, "1440 bytes.*fewer gram_rows"),
        ({"gram": "half"}, "gram='half' is not one of 'auto', 'full', 'blocks', 'reservoir'"),
        ({"gram_rows": 0}, "gram_rows=0 must be at least 1"),
        ({"gram_budget": 0}, "gram_budget=0"),
    ):
        with pytest.raises(ValueError, match=match):
            tk.Scores(model, x, **options)
    assert model[1].gate.owner() is scores  # a refused one has taken over nothing


def test_the_surgeon_is_no_criterion_but_has_the_matrix_kept():
    model, scores = made(form=None, criteria=["surgeon", "taylor_weight"])
    step(model, 1)
    assert distance(whole(scores), fisher(model, scores, [1])) < 1e-10
    assert scores.importance("taylor_weight").isfinite().all()
    with pytest.raises(ValueError, match=r'surgeon chooses sets.*tk.prune\(model, x, criterion="surgeon"\)'):
        scores.importance("surgeon")
    assert made(form="blocks", criteria=["surgeon"])[1].state_dict()["gram"]["form"] == "blocks"
    with pytest.raises(ValueError, match="no Gram matrix is kept"):
        made(form=None)[1].gram()


def test_each_channel_alone():
    torch.manual_seed(0)
    model = tk.convert(residual(3).double()).eval()
    scores = tk.Scores(model, None, layers=["1", "3.bn1"], gram="blocks")
    step(model, 1)
    assert [block.units.tolist() for block in scores.gram()] == [[0, 1, 2], [3, 4, 5]]
    assert distance(whole(scores), within_layers(scores, fisher(model, scores, [1]))) < 1e-10


@pytest.mark.parametrize("form", ["full", "blocks"])
@pytest.mark.parametrize("curved", [False, True])
def test_nothing_is_moved_and_nothing_waited_for(on_meta, form, curved, monkeypatch):
    """On the meta device, where no number can be looked at; with a product in every step."""
    monkeypatch.setattr(grams, "_TOGETHER", 3)
    monkeypatch.setitem(grams.PARTITIONS, "full", grams.PARTITIONS[form])
    model, scores = on_meta(residual, torch.empty(4, 2, 8, 8), criteria=["surgeon"])
    x = torch.empty(4, 2, 8, 8, device="meta")
    test_devices.step(model, scores, x, curved)
    scores.fold()  # the matrix goes where rows are
    for again in range(3):
        with test_devices.Followed() as followed:
            test_devices.step(model, scores, x, curved)
            scores.fold()
        assert not followed.moves and followed.launches["addmm_"] > 0
        if again == 1:
            scores.reset()
    assert scores.gram_source == ("curvature" if curved else "fisher")
    scores._tally.statistics.count = scores._tally.statistics.curved = torch.tensor(2)
    scores._tally.statistics.dropped = torch.tensor(0)
    blocks = scores.gram()
    assert (len(blocks) > 1) == (form == "blocks")
    assert all(block.matrix.is_meta and block.units.is_meta for block in blocks)
