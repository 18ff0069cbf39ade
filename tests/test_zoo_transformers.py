"""A sample of Hugging Face's architectures: cut at random, each equals its masked dense self in float64."""

import pytest

from bench.zoo import examine

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'taylorkern[zoo]'")

SAMPLE = {  # the least share of units that can be cut
    "bert (eager)": 0.8,
    "deberta v2": 0.5,
    "gemma": 0.75,
    "llama (eager)": 0.75,
    "mobilenet v2": 0.95,
    "segformer": 0.5,
    "swin v2": 0.9,
    "t5": 0.5,
    "wav2vec2": 0.4,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name):
    row = examine("transformers", name, seed=1)
    assert row.result == "equal", row.note
    assert row.error <= 1e-8
    assert row.free_units >= SAMPLE[name]
