"""Fusion over whole networks: the same gradients, scores and buffers; what fuses, counted by hand."""

import copy

import pytest
import torch

import taylorkern as tk
from taylorkern.demo.network import DigitsNet
from tests.cases import LAYOUTS, distance, in_layout, normal
from tests.fused import Bottleneck, build, needs_kernels, same
from tests.fused import ran as ran
from tests.networks import randomised

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytestmark = needs_kernels


# Name → image size, BN→activation and BN→add→ReLU by hand: all of a ResNet's but the 1 + 3 or 4 that shortcuts end in.
NETWORKS = {
    "resnet18": (32, 9, 8),
    "mobilenet_v2": (32, 35, 0),
    "densenet121": (32, 121, 0),
    "googlenet": (32, 57, 0),
    "vgg11_bn": (32, 8, 0),
    "shufflenet_v2_x0_5": (32, 37, 0),
}

OTHERS = {
    "resnet50": (64, 33, 16),
    "resnext50_32x4d": (64, 33, 16),
    "mnasnet0_5": (64, 35, 0),
    "regnet_y_400mf": (64, 33, 16),
    "inception_v3": (75, 94, 0),
}

ARGUMENTS = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_scores_and_buffers_are_the_unfused_ones(name, training, layout, ran):
    size, act, add = NETWORKS[name]
    plain = tk.convert(build(name, ARGUMENTS.get(name)).double().train(training))
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    x = in_layout(normal((3, 3, size, size), 1, torch.float64), layout)
    if layout == "channels_last":
        plain, fused = (model.to(memory_format=torch.channels_last) for model in (plain, fused))
    scores = [tk.Scores(model, x[:1]) for model in (plain, fused)]
    ran.clear()
    same(plain, fused, x)
    assert (ran["act"], ran["add"]) == (act, add)
    want, got = (s.importance("taylor_fg") for s in scores)
    assert distance(got, want) < 1e-9 and want.count_nonzero() > len(want) / 2


@pytest.mark.parametrize("name", OTHERS)
def test_what_fuses_elsewhere_and_without_scores(name, ran):
    size, act, add = OTHERS[name]
    plain = build(name, ARGUMENTS.get(name)).double()
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    same(plain, fused, normal((3, 3, size, size), 1, torch.float64))
    assert (ran["act"], ran["add"]) == (act, add)


def test_the_demo_network_fuses_all_but_its_shortcuts(ran):
    plain = DigitsNet((4, 8, 8)).double()
    same(plain, tk.convert(copy.deepcopy(plain), fuse=True), normal((4, 1, 8, 8), 1, torch.float64))
    assert (ran["act"], ran["add"]) == (7, 6)


@pytest.mark.parametrize(("arguments", "act", "add"), [((4, 1), 2, 1), ((4, 2), 2, 1), ((4, 1, True), 2, 0)])
def test_timms_bottleneck(arguments, act, add, ran):
    plain = randomised(Bottleneck(*arguments)).double()
    same(plain, tk.convert(copy.deepcopy(plain), fuse=True), normal((2, 4, 6, 6), 1, torch.float64))
    assert (ran["act"], ran["add"]) == (act, add)
