"""Measurements kept in a file: interrupted, continued, damaged, copied, and of something else."""

import copy
import json
import os
import re
import shutil

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from taylorkern import files, measurements
from tests.networks import plain, residual
from tests.oracles import CHECKS, TOGETHER, StoppedError, batch, made, measured, stopping_after


def columns_measured(file):
    return int(safetensors.torch.load_file(file)["measured"].sum())


def copies_to_run(file, minibatches):
    """What is not measured; beside a row's first group the whole runs too, and a unit of the first one done, alone."""
    known = safetensors.torch.load_file(file)["measured"]
    measured = torch.zeros(minibatches, known.shape[1], dtype=torch.bool)
    measured[: len(known)] = known
    missing = ~measured
    return int(missing.sum() + missing[:, 1].sum() + (missing[:, 1:].sum(1) > 1).sum())


# The first minibatch, of 36 units, ends at 1 + 36 + 8 losses; its first group is kept after 1 + 7 + 8.
@pytest.mark.parametrize("calls", [0, 1, 15, 16, 40, 44, 45, 46, 80])
def test_an_interrupted_oracle_goes_on_where_it_stopped(tmp_path, calls):
    model, batches, file = made(residual), [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    whole, runs = measured(model, batches, None)
    columns = 2 * (1 + whole.shape[1])
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(calls))
    done = columns_measured(file)
    left = copies_to_run(file, 2)
    assert done >= calls - 2 * CHECKS - TOGETHER
    changes, again = measured(model, batches, file)
    assert torch.equal(changes, whole)
    assert runs == columns + 2 * 2
    assert again == left + (done > 0)  # and the first loss, which tells another loss apart
    assert columns_measured(file) == columns
    changes, again = measured(model, batches, file)
    assert torch.equal(changes, whole)
    assert again == 1
    assert os.listdir(tmp_path) == [file.name]


def test_what_was_written_within_a_minibatch_outlives_a_kill(tmp_path, monkeypatch):
    model, batches, file = made(residual), [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    whole, _ = measured(model, batches, None)
    monkeypatch.setattr(measurements.Measurements, "__exit__", lambda *_: None)  # nothing is tidied up
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(30))
    assert columns_measured(file) == 0
    monkeypatch.setattr(measurements, "PAUSE", -1.0)
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(30))
    assert columns_measured(file) == 1 + TOGETHER * ((30 - 1 - CHECKS) // TOGETHER)
    assert torch.equal(measured(model, batches, file)[0], whole)


def test_the_same_random_numbers_are_drawn_after_an_interruption(tmp_path):
    model = nn.Sequential(residual(), nn.Dropout(0.5)).double().train()
    batches, file = [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    whole, _ = measured(model, batches, None)
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(40))
    torch.manual_seed(99)
    assert torch.equal(measured(model, batches, file)[0], whole)
    assert whole.isfinite().all()


def test_more_or_fewer_minibatches_than_the_file_holds(tmp_path):
    model, batches, file = made(residual), [batch(seed) for seed in range(3)], tmp_path / "oracle.safetensors"
    whole, _ = measured(model, batches, None)
    assert torch.equal(measured(model, batches[:2], file)[0], whole[:2])
    before = file.read_bytes()
    assert torch.equal(measured(model, batches[:1], file)[0], whole[:1])
    assert file.read_bytes() == before
    assert torch.equal(measured(model, batches, file)[0], whole)
    generator = (pair for pair in batches)
    assert torch.equal(tk.oracle(model, batches[0][0], F.cross_entropy, generator, together=7, file=file), whole)


def test_a_loss_that_is_nan_is_measured_all_the_same(tmp_path):
    model, batches, file = made(residual), [batch(1)], tmp_path / "oracle.safetensors"
    calls = []

    def loss(output, target):
        calls.append(1)
        return F.cross_entropy(output, target) * (torch.nan if len(calls) == 4 else 1)

    first, _ = measured(model, batches, file, loss, together=1)
    assert first.isnan().nonzero().tolist() == [[0, 2]]
    second, runs = measured(model, batches, file, together=1)
    assert torch.equal(first.nan_to_num(7), second.nan_to_num(7))
    assert runs == 1


def test_files_of_something_else_are_refused_and_left_alone(tmp_path):
    model, batches, file = made(residual), [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(70))
    before = file.read_bytes()
    other = copy.deepcopy(model)
    other[1].running_mean[0] += 1e-9
    x, target = batches[1]
    changed = target.clone()
    changed[3] = 4 - changed[3]
    refused = [
        (made(plain), batches, {}, "another model"),
        (other, batches, {}, "other parameters or buffers"),
        (copy.deepcopy(model).train(), batches, {}, "another mode"),
        (model, batches, {"units": [1, 2]}, "other units (36 of them; this call asks for 2)"),
        (model, batches[::-1], {}, "minibatch 0 had other inputs or targets"),
        (model, [batches[0], (x, changed)], {}, "minibatch 1 had other inputs or targets"),
        (model, [batches[0], (x + 1e-12, target)], {}, "minibatch 1 had other inputs or targets"),
        (model, batches, {"loss": lambda f, t: F.multi_margin_loss(f, t)}, "another loss"),
        (model, batches, {"loss": lambda f, t: F.cross_entropy(f, t) * (1 + 1e-4)}, "another loss"),
    ]
    for wrong, pairs, options, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)) as told:
            measured(wrong, pairs, file, **options)
        assert str(file) in str(told.value)
        assert "name another file" in str(told.value)
        assert file.read_bytes() == before, message
    assert torch.equal(measured(model, batches, file)[0], measured(model, batches, None)[0])


