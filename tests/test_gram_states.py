"""A Gram matrix that is saved, restored, merged, or follows a cut."""

import pytest
import torch

import taylorkern as tk
from taylorkern import gram as grams
from taylorkern.coupling import Unit
from taylorkern.gram import FORMS, gram_matrix
from tests.cases import distance, normal
from tests.grams import EACH_FORM, batch, fisher, made, step, whole, within_layers


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
