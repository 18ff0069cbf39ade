"""The surgeon and compensation through tk.Pruner and tk.prune: what goes, what makes up, what is refused."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from bench.zoo import masked
from taylorkern.budget import Meter
from taylorkern.demo.network import DigitsNet
from taylorkern.shrinking import Shrinking
from taylorkern.surgeon import COST_POWER, DAMPING, choose, shift
from tests import compensated
from tests.compensated import of_the_kept


def digits_net(seed=0):
    """With statistics and scales that are not those of a new network."""
    torch.manual_seed(seed)
    model = DigitsNet((8, 12, 16), 1).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return tk.convert(model).eval()


def batches(count=3, samples=16):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64),
         torch.randint(0, 10, (samples,), generator=generator))
        for _ in range(count)
    ]  # fmt: skip


def scored(model, sketched=False, **options):
    data = batches()
    scores = tk.Scores(model, data[0][0][:1], **options)
    signs = torch.Generator().manual_seed(0)
    for x, y in data:
        logits = model(x)
        if sketched:
            scores.curvature(logits, y, generator=signs)
        F.cross_entropy(logits, y).backward()
    model.zero_grad()
    return scores


def gated(model, coupling, removed, z):
    """The dense model's logits with the gates z really multiplied and the removed units' consumers at nought."""
    with masked(model, coupling, removed), compensated.gated(model, coupling, of_the_kept(z, removed)), torch.no_grad():
        return model(batches()[1][0])


@pytest.mark.parametrize("of,target", [("channels", 0.5), ("flops", 0.4), ("params", 0.3)])
@pytest.mark.parametrize("form", ["full", "blocks"])
@pytest.mark.parametrize("sketched", [False, True])
def test_prune_removes_what_the_surgeon_chooses_and_compensates(of, target, form, sketched):
    model = digits_net()
    scores = scored(model, sketched, gram=form)
    assert scores.gram_source == ("curvature" if sketched else "fisher")
    dense, coupling, blocks = copy.deepcopy(model), scores.coupling, scores.gram()
    meter = Meter(model, coupling, of)
    expected = choose(blocks, Shrinking(coupling, meter, target * meter.total), cost_power=COST_POWER)
    z = 1 + shift(blocks, expected)
    removed = tk.prune(model, batches()[0][0][:1], criterion="surgeon", target=target, of=of)
    assert removed == [coupling.units[u] for u in expected.tolist()]
    assert Meter(model, scores.coupling, of).total <= target * meter.total
    with torch.no_grad():
        difference = (model(batches()[1][0]) - gated(dense, coupling, expected, z)).abs().max()
    assert difference < 1e-9
    assert (z[torch.isin(torch.arange(len(z)), expected, invert=True)] - 1).abs().max() > 0.01  # it did make up


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_so_fisher", "magnitude"])
def test_any_criterion_compensates_on_request(criterion):
    model = digits_net()
    scores = scored(model, gram="auto")
    importance, coupling, blocks = scores.importance(criterion), scores.coupling, scores.gram()
    dense, named, given = (copy.deepcopy(model) for _ in range(3))
    again = scored(named, gram="auto")
    gone = tk.prune(named, batches()[0][0][:1], criterion=criterion, target=0.5, of="channels", compensate=True)
    assert len(again.units) + len(gone) == len(coupling.units)
    watching = scored(given, gram="auto")
    assert gone == tk.prune(given, batches()[0][0][:1], importance, target=0.5, of="channels", compensate=True)
    assert len(watching.units) == len(again.units)
    removed = torch.tensor([coupling.units.index(unit) for unit in gone])
    x = batches()[1][0]
    with torch.no_grad():
        assert torch.equal(named(x), given(x))
        want = gated(dense, coupling, removed, 1 + shift(blocks, removed))
        assert (named(x) - want).abs().max() < 1e-9


def test_compensation_can_be_left_out_and_bounded():
    outputs, x = {}, batches()[1][0]
    for name, options in {"freely": {}, "bounded": {"bound": 1e-3}, "not": {"compensate": False}}.items():
        model = digits_net()
        scores = scored(model, gram="full")
        tk.prune(model, x[:1], criterion="surgeon", target=0.6, of="channels", **options)
        assert len(scores.units) <= 0.6 * int(scores.coupling.dense.max() + 1)
        with torch.no_grad():
            outputs[name] = model(x)
    near, far = ((outputs[name] - outputs["not"]).abs().max() for name in ("bounded", "freely"))
    assert 0 < near < far / 5


def test_scores_start_anew_where_gates_have_moved():
    model, x = digits_net(), batches()[0][0][:1]
    scores = scored(model, gram="full")
    tk.prune(model, x, criterion="surgeon", target=0.8, compensate=False)
    assert scores.minibatches == 3
    tk.prune(model, x, criterion="surgeon", target=0.8)
    assert scores.minibatches == 0
    with pytest.raises(RuntimeError, match="no score yet"):
        tk.prune(model, x, criterion="surgeon", target=0.8)


def test_a_cut_in_inference_mode_can_be_trained_on():
    model, (x, labels) = digits_net(), batches()[0]
    optimizer = torch.optim.AdamW(model.parameters())
    scores = scored(model, gram="full")
    optimizer.step()
    with torch.inference_mode():
        tk.prune(model, x[:1], criterion="surgeon", target=0.7, optimizer=optimizer)
        tk.prune(model, x[:1], criterion="magnitude", target=0.7, optimizer=optimizer)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    assert scores.minibatches == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_pruner_keeps_the_matrix_as_it_is_told():
    model, (x, labels) = digits_net(), batches()[0]
    units = len(tk.couple(model, x[:1]).units)
    pruner = tk.Pruner(
        model, x[:1], criterion="surgeon", every=1, target=0.9, gram="auto", gram_budget=8 * units**2 - 1
    )
    assert len(pruner.scores.units) == units
    F.cross_entropy(model(x), labels).backward()
    assert len(pruner.scores.gram()) > 1
    assert pruner.step()


def test_less_is_lost_than_without():
    """On what it was scored on, the quadratic that the surgeon lowers: by itself, and against taylor_fo's choice."""
    model = digits_net()
    scores = scored(model, gram="full")
    [block] = scores.gram()
    ridge = DAMPING * float(block.matrix.diagonal().mean())
    meter = Meter(model, scores.coupling, "channels")
    remaining = Shrinking(scores.coupling, meter, 0.5 * meter.total)
    surgeons = choose([block], remaining, cost_power=COST_POWER)
    first = scores.importance("taylor_fo").argsort()[: len(surgeons)]

    def loss(removed, d):
        return float(d @ block.matrix @ d / 2 + ridge / 2 * d.square().sum())

    still = torch.zeros(len(scores.units), dtype=torch.float64)
    made_up = [loss(removed, shift([block], removed)) for removed in (surgeons, first)]
    assert made_up[0] < made_up[1] < loss(first, still.index_fill(0, first, -1))


