"""The Gram matrix over units: against autograd's matrices in float64, in every form, saved, merged, cut and reduced."""

import copy
import doctest
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing, nn

import taylorkern as tk
from bench.study.hessian_matrices import gauss_newton
from taylorkern import backends
from taylorkern import gram as grams
from taylorkern.coupling import Unit
from taylorkern.folding import Folding
from taylorkern.gram import FORMS, Reservoir, gram_matrix
from tests import test_devices
from tests.cases import distance, normal
from tests.networks import gate_gradients, plain, residual

on_meta = test_devices.scored  # a fixture

EACH_FORM = pytest.mark.parametrize("form", FORMS)


def batch(seed, n=7, dtype=torch.float64):
    return normal((n, 2, 8, 8), seed, dtype), (torch.arange(n) * (seed + 2)) % 5


def made(build=lambda: residual(3), form="full", dtype=torch.float64, **options):
    """In evaluation mode: samples don't act on one another, and the Gauss-Newton rows are exact."""
    torch.manual_seed(0)
    model = tk.convert(build().to(dtype)).eval()
    return model, tk.Scores(model, batch(0, dtype=dtype)[0], gram=form, **options)


def step(model, seed, n=7, scores=None, **curvature):
    x, target = batch(seed, n, next(model.parameters()).dtype)
    model.zero_grad()
    logits = model(x)
    if scores is not None:
        scores.curvature(logits, target, **curvature)
    F.cross_entropy(logits, target).backward()


def whole(scores, form=None):
    """[U, U], zeros between the blocks."""
    units = len(scores.units)
    matrix = torch.zeros(units, units, dtype=torch.float64)
    for block in scores.gram(form):
        assert torch.equal(block.matrix, block.matrix.T) and torch.equal(block.units, block.units.sort().values)
        matrix[block.units.unsqueeze(1), block.units] = block.matrix
    return matrix


def within_layers(scores, matrix):
    first = [unit.places[0][0] for unit in scores.units]
    return torch.tensor([[a == b for b in first] for a in first]) * matrix


def fisher(model, scores, seeds, n=7):
    wide = tk.revert(copy.deepcopy(model))
    rows = [gate_gradients(wide, scores.units, *batch(seed, n)) for seed in seeds]
    return torch.stack([n * s.T @ s for s in rows]).mean(0)


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


@EACH_FORM
def test_saved_in_the_middle_and_read_or_not_the_bits_are_the_same(form, tmp_path, monkeypatch):
    monkeypatch.setattr(grams, "_TOGETHER", 16)
    straight_model, straight = made(form=form, gram_rows=16)
    model, scores = made(form=form, gram_rows=16)
    for seed in range(7):
        step(straight_model, seed)
        step(model, seed)
        if seed in (1, 3, 4):
            scores.gram()
            torch.save(scores.state_dict(), tmp_path / "state")
            model, scores = made(form=form, gram_rows=16, seed=seed)
            scores.load_state_dict(torch.load(tmp_path / "state"))
            assert scores.minibatches == seed + 1
    assert torch.equal(whole(scores), whole(straight))
    assert torch.equal(scores.importance("taylor_fg"), straight.importance("taylor_fg"))


def test_a_state_is_a_copy_and_remembers_its_source():
    model, scores = made()
    step(model, 1, scores=scores)
    want, state = whole(scores), scores.state_dict()
    step(model, 2, scores=scores)
    scores.load_state_dict(state)
    assert scores.gram_source == "curvature" and torch.equal(whole(scores), want)


def test_states_without_the_matrix_or_with_another_form_are_refused_and_nothing_changes():
    states = {}
    for form in (None, *FORMS):
        model, scores = made(form=form)
        step(model, 1)
        states[form] = scores.state_dict()
    small = made(form="reservoir", gram_rows=5)[1].state_dict()
    assert "gram" not in states[None]
    for form, wrong in (("full", None), ("full", "blocks"), ("blocks", "full"), ("reservoir", None)):
        model, scores = made(form=form)
        step(model, 2)
        want = whole(scores)
        for act in (scores.load_state_dict, scores.merge):
            with pytest.raises(ValueError, match="pass the same gram="):
                act(states[wrong])
            with pytest.raises(ValueError, match=r"rows, and here it has|pass the same gram="):
                act(small)
        assert torch.equal(whole(scores), want) and scores.minibatches == 1
    model, scores = made(form=None)
    scores.load_state_dict(states["full"])
    scores.merge(states["full"])
    assert scores.minibatches == 2
    with pytest.raises(ValueError, match="gram='full'"):
        scores.gram()
    with pytest.raises(ValueError, match="gram='full'"):
        _ = scores.gram_source


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


