"""A sample of Hugging Face's architectures: cut at random, each equals its masked dense self in float64."""

import pytest

from bench.zoo import examine

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'taylorkern[zoo]'")

SAMPLE = {  # the least share of channels that can be cut
    "bert (eager)": 0.7,
    "deberta v2": 0.3,
    "gemma": 0.35,
    "llama (eager)": 0.6,
    "mobilenet v2": 0.9,
    "segformer": 0.5,
    "swin v2": 0.7,
    "t5": 0.15,
    "wav2vec2": 0.2,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name):
    row = examine("transformers", name, seed=1)
    assert row.result == "equal", row.note
    assert row.error <= 1e-8
    assert row.free_channels >= SAMPLE[name]
