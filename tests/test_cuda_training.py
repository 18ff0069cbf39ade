"""Whole scored steps on a GPU, by every backend: results, precision, no waiting, graphs; on the CPU the same tests."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from taylorkern import backends
from taylorkern.layers import BatchNorm2d, fused_batch_norm
from tests.cases import distance, normal
from tests.devices import DEVICES, PROVIDERS, captured, exact, forced, serves, without_waiting
from tests.networks import plain, randomised, residual

FUSE = pytest.mark.parametrize("fuse", [False, True], ids=["drop-in", "fused"])
EACH = pytest.mark.parametrize("device,provider", PROVIDERS)
CRITERIA = ("taylor_fo", "taylor_fg", "taylor_so_fisher", "bn_taylor", "magnitude", "bn_scale")
ON_REQUEST = ("taylor_weight", "taylor_output")


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


def network(kind=residual):
    torch.manual_seed(0)
    return kind()


def examples(seed, device="cpu", samples=8):
    return normal((samples, 2, 8, 8), seed).to(device), (torch.arange(samples) % 5).to(device)


def scored(device, fuse, kind=residual, criteria=ON_REQUEST):
    model = tk.convert(network(kind).to(device), fuse=fuse)
    return model, tk.Scores(model, examples(0, device)[0], criteria=criteria)


def step(model, x, y):
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def importances(scores, names=(*CRITERIA, *ON_REQUEST)):
    return {name: scores.importance(name).cpu() for name in names}


def close(got, want, bound):
    for name, importance in want.items():
        known = importance.isfinite()
        assert torch.equal(got[name].isfinite(), known), name
        assert distance(got[name][known], importance[known]) < bound, name


@cache
def expected(kind=residual):
    """On the CPU, in float64 by the reference, without fusion, of three minibatches."""
    model = tk.convert(network(kind).double())
    with forced("cpu", backends.reference):
        scores = tk.Scores(model, examples(0)[0].double(), criteria=ON_REQUEST)
        for seed in (1, 2, 3):
            x, y = examples(seed)
            step(model, x.double(), y)
        return importances(scores)


@FUSE
@pytest.mark.parametrize("kind", [residual, plain])
@EACH
def test_importances_are_those_of_float64(device, provider, kind, fuse):
    serves(device, provider, torch.float32)
    with forced(device, provider):
        model, scores = scored(device, fuse, kind)
        for seed in (1, 2, 3):
            step(model, *examples(seed, device))
        assert (scores.minibatches, scores.dropped) == (3, 0)
        close(importances(scores), expected(kind), 2e-4)


@EACH
def test_curvature_is_float64s(device, provider):
    serves(device, provider, torch.float32)
    found = []
    for dtype, where, by in ((torch.float64, "cpu", backends.reference), (torch.float32, device, provider)):
        with forced(where, by):
            model = tk.convert(network().to(where, dtype), fuse=True)
            scores = tk.Scores(model, examples(0, where)[0].to(dtype))
            x, y = examples(1, where)
            logits = model(x.to(dtype))
            scores.curvature(logits, y, method="exact")
            F.cross_entropy(logits, y).backward()
            found.append(importances(scores, ("taylor_so", "obd")))
    close(found[1], found[0], 2e-4)


@FUSE
@EACH
def test_a_pruned_network_is_the_cpus(device, provider, fuse):
    """Scored, cut and trained on: the same units go, and the outputs agree."""
    serves(device, provider, torch.float32)
    results = []
    for where, by in (("cpu", backends.reference), (device, provider)):
        with forced(where, by):
            model = tk.convert(network().to(where), fuse=fuse)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            pruner = tk.Pruner(model, examples(0, where)[0], optimizer=optimizer, every=2, step=3, target=0.7)
            removed = []
            for seed in range(1, 9):
                optimizer.zero_grad()
                F.cross_entropy(model(examples(seed, where)[0]), examples(seed, where)[1]).backward()
                optimizer.step()
                removed.append([unit.places for unit in pruner.step()])
            assert {p.device.type for p in model.parameters()} == {where}
            model.eval()
            results.append((removed, model(examples(9, where)[0]).detach().cpu(), pruner.kept))
    assert sum(map(len, results[0][0])) > 5
    assert results[1][0] == results[0][0] and results[1][2] == results[0][2]
    assert distance(results[1][1], results[0][1]) < 1e-3


@FUSE
@EACH
def test_the_same_step_gives_the_same_bits(device, provider, fuse):
    serves(device, provider, torch.float32)
    found = []
    with forced(device, provider):
        for _ in range(3):
            model, scores = scored(device, fuse)
            for seed in (1, 2):
                step(model, *examples(seed, device))
            found.append(importances(scores))
    for again in found[1:]:
        for name, importance in found[0].items():
            assert torch.equal(again[name], importance), name


@pytest.mark.parametrize("device", DEVICES)
def test_torchs_deterministic_mode_is_content(device):
    """With torch.use_deterministic_algorithms(True) an operation that is not raises."""
    model, scores = scored(device, fuse=True, criteria=ON_REQUEST)
    torch.use_deterministic_algorithms(True)
    try:
        for seed in (1, 2):
            # The classifier's matrix product may need CUBLAS_WORKSPACE_CONFIG, which is not the question here.
            model[:-1](examples(seed, device)[0]).square().mean().backward()
            scores.fold()
        assert scores.minibatches == 2
        importances(scores)
    finally:
        torch.use_deterministic_algorithms(False)


def eager_scores(model, x, y):
    """s of every batch normalisation by torch alone: its output times its gradient, summed over positions."""
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    logits = model(x)
    gradients = torch.autograd.grad(F.cross_entropy(logits.to(y.device).float(), y), list(outputs.values()))
    for hook in hooks:
        hook.remove()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = zip(outputs.items(), gradients, strict=True)
    return {name: (a.to(wide) * g.to(wide)).sum((2, 3)).cpu() for (name, a), g in pairs}


class Stacked(nn.Module):
    """Batch normalisations of every kind, none overwritten, so that torch can be asked for their outputs."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last, self.bn3 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(self.bn2(self.conv(x)) + x)
        x = self.bn3(self.last(x))
        return self.head(x.mean((2, 3)))