@EACH_FORM
def test_after_a_cut_it_is_that_of_the_kept_units_and_goes_on(form):
    model, scores = made(form=form)
    for seed in (1, 2):
        step(model, seed)
    before, places = whole(scores), [unit.places for unit in scores.units]
    importance = torch.rand(len(places), generator=torch.Generator().manual_seed(3))
    removed = {unit.places for unit in tk.prune(model, batch(0)[0], importance, target=0.6, of="channels")}
    kept = torch.tensor([u for u, place in enumerate(places) if place not in removed])
    assert 0 < len(kept) == len(scores.units) < len(places)
    assert distance(whole(scores), before[kept][:, kept]) < 1e-14
    after = fisher(model, scores, [3])
    step(model, 3)
    want = (2 * before[kept][:, kept] + (within_layers(scores, after) if form == "blocks" else after)) / 3
    assert distance(whole(scores), want) < 1e-10
    with pytest.raises(ValueError, match="before or after a cut"):
        made(form=form)[1].load_state_dict(scores.state_dict())


def test_a_layer_that_loses_all_its_units_leaves_no_block():
    units = [Unit(((layer, c),)) for layer in ("a", "b", "c") for c in range(3)]
    kept = gram_matrix("blocks", units, 2**20, 1, 0)
    rows = normal((5, 9), 1, torch.float64)
    kept.add([rows], 1, "fisher")
    left = torch.tensor([1, 2, 6])
    kept.keep(left)
    kept.add([rows[:, :3]], 1, "fisher")
    blocks = kept.blocks([units[u] for u in left], "blocks", 1)
    assert [block.units.tolist() for block in blocks] == [[0, 1], [2]]
    want = rows[:, left].T @ rows[:, left] + rows[:, :3].T @ rows[:, :3]
    assert all(distance(b.matrix, want[b.units][:, b.units]) < 1e-14 for b in blocks)


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


def test_a_reservoir_is_read_whole_only_where_that_fits_the_budget():
    model, scores = made(form="reservoir", gram_rows=5, gram_budget=8 * 300)
    step(model, 1)
    units = len(scores.units)
    assert units**2 > 300 and len(scores.gram()) > 1 and len(scores.gram("full")) == 1


def test_a_minibatch_without_samples_is_one_of_nought():
    model, scores = made(form="reservoir")
    model(batch(0, 1)[0][:0]).sum().backward()
    assert scores.minibatches == 1 and not whole(scores).any()


def test_a_loss_without_cotangents_is_refused_at_once():
    model, scores = made()
    with pytest.raises(ValueError, match="gave no cotangent"):
        scores.curvature(model(batch(0)[0]), loss=lambda logits, targets: [])
    assert not scores.curvature_waits


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


@EACH_FORM
@pytest.mark.parametrize("curved", [False, True])
def test_merged_scores_are_those_of_all_minibatches(form, curved):
    def scored(*seeds):
        model, scores = made(form=form)
        for seed in seeds:
            step(model, seed, scores=scores if curved else None, generator=torch.Generator().manual_seed(seed))
        return scores

    together, first, second = scored(1, 2, 3), scored(1), scored(2, 3)
    nothing = made(form=form)[1]
    nothing.merge(first.state_dict())
    nothing.merge(made(form=form)[1].state_dict())
    nothing.merge(second.state_dict())
    first.merge(second.state_dict())
    for merged in (first, nothing):
        assert merged.minibatches == 3 and merged.gram_source == together.gram_source
        assert distance(whole(merged), whole(together)) < 1e-13
        for name in ("taylor_fo", "taylor_fg", *(["obd", "taylor_so"] if curved else [])):
            assert distance(merged.importance(name), together.importance(name)) < 1e-13


@EACH_FORM
def test_rows_of_two_kinds_are_not_merged(form):
    states = []
    for curved in (False, True):
        model, scores = made(form=form)
        step(model, 1, scores=scores if curved else None)
        states.append(scores.state_dict())
    for mine, theirs in (states, states[::-1]):
        model, scores = made(form=form)
        scores.load_state_dict(mine)
        want = whole(scores)
        with pytest.raises(ValueError, match=r"rows of two kinds make no Gram matrix"):
            scores.merge(theirs)
        assert torch.equal(whole(scores), want) and scores.minibatches == 1


def test_layers_that_one_of_the_merged_has_scored_are_not_silent():
    model, scores = made(form=None)
    state = scores.state_dict()
    step(model, 1)
    want = scores.state_dict()["silent"]
    scores.merge(state)
    assert state["silent"] and scores.state_dict()["silent"] == want == []


def numbered(start, number):
    return torch.arange(start, start + number, dtype=torch.float64).unsqueeze(1)


def sampled(seed, *numbers, capacity=6):
    """The rows in a reservoir after pieces of ``numbers`` rows, each row its own number."""
    reservoir = Reservoir([Unit((("a", 0),))], capacity, seed)
    for i, number in enumerate(numbers):
        reservoir.add([numbered(sum(numbers[:i]), number)], 1, "fisher")
    return reservoir


def merged(seed):
    """20 rows in two reservoirs, of 13 and of 7."""
    first, second = sampled(seed, 9, 4), Reservoir([Unit((("a", 0),))], 6, seed + 10**6)
    second.add([numbered(13, 7)], 1, "fisher")
    first.merge(second.state_dict())
    return first