@pytest.mark.parametrize("sketched", [False, True])
def test_pruner_goes_to_the_target_by_the_surgeon(sketched):
    model = digits_net().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    data = batches()
    pruner = tk.Pruner(
        model, data[0][0][:1], optimizer=optimizer, criterion="surgeon", target=0.4, every=2, step=4, min_channels=2
    )
    rounds = 0
    for i in range(200):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        logits = model(x)
        if sketched:
            pruner.scores.curvature(logits, y)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        before = copy.deepcopy(model.stem[1].weight)
        rounds += bool(pruner.step())
        assert model.stem[1].weight.isfinite().all() and len(before) >= len(model.stem[1].weight) >= 2
        if pruner.done:
            break
    assert pruner.done and rounds > 3
    assert all(p.isfinite().all() for p in model.parameters())
    assert min(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) >= 2


def test_pruner_resumes_to_the_same_bits_with_the_surgeon():
    def made():
        model = digits_net()
        return model, tk.Pruner(model, batches()[0][0][:1], criterion="surgeon", target=0.5, every=2, step=5)

    def go_on(model, pruner, steps):
        for i in steps:
            x, y = batches()[i % 3]
            F.cross_entropy(model(x), y).backward()
            pruner.step()

    straight, pruner = made()
    go_on(straight, pruner, range(7))
    broken, pruner = made()
    go_on(broken, pruner, range(3))
    kept = pruner.state_dict(), broken.state_dict()
    resumed, pruner = made()
    pruner.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    go_on(resumed, pruner, range(3, 7))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_cut_that_fails_leaves_everything_as_it_was(monkeypatch):
    model = digits_net()
    scores = scored(model, gram="full")
    before, blocks = copy.deepcopy(model.state_dict()), scores.gram()

    def fails(*_, **__):
        raise tk.SurgeryError("refused: for a test")

    monkeypatch.setattr("taylorkern.surgery.check", fails)
    with pytest.raises(tk.SurgeryError):
        tk.prune(model, batches()[0][0][:1], criterion="surgeon", target=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(scores.gram()[0].matrix, blocks[0].matrix)


def test_minibatches_that_are_not_finite_leave_no_trace():
    model, x = digits_net(), batches()[0][0][:1]
    scores = scored(model, gram="full")
    clean = scores.gram()[0].matrix
    bad = batches()[0][0].clone()
    bad[3, 0, 0, 0] = math.nan
    model(bad).square().mean().backward()
    assert scores.dropped == 1
    assert torch.equal(scores.gram()[0].matrix, clean)
    tk.prune(model, x, criterion="surgeon", target=0.5)
    assert all(p.isfinite().all() for p in model.parameters())


def test_one_sample_for_all_units_and_one_that_is_dead():
    model, (x, y) = digits_net(), batches()[0]
    with torch.no_grad():
        model.blocks[0].bn1.weight[3] = model.blocks[0].bn1.bias[3] = 0
    scores = tk.Scores(model, x[:1], gram="full")
    F.cross_entropy(model(x[:1]), y[:1]).backward()
    [block] = scores.gram()
    silent = (block.matrix.diagonal() == 0).nonzero().flatten().tolist()
    assert ("blocks.0.bn1", 3) in [scores.units[u].places[0] for u in silent]
    expected = [scores.units[u] for u in silent]
    removed = tk.prune(model, x[:1], criterion="surgeon", target=0.3, of="channels")
    assert removed[: len(silent)] == expected
    assert all(p.isfinite().all() for p in model.parameters())


def test_gates_that_nothing_can_take_up_stay_at_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 16, 10),
    ).double()  # fmt: skip
    model = tk.convert(model).eval()
    scores = scored(model, gram="full")
    coupling, blocks, dense = scores.coupling, scores.gram(), copy.deepcopy(model)
    gone = tk.prune(model, batches()[0][0][:1], criterion="surgeon", target=0.6, of="channels")
    removed = torch.tensor([coupling.units.index(unit) for unit in gone])
    fixed = torch.tensor([unit.places[0][0] == "1" for unit in coupling.units])
    z = 1 + shift(blocks, removed, fixed=fixed)
    x = batches()[1][0]
    with torch.no_grad():
        assert (model(x) - gated(dense, coupling, removed, z)).abs().max() < 1e-9


