"""Scoring where no number can be looked at, and nothing may be moved: on the meta device, in the place of a GPU."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import taylorkern as tk
from bench.zoo import torchvision
from taylorkern import backends, tally
from taylorkern import scores as scoring
from taylorkern.criteria import CHANGES, CRITERIA
from tests.cases import normal
from tests.networks import plain, residual

VIEWS = ("detach", "view", "slice", "select", "split", "unsqueeze", "expand", "alias", "t", "transpose", "permute")
CURVED = [name for name, c in CRITERIA.items() if set(c.needs) & set(tally.FROM_CURVATURE)]


class Followed(TorchDispatchMode):
    """Counts operations that would be launches on a GPU, and notes those that move tensors between devices."""

    def __init__(self):
        super().__init__()
        self.launches, self.moves = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        given, made = ([t for t in tree_leaves(of) if isinstance(t, Tensor)] for of in ((args, kwargs), result))
        # A number on the CPU may go into a kernel as an argument, unless it is copied; a tensor has to be moved.
        met = [t for t in given if t.dim() or "copy" in name] + made
        if len({t.device for t in met}) > 1:
            self.moves.append((str(func), [(tuple(t.shape), str(t.device)) for t in (*given, *made)]))
        self.launches[name] += not name.startswith(VIEWS) and any(t.is_meta for t in (*given, *made))
        return result


@pytest.fixture
def scored(monkeypatch):
    """A scored model on the meta device, with the units that it has on the CPU."""
    monkeypatch.setitem(backends.PROVIDERS, "meta", (backends.reference,))

    def build(network, x, **options):
        here = tk.convert(network())
        coupling = tk.coupling.couple(here, x)
        model = tk.convert(network(), **{k: v for k, v in options.items() if k == "fuse"}).to("meta")
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "couple", lambda model, example_inputs: coupling)
            patch.setattr(tk.Scores, "_check_differentiable", lambda *_: None)
            return model, tk.Scores(model, x, criteria=options.get("criteria", ()), gram=options.get("gram"))

    return build


def step(model, scores, x, curved=False):
    output = model(x)
    if curved:
        scores.curvature(output)
    F.cross_entropy(output, torch.empty(len(x), dtype=torch.int64, device="meta")).backward()


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("criteria", [(), ("taylor_weight", "taylor_output")], ids=["usual", "on request"])
@pytest.mark.parametrize("network", [residual, plain])
def test_a_scored_step_moves_nothing_and_waits_for_nothing(scored, network, criteria, curved, monkeypatch):
    # On meta there is no autocast, which the repeated convolution of an overwritten output asks for.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
    x = torch.empty(4, 2, 8, 8)
    model, scores = scored(network, x, criteria=criteria)
    x = x.to("meta")
    step(model, scores, x, curved)
    scores.fold()  # indices are made, and statistics go where scores are
    for again in range(3):
        with Followed() as followed:
            step(model, scores, x, curved)
            scores.fold()
        assert not followed.moves
        assert followed.launches.total() > 50  # it was followed
        if again == 1:
            scores.reset()


@pytest.mark.parametrize("fuse", [False, True])
def test_a_fold_is_a_few_launches_however_many_layers_and_samples(scored, fuse):
    """ResNet-50: 53 layers, up to seven of which share a unit's channels; 256 samples."""
    network = torchvision().models.resnet50
    model, scores = scored(network, torch.empty(2, 3, 32, 32), fuse=fuse)
    x = torch.empty(256, 3, 32, 32, device="meta")
    for _ in range(2):
        step(model, scores, x)
        with Followed() as followed:
            scores.fold()
    assert sum(len(layer) for layer in scores.coupling.layers.values()) > 20_000
    assert followed.launches.total() <= 50, followed.launches


