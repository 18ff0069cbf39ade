"""The Hessian study: its matrices against other ways to the same derivatives, its figures, and a short run."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import taylorkern as tk
from bench.study import hessian, hessian_tables
from bench.study.hessian_matrices import gated, gauss_newton, gradient_and_hessian, loss_at, with_batch_statistics
from bench.study.small import SmallNet
from taylorkern.coupling import Coupling, couple
from tests.cases import distance, normal
from tests.networks import plain, randomised, residual, with_gates

N = 5


def batch(seed, n=N):
    return normal((n, 2, 8, 8), seed, torch.float64), torch.arange(n) % 5


def made(build, training):
    torch.manual_seed(0)
    model = build().double().eval()
    coupling = couple(model, batch(0)[0])
    return (with_batch_statistics(model) if training else model), coupling


MODELS = pytest.mark.parametrize(("build", "training"), [(residual, False), (residual, True), (plain, False)])


@MODELS
def test_hessian_against_torchs_own(build, training):
    model, coupling = made(build, training)
    x, target = batch(1)

    def loss(z):
        hooks = with_gates(model, coupling.units, z.expand(N, -1))
        value = F.cross_entropy(model(x), target)
        for handle in hooks:
            handle.remove()
        return value

    ones = torch.ones(len(coupling.units), dtype=torch.float64)
    gradient, matrix = gradient_and_hessian(model, coupling, x, target)
    assert distance(matrix, torch.autograd.functional.hessian(loss, ones)) < 1e-10
    assert distance(gradient, torch.autograd.functional.jacobian(loss, ones)) < 1e-10
    assert build is plain or any(len(unit.places) > 1 for unit in coupling.units)


@MODELS
def test_second_order_expansion_of_the_loss(build, training):
    """Along d, L(1 + td) - L(1) is tG·d + ½t²dᵀHd up to t³; a wrong sign or factor shows in the second term."""
    model, coupling = made(build, training)
    x, target = batch(1)
    gradient, matrix = gradient_and_hessian(model, coupling, x, target)
    ones = torch.ones_like(gradient)
    d, t = normal(ones.shape, 3, torch.float64), 1e-4
    with torch.no_grad():
        ahead, here, behind = (loss_at(model, coupling, x, target, ones + step * d) for step in (t, 0, -t))
    assert float((ahead - behind) / (2 * t)) == pytest.approx(float(gradient @ d), rel=1e-5)
    assert float((ahead - 2 * here + behind) / t**2) == pytest.approx(float(d @ matrix @ d), rel=1e-3)


@MODELS
def test_gauss_newton_against_a_row_per_sample_and_class(build, training):
    model, coupling = made(build, training)
    x, _ = batch(1)
    z = torch.ones(len(coupling.units), dtype=torch.float64, requires_grad=True)
    with gated(model, coupling, z):
        f = model(x)
    rows = [torch.autograd.grad(one, z, retain_graph=True)[0] for one in f.flatten()]
    jacobian = torch.stack(rows).view(*f.shape, -1)  # [N, K, U]
    p = f.detach().softmax(1)
    want = torch.zeros(len(z), len(z), dtype=torch.float64)
    for j, q in zip(jacobian, p, strict=True):
        want += j.T @ (q.diag() - q.outer(q)) @ j / N
    matrix = gauss_newton(model, coupling, x)
    assert distance(matrix, want) < 1e-12
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-12 * float(matrix.norm())


def scored(model, x, target, method="exact"):
    copied = tk.convert(copy.deepcopy(model))
    scores = tk.Scores(copied, x)
    logits = copied(x)
    scores.curvature(logits, target, method=method)
    F.cross_entropy(logits, target).backward()
    return 2 * scores.importance("obd")


@pytest.mark.parametrize("build", [residual, plain])
def test_its_diagonal_is_exact_h_in_evaluation_mode(build):
    model, coupling = made(build, training=False)
    x, target = batch(1)
    assert distance(scored(model, x, target), gauss_newton(model, coupling, x).diagonal()) < 1e-9


@pytest.mark.parametrize("batch_norm", [False, True])
def test_of_gates_at_one_depth_the_hessians_diagonal_is_gauss_newtons(batch_norm):
    """Logits are piecewise linear in such a gate; a gate on both ends of the skip multiplies itself."""
    torch.manual_seed(0)
    x, target = normal((N, 1, 8, 8), 1, torch.float64), torch.arange(N)
    for skip in (False, True):
        model = randomised(SmallNet(batch_norm, skip, (4, 6))).double().eval()
        coupling = couple(model, x)
        difference = (gradient_and_hessian(model, coupling, x, target)[1] - gauss_newton(model, coupling, x)).diagonal()
        linked = torch.tensor([len(unit.places) > 1 for unit in coupling.units])
        assert int(linked.sum()) == (4 if skip else 0)
        assert bool((difference[~linked].abs() < 1e-12).all())
        assert bool((difference[linked].abs() > 1e-9).all())


def test_batch_statistics_are_those_of_training_and_leave_the_model_alone():
    model, _ = made(residual, training=False)
    before = copy.deepcopy(model.state_dict())
    x, _ = batch(1)
    pure = with_batch_statistics(model)
    first, again = pure(x), pure(x)
    assert torch.equal(first, again) and all(torch.equal(v, before[k]) for k, v in pure.state_dict().items())
    assert torch.equal(first, copy.deepcopy(model).train()(x))
    assert not model.training and not torch.equal(first, model(x))


def test_gates_leave_channels_of_no_unit_alone():
    layer, x = torch.nn.Conv2d(2, 3, 3), normal((N, 2, 8, 8), 1, torch.float32)
    coupling = replace(Coupling.alone({"0": layer}), layers={"0": torch.tensor([1, -1, 0])})
    plainly = layer(x)
    with gated(torch.nn.Sequential(layer), coupling, torch.tensor([0.5, 0.0, 7.0])):
        got = layer(x)
    assert torch.equal(got, plainly * torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1))
    assert torch.equal(layer(x), plainly)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = randomised(SmallNet(True, True, (8, 12))).double().eval()
    batches = [(normal((8, 1, 8, 8), seed, torch.float64), torch.arange(8)) for seed in (1, 2)]
    return hessian.measure(model, batches, seed=0)


def test_measured_holds_the_packages_own_scores(measured):
    x, target = measured.batches[1]
    assert distance(measured.h["exact"][1], scored(measured.model, x, target)) < 1e-12
    copied = tk.convert(copy.deepcopy(measured.model))
    scores = tk.Scores(copied, x)
    for inputs, targets in measured.batches:
        F.cross_entropy(copied(inputs), targets).backward()
    foretold = measured.foretold()
    assert distance(foretold["first"].square().mean(0), scores.importance("taylor_fo")) < 1e-12
    assert distance(foretold["fisher"].square().mean(0), scores.importance("taylor_so_fisher")) < 1e-12
    assert distance(foretold["hessian"], measured.hessian.diagonal(dim1=1, dim2=2) / 2 - measured.gradient) == 0


def test_change_without_one_unit_is_the_oracles(measured):
    for unit in (0, 10, 31):
        change = hessian.change_without(measured, torch.tensor([unit]))
        assert change == pytest.approx(float(measured.change[:, unit].mean()), rel=1e-9, abs=1e-12)


def test_errors_are_zero_only_of_what_is_exact(measured):
    figures = hessian.errors(measured)
    assert figures["h against GGN's diagonal"] < 1e-12 and figures["h over GGN's diagonal"] == pytest.approx(1)
    assert figures["error of h, exact"] == pytest.approx(figures["error of h, GGN"])
    assert figures["error of h, sketch"] > figures["error of h, exact"] > 1e-6
    only_diagonal = torch.diag_embed(measured.hessian.diagonal(dim1=1, dim2=2))
    parts = (measured.hessian - only_diagonal, measured.hessian)
    want = torch.stack([a.norm() / b.norm() for a, b in zip(*parts, strict=True)]).mean()
    assert figures["off the diagonal"] == pytest.approx(float(want))


def test_foretold_changes_of_a_set(measured):
    figures = hessian.sets(measured)
    lowest = measured.foretold()["sketch"].square().mean(0).argsort()[:10]  # 30 % of 32
    d = torch.zeros(32, dtype=torch.float64).index_fill(0, lowest, -1)
    assert figures["30% measured"] == pytest.approx(hessian.change_without(measured, lowest))
    terms = {
        "full, hessian": measured.hessian,
        "full, GGN": measured.ggn,
        "diagonal, exact": torch.diag_embed(measured.h["exact"]),
        "diagonal, first": torch.zeros_like(measured.hessian),
    }
    for name, matrix in terms.items():
        want = (measured.gradient @ d + (matrix @ d) @ d / 2).mean()
        assert figures[f"30% {name}"] == pytest.approx(float(want)), name


def test_greedy_without_other_terms_is_the_order_of_single_units(measured):
    diagonal = torch.diag_embed(measured.h["exact"])
    want = measured.foretold()["exact"].square().mean(0).argsort()
    assert torch.equal(hessian.greedy(measured.gradient, diagonal), want)


def test_greedy_keeps_one_of_two_that_stand_in_for_each_other():
    gradient = torch.zeros(1, 3, dtype=torch.float64)
    matrix = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.1, 0.0], [0.0, 0.0, 2.0]]], dtype=torch.float64)
    assert hessian.greedy(gradient, matrix).tolist() == [0, 2, 1]


def test_summary_and_tables_say_what_is_not_there():
    found = hessian.summary(
        {"a": {"x": [1.0, 2.0, 3.0], "y": [float("nan")] * 3}, "b": {"x": [1.0] * 3}}, hessian.QUICK
    )
    x, y = found["regimes"]["a"]["x"], found["regimes"]["a"]["y"]
    assert x["mean"] == 2 and 1 <= x["low"] < 2 < x["high"] <= 3 and x["seeds"] == [1, 2, 3]
    assert y["mean"] is None and y["seeds"] == [None] * 3
    told = hessian_tables.table("t", {"X": "x", "Y": "y"}, found["regimes"])
    assert "| a | 2 [1" in told and "undefined" in told and "| b |" not in told


def test_a_short_run_writes_table_figures_and_picture(tmp_path, capsys):
    to_json, to_figure = tmp_path / "study.json", tmp_path / "study.png"
    assert hessian.main(["--quick", "--seeds", "1", "--json", str(to_json), "--figure", str(to_figure)]) == 0
    regimes = json.loads(to_json.read_text())["regimes"]
    assert len(regimes) == 4 + 3 * 4 + 4
    for name, figures in regimes.items():
        evaluation = name.endswith(" eval")
        if evaluation:
            assert figures["h against GGN's diagonal"]["mean"] < 1e-9, name
        if name.endswith(" train"):
            assert figures["h against GGN's diagonal"]["mean"] > 0.01, name
    plain_network = regimes["plain, long, eval"]
    assert plain_network["error of h, exact"]["mean"] < 1e-9 and plain_network["negative H_uu"]["mean"] == 0
    spearman = "spearman of squares, "
    assert plain_network[f"{spearman}exact"]["mean"] > plain_network[f"{spearman}first"]["mean"]
    assert to_figure.read_bytes().startswith(b"\x89PNG")
    assert "| BN, skip, long, train→eval |" in capsys.readouterr().out
