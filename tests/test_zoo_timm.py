"""A sample of timm's architectures: cut at random, each equals its masked dense self in float64."""

import pytest

from bench.zoo import examine
from bench.zoo.timm_networks import choice

pytest.importorskip("timm", reason="timm is not installed: pip install 'taylorkern[zoo]'")

SAMPLE = {  # the least share of units that can be cut
    "convnext_zepto_rms": 0.9,
    "ghostnet_050": 0.95,
    "mixer_s16_224": 0.95,
    "mobilenetv2_035": 0.95,
    "repvit_m1": 0.95,
    "resnet10t": 0.95,
    "test_vit": 0.9,
    "vovnet39a": 0.95,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name):
    row = examine("timm", name, seed=1)
    assert row.result == "equal", row.note
    assert row.error <= 1e-8
    assert row.free_units >= SAMPLE[name]


def test_every_network_belongs_to_one_that_is_chosen():
    import timm

    chosen = choice().values()
    assert {c["module"] for c in chosen} == set(timm.list_modules())
    stands_for = {(c["module"], c["architecture"], c["family"]): c["stands_for"] for c in chosen}
    assert sum(stands_for.values()) == len(timm.list_models())