def test_damaged_files_are_refused_and_left_alone(tmp_path):
    model, batches, good = made(residual), [batch(1)], tmp_path / "good.safetensors"
    measured(model, batches, good)
    content = good.read_bytes()
    size = int.from_bytes(content[:8], "little")
    losses, _ = json.loads(content[8 : 8 + size])["losses"]["data_offsets"]
    flipped, altered = bytearray(content), bytearray(content)
    flipped[8 + size + losses + 30] ^= 1
    altered[content.index(b"minibatches") + 20] ^= 1
    damaged = {
        "is damaged": [content[:-5], b"", b"not a safetensors file", bytes(flipped), bytes(altered)],
        "not an oracle's": [safetensors.torch.save({"losses": torch.zeros(1, 4)})],
    }
    file = tmp_path / "bad.safetensors"
    for message, contents in damaged.items():
        for bad in contents:
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=message):
                measured(model, batches, file)
            assert file.read_bytes() == bad


def test_a_file_that_can_not_be_written_fails_before_the_work(tmp_path):
    def never(output, target):
        raise AssertionError("measured before the file was tried")

    with pytest.raises(OSError):
        measured(made(residual), [batch(1)], tmp_path / "missing" / "oracle.safetensors", never)
    with pytest.raises(OSError):
        measured(made(residual), [batch(1)], tmp_path, never)


def test_a_writing_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model, batches, file = made(residual), [batch(1)], tmp_path / "oracle.safetensors"
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(20))
    before = file.read_bytes()

    def full(*_):
        raise OSError("no room left")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no room"):
        measured(model, batches, file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    measured(made(residual), [batch(1)], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert columns_measured(tmp_path / "target")


def test_one_bar_counts_all_minibatches_and_goes_on_too(tmp_path, capsys):
    model, batches, file = made(residual), [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    units = len(tk.couple(model, batches[0][0]).units)
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(2 * units), progress=True)
    capsys.readouterr()
    measured(model, batches, file, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    counts = [int(n) for n in re.findall(rf"(\d+)/{2 * units} ", err)]
    assert counts[0] >= units
    assert counts[-1] == 2 * units
    assert err.count("\n") == 1
    measured(model, batches, None)
    assert capsys.readouterr() == ("", "")


def test_a_copied_file_goes_on_elsewhere(tmp_path):
    model, batches, file = made(residual), [batch(1)], tmp_path / "oracle.safetensors"
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(30))
    shutil.copy(file, tmp_path / "copy.safetensors")
    assert torch.equal(measured(model, batches, tmp_path / "copy.safetensors")[0], measured(model, batches, None)[0])
