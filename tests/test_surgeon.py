"""The surgeon against brute force: an explicit inverse and an explicit solution after every single removal."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from taylorkern import elimination
from taylorkern.elimination import Elimination
from taylorkern.gram import Block
from taylorkern.shrinking import Countdown
from taylorkern.surgeon import SingularError, choose, shift


def rows(samples, units, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(units, generator=generator, dtype=torch.float64) + 0.1
    return torch.randn(samples, units, generator=generator, dtype=torch.float64) * scale


def curvature(samples, units, seed=0):
    found = rows(samples, units, seed)
    return found.T @ found / samples


def block_diagonal(*matrices):
    """The blocks, and their matrix in one piece."""
    sizes = [len(matrix) for matrix in matrices]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(5)).split(sizes)
    blocks = [Block(units.sort().values, matrix) for units, matrix in zip(order, matrices, strict=True)]
    whole = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for block in blocks:
        whole[block.units.unsqueeze(1), block.units] = block.matrix
    return blocks, whole


def in_one(matrix):
    return [Block(torch.arange(len(matrix)), matrix)]


def brute(matrix, count, damping, saving=None):
    """Removed units in order, and the shift after the last; everything anew after each."""
    units = len(matrix)
    saving = torch.ones(units, dtype=torch.float64) if saving is None else saving
    damped = matrix + damping * matrix.diagonal().mean() * torch.eye(units, dtype=torch.float64)
    removed, d = [], torch.zeros(units, dtype=torch.float64)
    for _ in range(count):
        kept = [u for u in range(units) if u not in removed]
        inverse = torch.linalg.inv(damped[kept][:, kept])
        increase = (1 + d[kept]).square() / (2 * inverse.diagonal()) / saving[kept]
        removed.append(kept[int(increase.argmin())])
        d = _by_solving(matrix, damped, removed)
    return removed, d


def _by_solving(matrix, damped, removed):
    kept = [u for u in range(len(matrix)) if u not in removed]
    d = torch.zeros(len(matrix), dtype=torch.float64)
    d[removed] = -1
    d[kept] = torch.linalg.solve(damped[kept][:, kept], matrix[kept][:, removed].sum(1))
    return d


def everything(units, count):
    return Countdown(torch.ones(units, dtype=torch.bool), count)


@pytest.mark.parametrize("samples,units", [(20, 1), (20, 2), (20, 7), (5, 33), (500, 130), (40, 260)])
@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_selection_and_shift_are_those_of_brute_force(samples, units, damping):
    matrix = curvature(samples, units)
    removed, d = brute(matrix, (units + 1) // 2, damping)
    found = choose(in_one(matrix), everything(units, len(removed)), damping)
    assert found.tolist() == removed
    assert (shift(in_one(matrix), found, damping) - d).abs().max() < 1e-8


@pytest.mark.parametrize("panel,fresh", [(1, 1000), (3, 1000), (64, 1), (2, 5)])
def test_the_shift_on_the_way_is_brute_forces_however_panels_fall(panel, fresh, monkeypatch):
    monkeypatch.setattr(elimination, "_PANEL", panel)
    monkeypatch.setattr(elimination, "_FRESH", fresh)
    matrix = curvature(60, 37)
    damped = matrix + 0.01 * torch.eye(37, dtype=torch.float64)
    gates, removed = Elimination(matrix.clone(), 0.01), []
    for unit in torch.randperm(37, generator=torch.Generator().manual_seed(3))[:30].tolist():
        gates.remove(unit)
        removed.append(unit)
        kept = [u for u in range(37) if u not in removed]
        d, inverse = _by_solving(matrix, damped, removed), torch.linalg.inv(damped[kept][:, kept])
        assert (gates.shift - d).abs().max() < 1e-10
        expected = (1 + d[kept]).square() / (2 * inverse.diagonal())
        assert (gates.increase()[kept] - expected).abs().max() < 1e-10 * expected.max()
        assert gates.increase()[removed].isnan().all()


def test_the_increase_is_what_the_removal_costs():
    """(1 + d)²/(2·[A⁻¹]) against the quadratic itself, before and after."""
    matrix = curvature(60, 23)
    gates, cost = Elimination(matrix, 0.02), 0.0
    for unit in (4, 17, 0, 9):
        foretold = float(gates.increase()[unit])
        gates.remove(unit)
        d = gates.shift
        now = float(d @ matrix @ d / 2 + 0.02 / 2 * d.square().sum())
        assert math.isclose(now - cost, foretold, rel_tol=1e-9)
        cost = now


def test_blocks_choose_what_their_matrix_in_one_piece_does():
    blocks, whole = block_diagonal(curvature(30, 9, 1), curvature(30, 21, 2), curvature(30, 1, 3))
    removed, d = brute(whole, 18, 0.05)
    assert choose(blocks, everything(31, 18), 0.05).tolist() == removed
    assert choose(in_one(whole), everything(31, 18), 0.05).tolist() == removed
    for form in (blocks, in_one(whole)):
        assert (shift(form, torch.tensor(removed), 0.05) - d).abs().max() < 1e-10


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_increase_is_divided_by_what_is_saved_to_the_power(power):
    matrix = curvature(80, 24)
    left = everything(24, 12)
    left.saving = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.05
    removed, _ = brute(matrix, 12, 0.1, left.saving**power)
    assert (removed != brute(matrix, 12, 0.1)[0]) == (power > 0)
    assert choose(in_one(matrix), left, 0.1, power).tolist() == removed


def test_units_that_save_nothing_or_may_not_go_stay():
    matrix = curvature(80, 10)
    left = Countdown(torch.tensor([True] * 6 + [False] * 4), 9)
    left.saving[2] = 0
    for power in (1.0, 0.0):
        assert sorted(choose(in_one(matrix), copy.deepcopy(left), cost_power=power).tolist()) == [0, 1, 3, 4, 5]


def test_it_does_not_change_what_it_reads():
    blocks, _ = block_diagonal(curvature(30, 9, 1), curvature(30, 21, 2))
    before = copy.deepcopy(blocks)
    shift(blocks, choose(blocks, everything(30, 15)), bound=0.3)
    assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(blocks, before, strict=True))


@given(st.integers(1, 24), st.integers(1, 40), st.integers(0, 2**16), st.sampled_from([1e-3, 1e-2, 1.0]))
@settings(max_examples=60, deadline=None)
def test_any_size_is_brute_forces(units, samples, seed, damping):
    matrix = curvature(samples, units, seed)
    count = seed % units + 1
    removed, d = brute(matrix, count, damping)
    found = choose(in_one(matrix), everything(units, count), damping)
    assert found.tolist() == removed
    assert (shift(in_one(matrix), found, damping) - d).abs().max() < 1e-8


def test_bound_holds_and_the_rest_is_solved_for_again():
    matrix = curvature(60, 30)
    removed = choose(in_one(matrix), everything(30, 20), 1e-3)
    freely = shift(in_one(matrix), removed, 1e-3)
    bound = float(freely[freely > -1].abs().max()) / 2
    d = shift(in_one(matrix), removed, 1e-3, bound)
    stays = torch.ones(30, dtype=torch.bool)
    stays[removed] = False
    assert d[stays].abs().max() <= bound
    inside = stays & (d.abs() < bound)
    assert 0 < int(inside.sum()) < int(stays.sum())
    gradient = matrix @ d + 1e-3 * matrix.diagonal().mean() * d
    assert gradient[inside].abs().max() < 1e-10
    assert torch.equal(d[removed], -torch.ones(20, dtype=torch.float64))


def test_fixed_gates_do_not_move():
    matrix = curvature(60, 12)
    fixed = torch.zeros(12, dtype=torch.bool)
    fixed[[3, 4, 5]] = True
    d = shift(in_one(matrix), torch.tensor([0, 3]), 0.0, fixed=fixed)
    assert d[[0, 3]].tolist() == [-1, -1] and d[[4, 5]].tolist() == [0, 0]
    free = [u for u in range(12) if u not in (0, 3, 4, 5)]
    assert (matrix @ d)[free].abs().max() < 1e-12
    assert shift(in_one(matrix), torch.tensor([], dtype=torch.int64)).tolist() == [0.0] * 12


def test_units_that_nothing_speaks_about_go_first_and_move_nobody():
    matrix = curvature(60, 12)
    matrix[[4, 7]] = 0
    matrix[:, [4, 7]] = 0
    found = choose(in_one(matrix), everything(12, 2))
    assert found.tolist() == [4, 7]
    d = shift(in_one(matrix), found)
    assert d[[4, 7]].tolist() == [-1, -1] and d.abs().sum() == 2


def test_nothing_known_at_all_goes_by_index_and_moves_nobody():
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    found = choose(in_one(matrix), everything(5, 3))
    assert found.tolist() == [0, 1, 2]
    assert shift(in_one(matrix), found).tolist() == [-1, -1, -1, 0, 0]


def test_fewer_samples_than_units_need_damping_and_get_it():
    matrix = curvature(4, 50)
    with pytest.raises(SingularError, match="larger damping"):
        choose(in_one(matrix), everything(50, 10), damping=0.0)
    found = choose(in_one(matrix), everything(50, 49))
    assert len(set(found.tolist())) == 49
    assert shift(in_one(matrix), found).isfinite().all()


@pytest.mark.parametrize("seed", range(200))
def test_a_singular_matrix_that_rounding_hides_is_refused(seed):
    matrix = curvature(3 + seed % 5, 9 + seed % 7, seed)
    with pytest.raises(SingularError, match="larger damping"):
        shift(in_one(matrix), torch.tensor([0]), damping=0.0)


@pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf])
def test_a_damping_without_meaning_is_refused(damping):
    with pytest.raises(ValueError, match="damping="):
        choose(in_one(curvature(9, 3)), everything(3, 1), damping)


@pytest.mark.parametrize("power", [-1.0, math.nan, math.inf])
def test_a_power_of_the_cost_without_meaning_is_refused(power):
    with pytest.raises(ValueError, match="cost_power="):
        choose(in_one(curvature(9, 3)), everything(3, 1), cost_power=power)


@pytest.mark.parametrize("bound", [0.0, -0.5, math.nan])
def test_a_bound_without_meaning_is_refused(bound):
    with pytest.raises(ValueError, match="bound="):
        shift(in_one(curvature(9, 3)), torch.tensor([0]), bound=bound)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_curvature_that_is_not_finite_is_refused(value):
    matrix = curvature(9, 3)
    matrix[1, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        choose(in_one(matrix), everything(3, 1))
    with pytest.raises(ValueError, match="not finite"):
        shift(in_one(matrix), torch.tensor([0]))
