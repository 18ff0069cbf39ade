"""A training that is killed again and again ends with the bits of one that nobody disturbed."""

import os

import pytest

from taylorkern import sealed
from tests.checkpointed import assert_same_bits
from tests.killing import survive

KILLS = int(os.environ.get("TAYLORKERN_TEST_KILLS", "4"))


def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    steps, undisturbed, disturbed = 60 * KILLS, tmp_path / "undisturbed", tmp_path / "disturbed"
    program = ["-m", "tests.checkpointed"]
    whole = survive([*program, str(undisturbed), str(steps)])
    found = survive([*program, str(disturbed), str(steps)], KILLS, whole.seconds / KILLS, seed=1)
    assert found.kills == KILLS
    last = f"step-{steps}.pt"
    assert sorted(os.listdir(undisturbed)) == sorted(os.listdir(disturbed))
    want, got = sealed.read(undisturbed / last), sealed.read(disturbed / last)
    assert want["parts"]["pruner"]["steps"] > 4 and len(want["parts"]["pruner"]["kept"]) < 18
    assert_same_bits(want, got)


def test_a_program_that_fails_is_no_survivor(tmp_path):
    with pytest.raises(RuntimeError, match="before it said that it has started"):
        survive(["-c", "print('nothing')"])
    with pytest.raises(RuntimeError, match="ended with 3"):
        survive(["-c", "print('started'); raise SystemExit(3)"], kills=1, within=30)
