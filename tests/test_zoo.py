"""A sample of the zoo: cut at random, each network equals its masked dense self in float64."""

import pytest

from bench.zoo import examine

SAMPLE = {
    "alexnet": 0.8,
    "densenet121": 0.9,
    "mobilenet_v3_small": 0.9,
    "regnet_y_400mf": 0.9,
    "resnet18": 0.9,
    "resnext50_32x4d": 0.9,
    "shufflenet_v2_x0_5": 0.7,
    "squeezenet1_1": 0.7,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name):
    row = examine("torchvision", name, seed=1)
    assert row.result == "equal", row.note
    assert row.error <= 1e-9
    assert row.free_channels >= SAMPLE[name]
    assert not row.frozen_by


def test_transformers_are_cut_in_part_and_name_what_stops_the_rest():
    row = examine("torchvision", "swin_t", seed=1)
    assert row.result == "equal", row.note
    assert row.error <= 1e-9
    assert row.free_units > 0.5
    assert "aten.native_layer_norm.default" in [operation for operation, _, _ in row.frozen_by]
