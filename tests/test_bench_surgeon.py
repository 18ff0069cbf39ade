"""The study of sets: its short form from end to end, its rivals against NumPy, its bars on numbers made up."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import taylorkern as tk
from bench.study.networks import NETWORKS
from bench.study.removal import masked, pools
from bench.surgeon import __main__ as study
from bench.surgeon import repairs, resnet50, work
from bench.surgeon.plan import SHORT, Plan
from bench.surgeon.prediction import second_order
from bench.surgeon.repairs import FITS, Consumer, moments, unfolded
from bench.surgeon.summary import ALL, INNER, bars, first_at
from bench.surgeon.thinning import Thinning, UnjudgedError, chains
from bench.surgeon.ways import CURVES, RIVALS, SURGEON, Way, variants
from taylorkern.demo.data import digits
from taylorkern.gram import Block
from taylorkern.surgeon import shift


@pytest.fixture(scope="module")
def thinning():
    torch.manual_seed(0)
    return Thinning(NETWORKS["plain"]().eval(), SHORT, digits(), seed=0)


@pytest.fixture
def everything(thinning):
    thinning.restore()
    return torch.arange(len(thinning.gates))


def test_the_short_form_runs_resumes_and_tells_everything(tmp_path, monkeypatch, capsys):
    arguments = ["--short", "--out", str(tmp_path), "--processes", "1"]
    result = study.main(arguments)
    table = capsys.readouterr().out
    for name in (*CURVES, *RIVALS, *variants(SHORT)):
        assert f"| {name} |" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "surgeon-curves.png", "surgeon-variants.png", "surgeon-prediction.png", "surgeon-tuning.png"
    }  # fmt: skip
    kept = json.loads((tmp_path / "surgeon.json").read_text())
    assert [(r["network"], r["seed"]) for r in kept["networks"]] == [("residual", 0), ("residual", 1)]
    assert ["variants" in record for record in kept["networks"]] == [True, False]
    found = kept["summary"]["groups"][ALL]
    assert found["curves"][INNER]["surgeon"]["accuracy"][0]["networks"] == 2
    assert found["rivals"]["1"]["surgeon, refit"]["accuracy"][0]["networks"] == 1
    assert all(0 < of["flops"]["mean"] <= SHORT.left for of in found["tuning"].values())
    assert all(math.isfinite(f[key]) for r in kept["networks"] for f in r["prediction"] for key in ("second", "scored"))

    def trains(*_):
        raise AssertionError("trained again what was there")

    monkeypatch.setattr(work, "stages", trains)
    assert study.main(arguments)["summary"] == result["summary"]


def test_chains_end_where_they_are_asked_to():
    assert chains((0.5, 0.7), 0.2) == [(0.2, 0.4, 0.6, 0.7), (0.2, 0.4, 0.5)]
    assert chains((0.3, 0.5), 0.05)[0][-1] == 0.5 and len(chains((0.3, 0.5), 0.05)) == 1
    assert chains((0.3, 0.5), 1.0) == [(0.5,), (0.3,)]


def test_variants_change_one_thing_each():
    for name, way in variants(Plan()).items():
        changed = [field for field, value in vars(SURGEON).items() if getattr(way, field) != value]
        assert len(changed) == (0 if name == "default" else 2 if name == "blocks, Fisher rows" else 1), name


@pytest.mark.parametrize("name", ["taylor_fo", "taylor_fo, compensated", "magnitude", "surgeon"])
def test_as_many_go_as_asked_and_none_comes_back(thinning, everything, name):
    gone: set[int] = set()
    for done, fraction in enumerate((0.25, 0.5), start=1):
        thinning.remove(CURVES[name], everything, fraction, done)
        now = set((~thinning.stays).nonzero().flatten().tolist())
        assert len(now) == round(fraction * len(everything)) and gone <= now
        gone = now
    moved = (thinning.gates[thinning.stays] != 1).any()
    assert bool(moved) == (name in ("taylor_fo, compensated", "surgeon"))
    reached, flops = thinning.measured()
    assert 0 <= reached <= 1 and flops == 1 - thinning.flops(thinning.stays) / thinning.flops.total > 0


def test_gates_move_by_the_shift(thinning, everything):
    thinning.score(SURGEON, 1)
    gone = thinning.chosen(SURGEON, everything, 30)
    want = 1 + shift(thinning.among(SURGEON), gone)
    thinning.remove(SURGEON, everything, 30 / len(everything), 1)
    assert torch.equal(thinning.gates, want.float())


def test_a_curvature_is_asked_for_only_where_one_is_needed():
    assert [CURVES[name].method for name in ("taylor_so", "surgeon", "random, compensated")] == ["sketch"] * 3
    assert [CURVES[name].method for name in ("taylor_fo", "taylor_so_fisher", "random")] == [None] * 3
    assert Way(rows="fisher").method is None and Way(rows="exact").method == "exact"
    assert not CURVES["magnitude"].of_data and CURVES["magnitude, compensated"].of_data


def test_only_the_pool_goes(thinning, everything):
    pool = everything[:40]
    thinning.remove(SURGEON, pool, 0.5)
    gone = (~thinning.stays).nonzero().flatten()
    assert len(gone) == 20 and bool(torch.isin(gone, pool).all())


def test_the_matrix_is_over_those_that_stay(thinning, everything):
    thinning.gates[[0, 3]] = 0
    thinning.score(SURGEON, 1)
    [whole] = thinning.scores.gram("full")
    [block] = thinning.among(SURGEON)
    here = torch.cat([everything[1:3], everything[4:]])
    assert torch.equal(block.units, torch.arange(len(here)))
    assert torch.equal(block.matrix, whole.matrix[here][:, here])
    parts = thinning.among(Way(form="blocks"))
    assert len(parts) == len(thinning.coupling.layers)
    assert torch.equal(torch.cat([part.units for part in parts]).sort().values, block.units)
    for part in parts:
        assert torch.allclose(part.matrix, block.matrix[part.units][:, part.units])


def test_a_criterion_that_cant_judge_has_no_curve(thinning, everything):
    assert thinning.curve(CURVES["bn_scale"], everything, (0.5,), 0.5) is None
    with pytest.raises(UnjudgedError, match="bn_scale"):
        thinning.chosen(CURVES["bn_scale"], everything, 1)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 2, stride=2, padding=1), nn.Linear(6, 4)])
def test_unfolded_inputs_times_weights_are_the_outputs(layer):
    layer.double()
    x = torch.randn(7, 3, 4, 4).double() if isinstance(layer, nn.Conv2d) else torch.randn(7, 6).double()
    rows = unfolded(layer, x, seed=0)
    got = rows @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    want = layer(x).detach()
    want = want.flatten(2).transpose(1, 2).flatten(0, 1) if want.dim() == 4 else want
    # The places of an image come in another order.
    for image in range(7):
        count = len(want) // 7
        a, b = (t[image * count : (image + 1) * count].sort(0).values for t in (got, want))
        assert torch.allclose(a, b)


def fitted(kind, kept):
    """One small convolution whose inputs have changed, its weights and bias after ``kind``, and the numbers it saw."""
    torch.manual_seed(1)
    layer = nn.Conv2d(4, 3, 2).double()
    dense = torch.randn(40, 4, 4, 4).double()
    thin = (dense + 0.3 * torch.randn(dense.shape).double()) * kept.double().view(-1, 1, 1)
    weight, offset = layer.weight.detach().flatten(1), layer.bias.detach()
    wanted = [unfolded(layer, part, seed=i) @ weight.T + offset for i, part in enumerate(dense.split(20))]
    rows = [unfolded(layer, part, seed=i) for i, part in enumerate(thin.split(20))]
    consumer = Consumer(layer, torch.arange(4), layer.weight.detach().clone(), layer.bias, wanted)
    moved, shifted = FITS[kind](weight, moments(consumer, iter(rows)), kept, 0.0)
    return weight, offset, weight + moved, offset + shifted, torch.cat(rows), torch.cat(wanted)


KEPT = torch.tensor([True, False, True, True])


def test_refitting_is_numpys_least_squares():
    weight, _, new, offset, rows, wanted = fitted("refit", KEPT)
    columns = KEPT.repeat_interleave(4)
    given = np.column_stack([rows[:, columns].numpy(), np.ones(len(rows))])
    want = np.linalg.lstsq(given, wanted.numpy(), rcond=None)[0]
    assert np.allclose(new[:, columns].numpy(), want[:-1].T, atol=1e-10)
    assert np.allclose(offset.numpy(), want[-1], atol=1e-10)
    assert torch.equal(new[:, ~columns], weight[:, ~columns])


def test_scaling_is_numpys_least_squares():
    weight, before, new, offset, rows, wanted = fitted("scale", KEPT)
    parts = [rows[:, 4 * c : 4 * c + 4] @ weight[:, 4 * c : 4 * c + 4].T for c in range(4) if KEPT[c]]
    given = np.column_stack([part.flatten().numpy() for part in parts])
    factors = np.linalg.lstsq(given, (wanted - before).flatten().numpy(), rcond=None)[0]
    got = (new / weight).view(3, 4, 4)[:, KEPT]
    assert np.allclose(got.numpy(), factors[None, :, None], atol=1e-10)
    assert torch.equal(offset, before)


def test_a_bias_makes_up_for_the_mean():
    weight, _, new, offset, rows, wanted = fitted("bias", KEPT)
    assert torch.equal(new, weight)
    assert torch.allclose((rows @ new.T + offset).mean(0), wanted.mean(0), atol=1e-12)


@pytest.mark.parametrize("kind", FITS)
def test_a_repair_of_nothing_is_nothing_and_all_is_taken_back(thinning, everything, kind):
    x = thinning.data.test_images[:50]
    with torch.no_grad():
        want = thinning.model(x)
        repairs.repair(kind, thinning.model, thinning.coupling, thinning.gates, thinning._calibration)
        assert torch.allclose(thinning.model(x), want, atol=1e-5)
        thinning.gates[::3] = 0
        repairs.repair(kind, thinning.model, thinning.coupling, thinning.gates, thinning._calibration)
        assert not torch.allclose(thinning.model(x), want, atol=1e-3)
        thinning.restore()
        assert torch.equal(thinning.model(x), want)


@pytest.mark.parametrize("kind", FITS)
def test_a_repair_brings_the_outputs_nearer(thinning, everything, kind):
    x = thinning.batches[0][0]
    with torch.no_grad():
        want = thinning.model(x)
        thinning.gates[::3] = 0
        with masked(thinning.model, thinning.coupling.layers, thinning.gates):
            before = float((thinning.model(x) - want).norm())
            repairs.repair(kind, thinning.model, thinning.coupling, thinning.gates, thinning._calibration)
            assert float((thinning.model(x) - want).norm()) < before


def test_the_second_order_is_over_all_blocks():
    blocks = [Block(torch.tensor([0, 2]), torch.tensor([[2.0, 1.0], [1.0, 4.0]]).double()),
              Block(torch.tensor([1]), torch.tensor([[6.0]]).double())]  # fmt: skip
    d = torch.tensor([-1.0, 0.5, 2.0]).double()
    assert second_order(blocks, d) == (2 - 4 + 16 + 1.5) / 2


def record(network, seed, surgeon, taylor_fo, blocks):
    """Accuracies with 50, 70 and 80 % gone."""

    def at(fractions, accuracies):
        known = dict(zip((0.5, 0.7, 0.8), accuracies, strict=True))
        return {"accuracy": [known.get(fraction, math.nan) for fraction in fractions]}

    found = {"surgeon": surgeon, "taylor_fo": taylor_fo, "surgeon, blocks": blocks}
    curves = {name: at(Plan().fractions, accuracies) for name, accuracies in found.items()}
    return {"network": network, "seed": seed, "accuracy": 0.97, "curves": {INNER: curves}}


def test_bars_are_differences_of_means_over_seeds():
    records = [
        record("plain", 0, (0.965, 0.9, 0.8), taylor_fo=(0.9, 0.8, 0.7), blocks=(0.9, 0.85, 0.8)),
        record("plain", 1, (0.955, 0.9, 0.8), taylor_fo=(0.9, 0.88, 0.5), blocks=(0.9, 0.91, 0.8)),
        record("dense", 0, (0.900, 0.9, 0.8), taylor_fo=(0.9, 0.9, 0.7), blocks=(0.9, 0.88, 0.8)),
    ]
    epochs = {"plain": 10, "dense": 14, ALL: None}
    summary = {group: {"tuning": {"surgeon": {"epochs": epoch}}} for group, epoch in epochs.items()}
    rows = {row["asked"]: row for row in bars(records, summary, Plan())}
    gone = "of inner channels gone"
    means = {asked: {group: of["mean"] for group, of in rows[asked]["found"].items()} for asked in [*rows][:-1]}
    # Of all: the mean over seeds of each seed's mean over networks.
    assert means[f"dense - surgeon, 50% {gone}"] == pytest.approx({ALL: 0.02625, "plain": 0.01, "dense": 0.07})
    assert means[f"surgeon - taylor_fo, 70% {gone}"] == pytest.approx({ALL: 0.035, "plain": 0.06, "dense": 0})
    assert means[f"full - blocks, 70% {gone}"] == pytest.approx({ALL: 0.0125, "plain": 0.02, "dense": 0.02})
    assert rows[f"dense - surgeon, 50% {gone}"]["met"][ALL] is False
    assert rows[f"surgeon - taylor_fo, 70% {gone}"]["met"] == {ALL: False, "plain": True, "dense": False}
    assert rows[f"surgeon - taylor_fo, 80% {gone}"]["met"] == {ALL: True, "plain": True, "dense": False}
    assert rows[f"full - blocks, 50% {gone}"]["met"] == {ALL: False, "plain": False, "dense": True}
    assert rows["epochs to taylor_fo's accuracy after 20"]["met"] == {"plain": True, "dense": False, ALL: False}


def test_the_first_epoch_counts():
    assert first_at(0.9, [0.1, 0.9, 0.95], [0, 2, 5]) == 2
    assert first_at(0.96, [0.1, 0.9, 0.95], [0, 2, 5]) is None


@pytest.mark.parametrize("form", resnet50.FORMS)
def test_half_of_a_torchvision_network_goes(form):
    pytest.importorskip("torchvision")
    found = resnet50.half_removed("resnet18", form, rows=8, size=32)
    assert found["removed"] == found["units"] / 2 and found["finite"]
    assert found["blocks"] == (1 if form == "full" else 12)
    shown = {form: found | {"total s": 61.0, "peak GiB": 5.0} for form in resnet50.FORMS}
    assert [bar >= value for _, bar, value in resnet50.bars(shown)] == [False, True, True, True]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_pools_of_every_network_have_gates_that_fold(network):
    from taylorkern.compensation import adjustable

    model = NETWORKS[network]().eval()
    scores = tk.Scores(tk.convert(model), digits().train_images[:1], gram="full")
    assert bool(adjustable(model, scores.coupling).all())
    assert len(pools(scores, "")["inner channels"]) > 50
