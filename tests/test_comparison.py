"""Importances without training, and the whole comparison: its numbers are those of its parts."""

import copy
import doctest
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from taylorkern import comparison, tables
from taylorkern.comparison import columns, compare, importances, needs_curvature
from taylorkern.correlation import by_layer, correlations, interval
from taylorkern.criteria import CRITERIA
from tests.cases import distance, normal
from tests.networks import plain, residual


def batch(seed, samples=6):
    return normal((samples, 2, 8, 8), seed), torch.arange(samples) % 5


def made(seed=0, build=residual):
    torch.manual_seed(seed)
    return tk.convert(build()).eval()


BATCHES = [batch(1), batch(2)]


def scored(model, criteria, **options):
    return importances(model, BATCHES[0][0], BATCHES, F.cross_entropy, criteria, **options)


def test_importances_are_those_of_scores_fed_by_hand():
    model = made()
    found = scored(model, list(CRITERIA), methods=["exact", "sketch"])
    assert list(found) == columns(list(CRITERIA), ["exact", "sketch"])
    assert all(found[name].shape == (36,) and found[name].dtype == torch.float64 for name in found)
    scores = tk.Scores(model, BATCHES[0][0], criteria=list(CRITERIA))
    for x, target in BATCHES:
        logits = model(x)
        scores.curvature(logits, target, method="exact")
        F.cross_entropy(logits, target).backward()
    for name in CRITERIA:
        there = f"{name} (exact)" if needs_curvature(name) else name
        assert torch.equal(found[there], scores.importance(name)), name
    assert not torch.equal(found["taylor_so"], found["taylor_so (exact)"])


def test_exactly_the_criteria_that_scores_can_not_do_without_a_curvature_need_one():
    model = made()
    scores = tk.Scores(model, BATCHES[0][0], criteria=list(CRITERIA))
    F.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    for name in CRITERIA:
        if needs_curvature(name):
            with pytest.raises(RuntimeError, match="no curvature yet"):
                scores.importance(name)
        else:
            scores.importance(name)


def test_they_are_the_same_again_and_others_by_another_seed():
    model = made()
    names = ["taylor_so", "random", "taylor_fo"]
    first = scored(model, names, methods=["sketch", "mc"], seed=3)
    torch.rand(7)
    again = scored(model, names, methods=["sketch", "mc"], seed=3)
    alone = scored(model, names, methods=["mc"], seed=3)
    other = scored(model, names, methods=["sketch", "mc"], seed=4)
    assert list(first) == ["taylor_so", "taylor_so (mc)", "random", "taylor_fo"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], alone[name]) for name in alone)
    assert [name for name in first if torch.equal(first[name], other[name])] == ["taylor_fo"]


