"""``taylorkern prune``, killed and started again, ends with the bits of a run that nobody disturbed."""

import itertools
import os
import signal
import time
from contextlib import suppress

import pytest

from tests import digits_folder, job_kills, jobs


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    assert job_kills.trial(tmp_path, kills=3, seed=1, options=["--workers", "1", "--augment"]) == []


def test_a_run_whose_workers_outlive_it_goes_on_at_once(tmp_path):
    data, out, log = tmp_path / "data", tmp_path / "out", tmp_path / "log.txt"
    digits_folder.write(data, 8, per_class=10)
    command = jobs.arguments(data, out, "--workers", "1")
    process = jobs.start(command, log)
    try:
        while not list(out.rglob("step-*.pt")):
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert job_kills.run(command, out, log, None)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_difference_of_one_byte_is_found(tmp_path):
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "pruned.safetensors").write_bytes(b"bytes")
        (folder / "history.jsonl").write_text(f'{{"loss": NaN, "seconds": {len(name)}}}\n')
        (folder / "summary.json").write_text(f'{{"widths": {{}}, "dense": {{"latency_ms": {len(name)}}}}}')
    assert jobs.differences(tmp_path / "one", tmp_path / "other") == []
    (folder / "pruned.safetensors").write_bytes(b"bytez")
    (folder / "history.jsonl").write_text('{"loss": 1.0}\n')
    (folder / "summary.json").write_text('{"widths": {"conv": 3}}')
    assert jobs.differences(tmp_path / "one", tmp_path / "other") == [
        "pruned.safetensors", "history.jsonl", "widths", "dense"
    ]  # fmt: skip


def test_a_run_that_gives_up_is_no_survivor(tmp_path):
    command = jobs.arguments(tmp_path / "no data", tmp_path / "out")
    with pytest.raises(job_kills.FailedError, match=r"exit code 1: taylorkern: error: .*no data"):
        job_kills.run(command, tmp_path / "out", tmp_path / "log.txt", None)


def test_moments_are_drawn_by_the_seed_and_cover_every_file():
    drawn = list(itertools.islice(job_kills.moments(3, 10.0), 30))
    assert drawn == list(itertools.islice(job_kills.moments(3, 10.0), 30))
    assert {kill.file for kill in drawn} == {None, *job_kills.FILES}
    seconds = [kill.seconds for kill in drawn if kill.file is None]
    assert min(seconds) < 2 and max(seconds) > 8