@pytest.mark.parametrize("sample", [lambda seed: sampled(seed, 4, 1, 15), merged], ids=["algorithm R", "merged"])
def test_every_row_has_the_same_chance_of_a_place(sample):
    """6 of 20 rows, 1000 times: each row, and each pair, within 5 standard deviations."""
    times, rows = 1000, torch.zeros(1000, 20, dtype=torch.float64)
    for seed in range(times):
        found = sample(seed).state_dict()
        assert found["seen"] == 20 and len(found["rows"].unique()) == 6
        rows[seed, found["rows"].flatten().long()] = 1
    for got, chance in ((rows.mean(0), 6 / 20), ((rows.T @ rows / times)[torch.ones(20, 20).triu(1) > 0], 30 / 380)):
        assert float((got - chance).abs().max()) < 5 * (chance * (1 - chance) / times) ** 0.5


def test_a_reservoir_estimates_the_full_matrix_without_bias():
    units, rows, estimates = [Unit((("a", c),)) for c in range(5)], normal((28, 5), 1, torch.float64), []
    want = rows.T @ rows / 4
    for seed in range(300):
        reservoir = Reservoir(units, 10, seed)
        reservoir.add(rows.split((7, 1, 20)), 1, "fisher")
        [block] = reservoir.blocks(units, "full", 4)
        estimates.append(block.matrix)
    drawn = torch.stack(estimates)
    assert bool(((drawn.mean(0) - want).abs() <= 5.5 * drawn.std(0) / 300**0.5).all())


def test_a_reservoir_is_seeded():
    def rows(seed):
        model, scores = made(form="reservoir", gram_rows=4, seed=seed)
        for _ in range(2):
            scores.reset()
            for batch_seed in range(3):
                step(model, batch_seed)
            yield whole(scores)

    (first, after_a_reset), (again, _), (other, _) = rows(1), rows(1), rows(2)
    assert torch.equal(first, after_a_reset) and torch.equal(first, again) and not torch.equal(first, other)


def refused_reduction(model, scores, why, curved=False):
    """The states before and after."""
    step(model, 1, scores=scores if curved else None)
    before = scores.state_dict()
    with pytest.raises(ValueError, match=why):
        scores.all_reduce()
    return before, scores.state_dict()


def reduced(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for form in FORMS:
        model, scores = made(form=form, gram_rows=9, seed=rank)
        for seed in range(2 + rank):
            step(model, 10 * rank + seed)
        own = scores.state_dict()
        scores.all_reduce()
        found[form] = own, scores.state_dict()
    refused = [
        refused_reduction(*made(plain if rank else lambda: residual(3)), "another model"),
        refused_reduction(*made(), "rows of two kinds", curved=rank == 1),
    ]
    torch.save((found, refused), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_every_process_ends_with_the_same_bits(tmp_path):
    multiprocessing.spawn(reduced, (str(tmp_path),), nprocs=2)
    (first, first_refused), (second, second_refused) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    for form in FORMS:
        _, scores = made(form=form, gram_rows=9, seed=5)
        scores.load_state_dict(first[form][0])
        scores.merge(second[form][0])
        want = scores.state_dict()
        assert want["minibatches"] == 5 and not same(want, first[form][0])
        assert same(first[form][1], want) and same(second[form][1], want)
    assert all(same(before, after) for before, after in (*first_refused, *second_refused))


def test_no_process_group_no_reduction():
    model, scores = made()
    step(model, 1)
    with pytest.raises(RuntimeError, match="init_process_group"):
        scores.all_reduce()
    assert scores.minibatches == 1


def test_inference_mode_leaves_no_matrix_that_nobody_may_write_to():
    for form in FORMS:
        model, scores = made(form=form)
        step(model, 1)
        with torch.inference_mode():
            want = whole(scores)
            state = scores.state_dict()
            scores.reset()
            scores.load_state_dict(state)
        step(model, 1)
        assert distance(whole(scores), want) < 1e-13


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
    scores._statistics.count = scores._statistics.curved = torch.tensor(2)
    scores._statistics.dropped = torch.tensor(0)
    blocks = scores.gram()
    assert (len(blocks) > 1) == (form == "blocks")
    assert all(block.matrix.is_meta and block.units.is_meta for block in blocks)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-1, 6), min_size=0, max_size=20),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_rows_are_what_folding_sums(units, samples, dtype, seed):
    pieces = [part.contiguous() for part in normal((samples, len(units)), seed, dtype).tensor_split(3, dim=1)]
    folding = Folding(torch.tensor(units, dtype=torch.int64), 7)
    rows = folding.rows(*pieces)
    want = torch.zeros(samples, 7, dtype=torch.float64)
    for channel, unit in enumerate(units):
        if unit >= 0:
            want[:, unit] += torch.cat(pieces, dim=1)[:, channel]
    assert rows.dtype == torch.float64 and torch.equal(rows, want)
    sums, squares = folding(*pieces)
    assert distance(sums, rows.sum(0)) < 1e-12 and distance(squares, rows.square().sum(0)) < 1e-12


def test_the_documentations_examples():
    assert doctest.testmod(grams).failed == 0
