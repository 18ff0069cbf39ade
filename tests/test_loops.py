"""Every loop's scores against the plain one's: precisions, compilers, accumulated backwards, checkpointing.

A precision's own error is how far gates that really multiply, in plain autograd, come out from the same in float32.
"""

import itertools
from functools import cache

import pytest

from tests.loops import DTYPES, EPS, Loop, by_autograd, distances, farthest, importances, network

ROUNDINGS = 16  # of a precision, relative to the largest importance: for another order of sums
LOOPS = [
    Loop(precision, backend, accumulated, checkpointed)
    for precision, backend, accumulated, checkpointed in itertools.product(
        DTYPES, (None, "aot_eager", "inductor"), (1, 4), (False, True)
    )
]
TRAINING = [Loop(precision, backend, training=True) for precision in DTYPES for backend in (None, "inductor")]


@cache
def plain(training):
    return importances(Loop(training=training).run(network()))


@cache
def own_error(precision, training):
    """By criterion."""
    return distances(by_autograd(precision, training), by_autograd("fp32", training))


def told(loop):
    words = [loop.precision, loop.backend or "eager", f"{loop.accumulated} backward{'s' * (loop.accumulated > 1)}"]
    return ", ".join(words + ["checkpointed"] * loop.checkpointed + ["batch statistics"] * loop.training)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_plain_loop_s_scores_are_autograd_s_in_that_precision(precision):
    found = importances(Loop(precision).run(network()))
    assert farthest(found, by_autograd(precision)) < ROUNDINGS * EPS[precision]


@pytest.mark.parametrize("loop", LOOPS + TRAINING, ids=told)
def test_scores_are_those_of_the_plain_loop(loop, record_loop):
    scores = loop.run(network())
    found = distances(importances(scores), plain(loop.training))
    own = own_error(loop.precision, loop.training)
    record_loop(told(loop), found, own)
    assert scores.minibatches == 2 and not scores.dropped
    for name, distance in found.items():
        assert distance < 1.5 * own[name] + ROUNDINGS * EPS["fp32"] + EPS[loop.precision], name
