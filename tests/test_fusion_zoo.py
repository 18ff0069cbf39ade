"""A sample of the zoo, fused: a scored step in float64 is the unfused one, and float32 is no further off than torch."""

import pytest

from bench.fused_zoo import examine
from tests.fused import needs_kernels

pytestmark = needs_kernels

SAMPLE = {
    "resnet18": {"relu": 9, "+relu": 8},
    "mobilenet_v2": {"relu6": 35},
    "mobilenet_v3_small": {"relu": 5, "hardswish": 18},
    "shufflenet_v2_x0_5": {"relu": 37},
    "squeezenet1_1": {},
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name):
    row = examine(name, seed=1)
    assert row.chains == SAMPLE[name]
    assert row.passed, row
    assert row.left == ""