def wrong_requests():
    x = batches()[0][0][:1]
    yield "neither", lambda m: tk.prune(m, x), "either importance"
    yield "both", lambda m: tk.prune(m, x, torch.zeros(3), criterion="taylor_fo"), "either importance"
    yield "unknown", lambda m: tk.prune(m, x, criterion="surgeom"), "known are .*surgeon"
    yield "target", lambda m: tk.prune(m, x, criterion="surgeon", target=1e-4), "can't be reached"
    yield "damping", lambda m: tk.prune(m, x, criterion="surgeon", damping=-1), "damping=-1"
    yield "power", lambda m: tk.prune(m, x, criterion="surgeon", cost_power=-1), "cost_power=-1"
    yield "width", lambda m: tk.prune(m, x, criterion="surgeon", min_channels=0), "min_channels=0"
    yield "bound", lambda m: tk.prune(m, x, criterion="surgeon", bound=0), "bound=0"
    yield "momentum", lambda m: tk.Pruner(m, x, criterion="surgeon", momentum=0.5), "momentum=0.5"
    yield "pruner", lambda m: tk.Pruner(m, x, criterion="surgeom"), "known are .*surgeon"


@pytest.mark.parametrize("request_", [pytest.param(r, id=r[0]) for r in wrong_requests()])
def test_wrong_requests_change_nothing(request_):
    _, call, message = request_
    model = digits_net()
    scores = scored(model, gram="full")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert scores.minibatches == 3


def test_without_scores_or_their_matrix_it_says_what_to_do():
    x = batches()[0][0][:1]
    with pytest.raises(ValueError, match=r"Scores\(model, example_inputs"):
        tk.prune(digits_net(), x, criterion="surgeon")
    with pytest.raises(ValueError, match=r"Scores\(model, example_inputs"):
        tk.prune(digits_net(), x, torch.zeros(36), compensate=True)
    model = digits_net()
    scores = scored(model)
    with pytest.raises(ValueError, match="gram="):
        tk.prune(model, x, criterion="surgeon")
    with pytest.raises(ValueError, match="gram="):
        tk.prune(model, x, criterion="taylor_fo", compensate=True)
    assert scores.minibatches == 3


def test_no_minibatch_is_said_to_be_none():
    model = digits_net()
    scores = tk.Scores(model, batches()[0][0][:1], criteria=["surgeon"])
    with pytest.raises(RuntimeError, match="no score yet"), warnings.catch_warnings():
        warnings.simplefilter("error")
        tk.prune(model, batches()[0][0][:1], criterion="surgeon")
    assert scores.minibatches == 0