@pytest.mark.parametrize("training", [False, True])
def test_it_leaves_no_trace(training):
    model = made().train(training)
    kept = model[0].weight.grad = torch.ones_like(model[0].weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        scored(model, ["taylor_so", "taylor_weight"])
    assert model[0].weight.grad is kept and bool((kept == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not model[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(getattr(module, "gate", None) is None for module in model.modules())
    assert all(module.training == training for module in model.modules())


def test_the_mode_decides():
    model = made()
    evaluated = scored(model, ["taylor_fo"])["taylor_fo"]
    assert distance(scored(model.train(), ["taylor_fo"])["taylor_fo"], evaluated) > 1e-3


def test_gates_come_off_where_a_loss_fails():
    model = made()
    with pytest.raises(ValueError, match="no rule for loss"):
        scored(model, ["taylor_so"], loss="hinge")
    assert all(getattr(module, "gate", None) is None for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


NAMES = ["taylor_fo", "taylor_so", "bn_scale"]


@pytest.fixture(scope="module")
def result():
    return compare(made, lambda seed: BATCHES, seeds=[0, 1, 2], criteria=NAMES, methods=["sketch", "exact"], units=20)


def test_each_network_is_measured_and_scored_as_by_hand(result):
    for seed, network in zip((0, 1, 2), result["networks"], strict=True):
        model, chosen = made(seed), network["units"]
        assert (network["seed"], network["minibatches"], network["units_found"]) == (seed, 2, 36)
        assert len(set(chosen)) == 20 and chosen == sorted(chosen)
        changes = tk.oracle(model, BATCHES[0][0], F.cross_entropy, BATCHES, units=chosen)
        assert network["truth"] == changes.square().mean(0).tolist()
        assert network["change"] == changes.mean(0).tolist()
        found = scored(model, NAMES, methods=["sketch", "exact"], seed=seed)
        for name, values in network["importance"].items():
            assert values == found[name][chosen].tolist()
            expected = correlations(changes.square().mean(0), found[name][chosen])
            assert network["correlation"]["all"][name] == expected
    assert result["networks"][0]["units"] != result["networks"][1]["units"]


def test_by_layer_only_its_own_units_count(result):
    network, coupling = result["networks"][1], tk.couple(made(1), BATCHES[0][0])
    truth = torch.tensor(network["truth"])
    importance = torch.tensor(network["importance"]["taylor_so"])
    for layer, units in by_layer(coupling).items():
        inside = torch.tensor([u in units for u in network["units"]])
        assert network["layers"][layer] == inside.nonzero().flatten().tolist()
        expected = correlations(truth[inside].double(), importance[inside].double())
        for kind, value in network["correlation"]["layers"][layer]["taylor_so"].items():
            assert value is None if math.isnan(expected[kind]) else math.isclose(value, expected[kind], rel_tol=1e-5)


def test_the_summary_is_the_mean_over_networks_with_its_interval(result):
    for tables_of, summary in [
        ([n["correlation"]["all"] for n in result["networks"]], result["summary"]["all"]),
        ([n["correlation"]["layers"]["1"] for n in result["networks"]], result["summary"]["layers"]["1"]),
    ]:
        for name in ("taylor_fo", "taylor_so (exact)"):
            values = [table[name]["spearman"] for table in tables_of if table[name]["spearman"] is not None]
            low, high = interval(values)
            told = summary[name]["spearman"]
            assert told == {
                "mean": pytest.approx(sum(values) / len(values)),
                "low": low,
                "high": high,
                "networks": len(values),
            }


def test_units_whose_removal_lowers_the_loss_are_listed_most_harmful_first(result):
    for network in result["networks"]:
        listed = network["removal_lowers_loss"]
        change = dict(zip(network["units"], network["change"], strict=True))
        assert {entry["unit"] for entry in listed} == {u for u, value in change.items() if value < 0}
        assert [entry["change"] for entry in listed] == sorted(v for v in change.values() if v < 0)
        units = tk.couple(made(network["seed"]), BATCHES[0][0]).units
        assert all([tuple(p) for p in entry["places"]] == list(units[entry["unit"]].places) for entry in listed)
    assert any(network["removal_lowers_loss"] for network in result["networks"])


def test_strict_json_holds_it(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["facts"]["criteria"] == ["taylor_fo", "taylor_so", "taylor_so (exact)", "bn_scale"]
    assert result["facts"]["versions"]["torch"] == torch.__version__


def test_criteria_that_judge_no_unit_go_unless_they_were_named():
    def plainly(seed):
        return made(seed, plain)

    options = {"data": lambda seed: BATCHES, "units": 4}
    every = compare(plainly, **options)
    assert set(CRITERIA) - set(every["facts"]["criteria"]) == {"bn_scale", "bn_taylor"}
    named = compare(plainly, criteria=["bn_scale", "magnitude"], **options)
    assert named["summary"]["all"]["bn_scale"]["pearson"] == {"mean": None, "low": None, "high": None, "networks": 0}
    assert named["networks"][0]["importance"]["bn_scale"] == [None] * 4
    assert "–" in tables.tell(named)


def test_a_loss_that_is_not_finite_is_counted_and_left_out(monkeypatch):
    losses = iter([1.0, 2.0, math.nan, 3.0, 1.5, 1.2, 4.0])

    def loss(output, target):
        """Those losses where it is measured, the true one where it is scored."""
        return F.cross_entropy(output, target) if torch.is_grad_enabled() else next(losses)

    monkeypatch.setattr(comparison, "LOSSES", {"cross_entropy": loss})
    found = compare(made, lambda seed: BATCHES[:1], criteria=["magnitude"], units=6, together=1)
    network = found["networks"][0]
    assert network["not_finite"] == 1 and network["truth"][1] is None
    assert network["truth"][:3] == [1.0, None, 4.0]
    assert found["summary"]["all"]["magnitude"]["kendall"]["mean"] is not None
    assert "not finite: 1" in tables.tell(found)


def test_frozen_unconverted_and_training_networks_will_do():
    def frozen(seed):
        torch.manual_seed(seed)
        return residual().train().requires_grad_(False)

    found = compare(frozen, lambda seed: BATCHES, criteria=["taylor_weight", "taylor_fo"], units=5)
    expected = compare(made, lambda seed: BATCHES, criteria=["taylor_weight", "taylor_fo"], units=5)
    assert found["networks"] == expected["networks"]


@pytest.mark.parametrize(
    "loss, targets", [("mse", normal((6, 5), 3)), ("bce_with_logits", normal((6, 5), 3).sigmoid())]
)
def test_other_losses(loss, targets):
    pair = (BATCHES[0][0], targets)
    found = compare(made, lambda seed: [pair], loss, criteria=["taylor_so"], methods=["exact"])
    changes = tk.oracle(made(), pair[0], comparison.LOSSES[loss], [pair])[0]
    assert found["networks"][0]["change"] == changes.tolist()
    assert found["summary"]["all"]["taylor_so (exact)"]["spearman"]["mean"] > 0.8


def test_wrong_arguments_are_refused_before_a_network_is_trained():
    def never(seed):
        raise AssertionError("trained first")

    for options, message in [
        ({"criteria": ["taylor_x"]}, "unknown criterion"),
        ({"criteria": []}, "at least one criterion"),
        ({"methods": []}, "at least one criterion, one method"),
        ({"methods": ["guess"]}, "method 'guess'"),
        ({"seeds": []}, "one seed"),
        ({"loss": "hinge"}, "no loss 'hinge'"),
        ({"minibatches": 0}, "minibatches=0"),
        ({"units": 0}, "units=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(never, never, **options)


def test_what_the_users_functions_return_is_looked_at():
    for models, data, message in [
        (lambda seed: "model", lambda seed: BATCHES, "must return a torch.nn.Module"),
        (made, lambda seed: 3, "must return .inputs, targets. pairs"),
        (made, lambda seed: [], "no minibatch"),
        (made, lambda seed: BATCHES[0][:1], "must be a pair"),
        (lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(128, 5)), lambda seed: BATCHES, "no unit"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(models, data)


def test_the_table_is_sorted_and_says_what_it_rests_on(result):
    text = tables.tell(result)
    lines = text.splitlines()
    assert "20 of 36 units, 2 minibatches" in lines[0]
    assert "95 % bootstrap interval" in lines[1]
    start = next(i for i, line in enumerate(lines) if line.startswith("criterion"))
    rows = lines[start + 1 : start + 5]
    assert {row.split("  ")[0].strip() for row in rows} == set(result["facts"]["criteria"])
    told = [float(row.split("]")[1].split("[")[0]) for row in rows]
    assert told == sorted(told, reverse=True)
    assert f"{result['summary']['layers']['1']['taylor_fo']['spearman']['mean']:.3f}" in text
    alone = tables.tell(compare(made, lambda seed: BATCHES, criteria=NAMES, units=5))
    assert "there is no interval" in alone and "[" not in alone


def test_the_scatter_plot_holds_every_unit_that_can_be_drawn(result, tmp_path):
    from taylorkern import report

    network = copy.deepcopy(result["networks"][0])
    network["importance"]["taylor_fo"][:2] = [None, 0.0]
    network["importance"]["bn_scale"] = [None] * 20
    figure = report.scatter(network)
    figure.savefig(tmp_path / "scatter.png")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    drawn = {name: len(panels[name].collections[0].get_offsets()) for name in list(network["importance"])[:3]}
    assert drawn == {"taylor_fo": 19, "taylor_so": 20, "taylor_so (exact)": 20}
    assert not panels["bn_scale"].collections
    first = panels["taylor_fo"]
    assert first.collections[0].get_offsets()[:, 0].min() > 0
    assert first.get_xscale() == first.get_yscale() == "log"
    told = network["correlation"]["all"]["taylor_so"]["spearman"]
    assert f"Spearman {told:.2f}" in panels["taylor_so"].texts[0].get_text()


def test_the_documentations_examples():
    found = doctest.testmod(comparison)
    assert found.attempted and not found.failed
