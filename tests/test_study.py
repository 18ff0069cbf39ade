"""The study: its short form from end to end, and the pieces whose mistakes would not show in a picture."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import taylorkern as tk
from bench.study import __main__ as study
from bench.study import work
from bench.study.networks import LAYER, NETWORKS
from bench.study.removal import accuracy, at_once, lowest, masked, pools
from bench.study.scoring import VARIANTS, importances, scorer
from bench.study.summary import over_seeds
from bench.study.training import fixed_batches, stages
from taylorkern.demo.data import digits


@pytest.fixture(scope="module")
def trained():
    """Every network after a few steps, its Scores, and what its importances are made of."""
    data = digits()
    found = {}
    for network in NETWORKS:
        model = stages(network, data, {"early": 10}, 0.05, seed=0)["early"]
        batches = fixed_batches(data, 2, 32, seed=0)
        found[network] = (scorer(model, batches, 0), batches)
    return data, found


def test_the_short_form_runs_resumes_and_tells_everything(tmp_path, monkeypatch, capsys):
    result = study.main(["--short", "--out", str(tmp_path), "--processes", "1"])
    table = capsys.readouterr().out
    for name in VARIANTS:
        assert f"| {name} |" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "study-correlation.png", "study-removal.png", "study-schedules.png", "study-ranks.png"
    }  # fmt: skip
    kept = json.loads((tmp_path / "study.json").read_text())
    assert len(kept["networks"]) == 4  # two stages, two seeds
    assert set(kept["summary"]["schedules"]) == {"one-shot", "iterative", "continuous"}
    assert kept["summary"]["correlation"]["all"]["taylor_so"]["pearson"]["networks"] == 4
    assert all(math.isfinite(found["mean"]) for found in _leaves(kept["summary"]) if found["mean"] is not None)

    def trains(*_):
        raise AssertionError("trained again what was there")

    monkeypatch.setattr(work, "stages", trains)
    again = study.main(["--short", "--out", str(tmp_path), "--processes", "1"])
    assert again["summary"] == result["summary"]


def _leaves(tree):
    if "networks" in tree:
        yield tree
    else:
        for item in tree.values() if isinstance(tree, dict) else tree:
            for each in item if isinstance(item, list) else [item]:
                yield from _leaves(each)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_masked_network_is_the_cut_one(trained, network):
    data, found = trained
    scores, batches = found[network]
    torch.manual_seed(0)
    importance = torch.rand(len(scores.units), dtype=torch.float64)
    gone = lowest(importance, torch.arange(len(importance)), len(importance) // 2, scores.coupling, importance < 0)
    mask = torch.ones(len(importance))
    mask[gone] = 0
    with masked(scores.model, scores.coupling.layers, mask), torch.no_grad():
        want = scores.model(data.test_images)
    thin = tk.revert(copy.deepcopy(scores.model))
    order = torch.ones(len(importance))
    order[gone] = 0
    tk.prune(thin, batches[0][0][:1], order, target=1 - len(gone) / len(importance), of="channels")
    with torch.no_grad():
        assert torch.allclose(thin(data.test_images), want, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_pools_are_what_they_are_called(trained, network):
    scores, _ = trained[1][network]
    found = pools(scores, LAYER[network])
    assert len(found["whole network"]) == len(scores.units)
    assert all(len(scores.units[u].places) == 1 for u in found["inner channels"])
    assert {scores.units[u].places[0][0] for u in found["one layer"]} == {LAYER[network]}
    assert len(found["one layer"]) >= 16


def test_the_lowest_go_first_and_a_layer_keeps_one():
    torch.manual_seed(0)
    model = NETWORKS["plain"]()
    coupling = tk.couple(model, torch.rand(1, 1, 8, 8))
    units = len(coupling.units)
    importance, gone = torch.arange(units, dtype=torch.float64), torch.zeros(units, dtype=torch.bool)
    assert lowest(importance, torch.arange(units), 3, coupling, gone).tolist() == [0, 1, 2]
    gone[:3] = True
    assert lowest(importance, torch.arange(units), 2, coupling, gone).tolist() == [3, 4]
    assert lowest(importance, torch.arange(8, 12), 2, coupling, gone).tolist() == [8, 9]
    everything = lowest(importance, torch.arange(units), units, coupling, torch.zeros(units, dtype=torch.bool))
    assert len(everything) == units - 4 and 15 not in everything  # 15: the most important of the first layer


def test_curves_remove_what_the_importance_says(trained):
    data, found = trained
    scores, _ = found["plain"]
    units = len(scores.units)
    everything = torch.arange(units)
    importance = torch.rand(units, dtype=torch.float64)
    judged_by_none = torch.full((units,), torch.inf, dtype=torch.float64)
    curves = at_once(scores, {"a": importance, "b": judged_by_none}, everything, (0.0, 0.5), data)
    assert list(curves) == ["a"]
    assert curves["a"][0] == accuracy(scores.model, data)
    mask = torch.ones(units)
    mask[importance.argsort()[: units // 2]] = 0
    with masked(scores.model, scores.coupling.layers, mask):
        assert abs(curves["a"][1] - accuracy(scores.model, data)) < 0.02  # but for a layer's last channel


def test_variants_are_the_criteria_by_their_methods(trained):
    _, found = trained
    scores, batches = found["residual"]
    ranked = importances(scores, batches, seed=0)
    assert list(ranked) == list(VARIANTS)
    assert all(importance.isfinite().all() for importance in ranked.values())
    scores.reset()
    for images, labels in batches:
        logits = scores.model(images)
        scores.curvature(logits, labels, method="exact")
        F.cross_entropy(logits, labels).backward()
    assert torch.equal(ranked["taylor_so (exact)"], scores.importance("taylor_so"))
    assert torch.equal(ranked["taylor_fo"], scores.importance("taylor_fo"))
    assert not torch.equal(ranked["taylor_so"], ranked["taylor_so (exact)"])


def test_an_interval_is_of_means_per_seed():
    records = [{"seed": seed, "value": value} for seed in (0, 1) for value in (seed, seed + 2.0)]
    found = over_seeds([*records, {"seed": 2, "value": None}], lambda r: r["value"])
    assert found["mean"] == 1.5 and found["networks"] == 4
    assert found["low"] == 1.0 and found["high"] == 2.0
