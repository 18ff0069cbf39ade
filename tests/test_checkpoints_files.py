"""A checkpoint's file is whole or left out, and what goes wrong with a new one leaves the older ones alone."""

import io
import os
import random
import resource

import numpy as np
import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern import files, sealed
from tests.checkpointed import Linear


def test_the_newest_are_kept_and_numbers_are_no_text(tmp_path):
    Linear(tmp_path, keep=2).saved(8, 9, 10)
    assert sorted(os.listdir(tmp_path)) == ["step-10.pt", "step-9.pt"]
    assert Linear(tmp_path).checkpoints.load() == {"step": 10}
    Linear(tmp_path, keep=1).saved(11)
    assert os.listdir(tmp_path) == ["step-11.pt"]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "a bit is another": (flipped, "its checksum is another"),
    "the end is another": (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "its checksum is another"),
    "the end is missing": (lambda content: content[:-7], "its end is missing"),
    "half is missing": (lambda content: content[: len(content) // 2], "its end is missing"),
    "it is empty": (lambda content: b"", "only 0 bytes are left"),
    "something is added": (lambda content: content + b"x", "its end is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_left_out_for_an_older_one(tmp_path, damage):
    change, told = DAMAGES[damage]
    Linear(tmp_path).saved(3, 6)
    path = tmp_path / "step-6.pt"
    path.write_bytes(change(path.read_bytes()))
    run = Linear(tmp_path)
    with pytest.warns(UserWarning, match=rf"step-6\.pt is damaged and left out: {told}") as warned:
        assert run.checkpoints.load() == {"step": 3}
    assert warned[0].filename == __file__
    assert (run.model.weight == 3).all()
    run.checkpoints.save(5)
    assert sorted(os.listdir(tmp_path)) == ["step-3.pt", "step-5.pt"]


def test_no_whole_file_is_an_error_and_nothing_changes(tmp_path):
    Linear(tmp_path).saved(3, 6)
    for path in tmp_path.iterdir():
        path.write_bytes(flipped(path.read_bytes()))
    run = Linear(tmp_path, 0.5)
    with pytest.warns(UserWarning), pytest.raises(tk.StoreError, match="files of the steps 3, 6, none of them whole"):
        run.checkpoints.load()
    assert (run.model.weight == 0.5).all()
    with pytest.raises(ValueError, match="not loaded and would be lost"):
        run.checkpoints.save(1)
    assert sorted(os.listdir(tmp_path)) == ["step-3.pt", "step-6.pt"]


def test_what_was_not_loaded_is_not_overwritten(tmp_path):
    Linear(tmp_path).saved(900)
    with pytest.raises(ValueError, match="holds the checkpoint of step 900, which was not loaded"):
        Linear(tmp_path).checkpoints.save(1)
    with pytest.raises(ValueError, match="same parts"):
        (other := tk.Checkpoints(tmp_path, network=nn.Linear(3, 2))).load()
    with pytest.raises(ValueError, match="which was not loaded"):
        other.save(901)
    assert os.listdir(tmp_path) == ["step-900.pt"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    run = Linear(tmp_path).saved(3, 6)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1000, len(before["step-6.pt"]) - 5):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(OSError, match=r"folder with room.*step-9\.pt"):
                run.checkpoints.save(9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run.checkpoints.save(9)
    assert sorted(os.listdir(tmp_path)) == ["step-6.pt", "step-9.pt"]


def test_room_that_is_back_at_once_does_not_hide_why_a_writing_failed():
    class FullOnce(io.BytesIO):
        def write(self, piece):
            if len(piece) > 4000:
                raise OSError(28, "No space left on device")
            return super().write(piece)

    with pytest.raises(OSError, match="No space left"):
        sealed._save({"tensor": torch.ones(4000)}, sealed._Hashing(FullOnce()))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, monkeypatch, call):
    def refused(*_):
        raise OSError(5, "Input/output error")

    run = Linear(tmp_path).saved(3, 6)
    monkeypatch.setattr(files.os, call, refused)
    with pytest.raises(OSError, match=r"Input/output error.*step-9\.pt") as caught:
        run.checkpoints.save(9)
    assert caught.value.filename == str(tmp_path / "step-9.pt") and caught.value.errno == 5
    assert sorted(os.listdir(tmp_path)) == ["step-3.pt", "step-6.pt"]


def test_a_file_in_the_folder_s_place_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Linear(tmp_path / "file").checkpoints.save(1)


def test_what_killed_writers_left_goes(tmp_path):
    left, others = f".step-4.pt.{'0' * 32}.partial", [f".step-4.rank1-of-2.pt.{'0' * 32}.partial", ".mine.partial"]
    for act in (lambda: Linear(tmp_path).checkpoints.load(), lambda: Linear(tmp_path).checkpoints.save(1)):
        for name in (left, *others):
            (tmp_path / name).write_bytes(b"half")
        act()
        assert sorted(set(os.listdir(tmp_path)) - {"step-1.pt"}) == sorted(others)


@pytest.mark.parametrize("value", [np.float64(1.5), np.zeros(2), random.Random(0)])
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    run = Linear(tmp_path).saved(3)
    with pytest.raises(ValueError, match=r"extra\['value'\] holds .*would refuse to read"):
        run.checkpoints.save(6, fine=1, value=value)
    assert os.listdir(tmp_path) == ["step-3.pt"]


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    torch.save({"format": 1, "parts": Evil()}, tmp_path / "plain")
    content = (tmp_path / "plain").read_bytes()
    (tmp_path / "step-1.pt").write_bytes(content + sealed.SEAL + sealed.hashlib.sha256(content).digest())
    with pytest.raises(tk.StoreError, match="without running code"):
        Linear(tmp_path).checkpoints.load()
    assert not (tmp_path / "was run").exists()


def test_torch_reads_a_checkpoint_by_itself(tmp_path):
    Linear(tmp_path).saved(3)
    assert (torch.load(tmp_path / "step-3.pt", weights_only=True)["parts"]["model"]["weight"] == 3).all()