@pytest.mark.parametrize("criteria", [("taylor_weight",), ("taylor_output",)])
def test_statistics_on_request_are_folded_together_too(scored, criteria):
    model, scores = scored(residual, torch.empty(2, 2, 8, 8), criteria=criteria)
    x = torch.empty(4, 2, 8, 8, device="meta")
    for _ in range(2):
        step(model, scores, x)
        with Followed() as followed:
            scores.fold()
    layers = len(scores.coupling.layers) if criteria == ("taylor_output",) else len(scores.coupling.filters)
    # A few per layer, for its own sums, none for units.
    assert followed.launches.total() <= 60 + 4 * layers, followed.launches


@pytest.mark.parametrize("gram", ["full", "blocks"])
@pytest.mark.parametrize("curved", [False, True])
def test_a_gram_matrix_waits_for_no_device(scored, gram, curved):
    """Nothing can be read from the meta device, so that waiting for a number there raises."""
    model, scores = scored(residual, torch.empty(4, 2, 8, 8), gram=gram)
    for _ in range(70):  # more rows than are collected before they are folded in
        step(model, scores, torch.empty(4, 2, 8, 8, device="meta"), curved=curved)
        scores.fold()
    assert scores._tally.gram.device.type == "meta"
    assert all(total.is_meta for total in scores._tally.gram._sums)


@pytest.mark.parametrize("name", CRITERIA)
def test_importances_mix_no_devices(scored, name):
    model, scores = scored(residual, torch.empty(4, 2, 8, 8), criteria=[name])
    for _ in range(2):
        step(model, scores, torch.empty(4, 2, 8, 8, device="meta"), curved=name in CURVED)
    scores.fold()
    statistics = scores._tally.statistics
    statistics.count, statistics.dropped, statistics.curved = (torch.tensor(n) for n in (2, 0, 2))
    importance = scores.importance(name)
    assert importance.shape == (len(scores.units),)
    assert importance.device.type == ("cpu" if name == "random" else "meta")
    if name in CHANGES:
        assert scores.predicted_change(name).is_meta


def test_statistics_follow_the_scores_to_another_device_and_stay_there(scored):
    model, scores = scored(residual, torch.empty(4, 2, 8, 8))
    scores.reset()
    assert {total.device.type for total in scores._tally.statistics.sums.values()} == {"cpu"}
    step(model, scores, torch.empty(4, 2, 8, 8, device="meta"))
    scores.fold()
    scores.reset()
    statistics = scores._tally.statistics
    assert {total.device.type for total in statistics.sums.values()} == {"meta"}
    assert {n.device.type for n in (statistics.count, statistics.dropped, statistics.curved)} == {"meta"}


def trained(scores, model, x):
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    scores.fold()


def memory(scores):
    statistics = scores._tally.statistics
    return [*statistics.sums.values(), statistics.count, statistics.dropped]


@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_statistics_stay_in_their_memory(by, monkeypatch):
    """So that a CUDA graph that has captured a fold adds to them with every replay."""
    if by == "torch":
        monkeypatch.setattr(backends.native, "accumulates", lambda *_: False)
    model = tk.convert(residual())
    x = normal((4, 2, 8, 8), 1)
    scores = tk.Scores(model, x, criteria=["taylor_output", "taylor_weight"])
    held = memory(scores)
    for bad in (1, 1, torch.nan):
        trained(scores, model, x * bad)
    assert all(a is b for a, b in zip(held, memory(scores), strict=True))
    assert (scores.minibatches, scores.dropped) == (2, 1)
    assert float(scores._tally.statistics.sums["gate_squared"].sum()) > 0


def test_inference_mode_leaves_no_statistics_that_nobody_may_write_to():
    model = tk.convert(residual())
    x = normal((4, 2, 8, 8), 1)
    scores = tk.Scores(model, x)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    with torch.inference_mode():
        assert scores.minibatches == 1
        state = scores.state_dict()
        scores.reset()
        scores.load_state_dict(state)
    trained(scores, model, x)
    assert scores.minibatches == 2