def narrow(model, dtype):
    """Weights of convolutions in ``dtype``, normalisations in float32, as mixed precision has it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
    return model


@FUSE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH
def test_s_is_as_near_to_float64_as_torchs_own(device, provider, dtype, fuse):
    serves(device, provider, dtype)
    ours, torchs = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        model = narrow(randomised(Stacked()), dtype)
        x, y = normal((16, 2, 12, 12), seed, dtype), torch.arange(16) % 5
        want = eager_scores(copy.deepcopy(model).double(), x.double(), y)
        eager = eager_scores(copy.deepcopy(model).to(device), x.to(device), y.to(device))
        with forced(device, provider):
            model = tk.convert(model.to(device), fuse=fuse)
            scores = tk.Scores(model, None, layers=list(want))
            F.cross_entropy(model(x.to(device)).float(), y.to(device)).backward()
            found = {name: model.get_submodule(name).gate.drain()[0].cpu() for name in want}
            del scores
        ours += [distance(found[name], want[name]) for name in want]
        torchs += [distance(eager[name], want[name]) for name in want]
    assert sum(ours) <= 2 * sum(torchs), (ours, torchs)


@FUSE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH
def test_a_step_under_autocast(device, provider, dtype, fuse):
    """Narrow activations, wide weights: statistics near float64's, gradients and buffers of their own dtypes."""
    serves(device, provider, dtype)
    with forced(device, provider):
        model, scores = scored(device, fuse)
        for seed in (1, 2, 3):
            x, y = examples(seed, device)
            with torch.autocast(device, dtype=dtype):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
        assert scores.dropped == 0
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}
        got, want = importances(scores), expected()
    for name in CRITERIA:
        known = want[name].isfinite()
        assert distance(got[name][known], want[name][known]) < {torch.bfloat16: 0.2, torch.float16: 0.02}[dtype], name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wide", ["residual", "dy"])
def test_dtypes_may_differ_between_arguments(wide, device):
    """Beside a narrow x: a float32 residual, whose gradient is float32, or a float32 gradient from behind."""
    layer = randomised(BatchNorm2d(6)).to(device)
    x, r = (normal((4, 6, 5, 5), seed).to(device) for seed in (1, 2))
    found = []
    for narrowed in (False, True):
        a = x.bfloat16().to(torch.bfloat16 if narrowed else torch.float32).requires_grad_()
        b = (r if wide == "residual" else r.to(a.dtype)).detach().clone().requires_grad_()
        y = fused_batch_norm(layer, None, a, b, "relu")
        assert y.dtype == a.dtype
        loss = (y.float() if wide == "dy" else y).square().sum().float()
        found.append([y, *torch.autograd.grad(loss, (a, b))])
        assert [g.dtype for g in found[-1][1:]] == [a.dtype, b.dtype]
    for got, want in zip(found[1], found[0], strict=True):
        assert distance(got, want) < 2e-2


@FUSE
@pytest.mark.parametrize("criteria", [(), ON_REQUEST], ids=["usual", "on request"])
@EACH
def test_scoring_waits_for_nothing(device, provider, criteria, fuse):
    """From the second step on: the first moves indices to the GPU."""
    serves(device, provider, torch.float32)
    with forced(device, provider):
        model, scores = scored(device, fuse, criteria=criteria)
        data = [examples(seed, device) for seed in range(4)]
        step(model, *data[0])
        scores.fold()
        scores.reset()
        with without_waiting(device):
            for x, y in data[1:]:
                logits = model(x)
                scores.curvature(logits, y)
                F.cross_entropy(logits, y).backward()
                scores.fold()
        assert scores.minibatches == 3


@FUSE
@EACH
def test_a_scored_step_in_a_graph_adds_to_the_statistics_with_every_replay(device, provider, fuse):
    serves(device, provider, torch.float32)
    with forced(device, provider):
        found = []
        for in_graph in (True, False):
            model, scores = scored(device, fuse)
            x, y = examples(0, device)

            def work(model=model, scores=scores, x=x, y=y):
                step(model, x, y)
                scores.fold()  # within the graph, where a forward would else do it

            model.eval()  # the running statistics of the steps before the graph are no question here
            run = captured(device, work, settle=scores.reset) if in_graph else work
            for seed in (4, 5, 6):
                for into, new in zip((x, y), examples(seed, device), strict=True):
                    into.copy_(new)
                run()
            assert scores.minibatches == 3
            found.append(importances(scores, CRITERIA))
        close(found[0], found[1], 1e-5)
