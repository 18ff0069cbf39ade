"""Processes killed with -9 in the middle of a run, which go on from their checkpoints, end with the same bits."""

import os
import random
import signal
import time

import pytest

from tests.checkpointed import assert_same_bits
from tests.distributed.killed import EVERY
from tests.distributed.launch import finished, left, started


def outcome(folder):
    return [{"parts": found["parts"], "removed": found["removed"]} for found in left(folder, 2)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finished(started("killed", 2, str(folder)))
    return outcome(folder)


def test_a_process_that_dies_in_a_round_is_started_again_by_torchrun(undisturbed, tmp_path):
    finished(started("killed", 2, str(tmp_path), "9", restarts=1))
    assert (tmp_path / "killed").exists() and [found["from"] for found in left(tmp_path, 2)] == [9, 9]
    assert_same_bits(outcome(tmp_path), undisturbed)


def test_processes_that_are_killed_at_random_go_on_when_started_by_hand(undisturbed, tmp_path):
    running = started("killed", 2, str(tmp_path))
    until(lambda: any((tmp_path / "kept").glob(f"step-{EVERY}.rank*")), running)
    chance = random.Random()
    time.sleep(chance.uniform(0, 0.5))
    os.kill(int((tmp_path / f"{chance.randrange(2)}.pid").read_text()), signal.SIGKILL)
    said, _ = running.communicate(timeout=60)
    assert running.returncode, said
    finished(started("killed", 2, str(tmp_path)))
    assert all(found["from"] for found in left(tmp_path, 2))
    assert_same_bits(outcome(tmp_path), undisturbed)


def until(happens, running):
    while not happens():
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
