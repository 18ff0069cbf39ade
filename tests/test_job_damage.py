"""``taylorkern prune`` on damaged data, in folders that can't be written, and on a disk that is full at each moment."""

import json
import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from taylorkern import cli
from tests import digits_folder, jobs
from tests.full_disk import Disk, at, writing

AMID = 7  # the checkpoint before this one lies between two rounds of pruning


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """The command makes the folder of a FILE.py importable."""
    monkeypatch.setattr(sys, "path", sys.path[:])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digits_folder.write(folder, 8, per_class=10)
    return folder


@pytest.fixture
def data(digits, tmp_path):
    """A copy to damage."""
    return shutil.copytree(digits, tmp_path / "data")


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert cli.main(jobs.arguments(digits, out)) == 0
    return out


@pytest.fixture
def prune(capsys):
    """Runs the command here; gives its exit code and what it said on stderr."""

    def run(data, out):
        code = cli.main(jobs.arguments(data, out))
        return code, capsys.readouterr().err

    return run


def refusal(told):
    """The error of a run that trained nothing."""
    code, err = told
    assert code == 1 and "step/s" not in err
    lines = [line for line in err.splitlines() if line.startswith("taylorkern: error: ")]
    assert len(lines) == 1
    return lines[0]


def spoil(data):
    """Files that are no images, in both parts; their names below ``data``."""
    whole = (data / "train" / "3" / "003.png").read_bytes()
    contents = {
        "train/3/003.png": whole[: len(whole) // 2],
        "train/4/004.png": b"",
        "train/5/note.png": b"this is text",
        "train/6/006.png": bytes([whole[0] ^ 255]) + whole[1:],
        "val/7/000.png": whole[:40],
    }
    for name, content in contents.items():
        (data / name).write_bytes(content)
    return set(contents)


def stop():
    raise KeyboardInterrupt


def test_unreadable_images_are_named_once_and_left_out(data, tmp_path, prune):
    spoiled, out = spoil(data), tmp_path / "out"
    code, err = prune(data, out)
    assert code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {skip["file"] for skip in summary["images"]["skipped"]} == spoiled
    assert all(skip["why"] for skip in summary["images"]["skipped"])
    report = (out / "report.html").read_text()
    for file in spoiled:
        assert err.count(file) == 1 and file in report


def test_skips_and_bits_are_the_same_after_an_interruption(data, tmp_path, prune):
    spoiled, whole, broken = spoil(data), tmp_path / "whole", tmp_path / "broken"
    assert prune(data, whole)[0] == 0
    with writing(at("checkpoints", AMID, stop)):
        code, err = prune(data, broken)
    assert code == 130 and "the same command goes on" in err
    assert prune(data, broken)[0] == 0
    assert jobs.differences(whole, broken) == []
    assert {skip["file"] for skip in json.loads((broken / "summary.json").read_text())["images"]["skipped"]} == spoiled


def test_what_only_looks_like_an_image_or_unlike_one_stops_nothing(digits, data, tmp_path, prune):
    (data / "train" / "1" / "x.png").mkdir()
    (data / "train" / "2" / "notes.txt").write_text("no image")
    (data / "train" / "2" / ".DS_Store").write_bytes(b"\0")
    image = data / "train" / "8" / "004.png"
    Image.open(image).convert("RGBA").save(image)
    image.rename(image.with_suffix(".JPG"))
    code, _ = prune(data, tmp_path / "out")
    assert code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"] == {"train": 80, "val": 20, "skipped": []}


def test_a_folder_without_a_readable_image_is_an_error(data, tmp_path, prune):
    for image in data.glob("train/*/*.png"):
        image.write_bytes(b"")
    code, err = prune(data, tmp_path / "out")
    assert code == 1
    assert re.search(r"^taylorkern: error: .*(image|read)", err, re.MULTILINE)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_an_empty_class_is_named(data, tmp_path, prune):
    (data / "train" / "zebra").mkdir()
    assert "zebra" in refusal(prune(data, tmp_path / "out"))


def test_a_class_that_only_validation_has_is_named(data, tmp_path, prune):
    (data / "val" / "3").rename(data / "val" / "zebra")
    assert "zebra" in refusal(prune(data, tmp_path / "out"))


def test_a_class_that_validation_lacks_is_warned_of(data, tmp_path, prune):
    (data / "val" / "3").rename(data / "3")
    code, err = prune(data, tmp_path / "out")
    assert code == 0
    assert re.search(r"warning: .*\b3\b", err)


def test_a_class_whose_held_out_images_are_all_damaged_is_warned_of(data, tmp_path, prune):
    for image in (data / "val" / "3").iterdir():
        image.write_bytes(b"")
    code, err = prune(data, tmp_path / "out")
    assert code == 0
    told = "no held-out image of 3 can be read"
    assert err.count(f"warning: {told}") == 1
    assert [told in warning for warning in json.loads((tmp_path / "out/summary.json").read_text())["warnings"]] == [
        True
    ]


def test_folders_without_images_are_refused(data, tmp_path, prune):
    (tmp_path / "empty").mkdir()
    shutil.rmtree(data / "train")
    (data / "train" / "3").mkdir(parents=True)
    for folder in (tmp_path / "empty", tmp_path / "nowhere", data):
        assert str(folder) in refusal(prune(folder, tmp_path / "out"))


def test_a_place_that_cannot_be_written_is_refused_before_the_training(digits, tmp_path, prune):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/taylorkern")):
        assert str(out) in refusal(prune(digits, out))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_truncated_checkpoint_is_told_of_and_the_one_before_taken(digits, undisturbed, tmp_path, prune):
    out = tmp_path / "out"
    with writing(at("checkpoints", AMID + 1, stop)):
        assert prune(digits, out)[0] == 130
    before, newest = sorted(map(step, out.rglob("pruned/step-*.pt")))
    file = out / "checkpoints" / "pruned" / f"step-{newest}.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=file.name):
        code, err = prune(digits, out)
    assert code == 0 and f"at step {before}" in err
    assert jobs.differences(undisturbed, out) == []


def step(checkpoint):
    return int(checkpoint.stem.partition("-")[2])


@pytest.fixture
def disk(tmp_path):
    with ExitStack() as stack:
        disk = Disk(tmp_path / "disk")
        stack.callback(disk.remove)
        stack.enter_context(writing(disk.refuse))
        yield disk


def test_a_read_only_file_system_is_refused_before_the_training(digits, disk, prune):
    if not disk.protect():
        pytest.skip("mounting is not permitted here")
    assert str(disk.folder / "out") in refusal(prune(digits, disk.folder / "out"))


MOMENTS = [("settings.json", 1), ("checkpoints", 1), ("checkpoints", 9), ("pruned.safetensors", 1), ("report.html", 1),
           ("summary.json", 1)]  # fmt: skip


@pytest.mark.parametrize(("name", "number"), MOMENTS)
def test_a_full_disk_costs_nothing_but_the_way_from_the_last_checkpoint(name, number, digits, undisturbed, disk, prune):
    out = disk.folder / "out"
    with writing(at(name, number, disk.fill)):
        code, err = prune(digits, out)
    assert code == 1
    assert re.search(r"^taylorkern: error: .*No space left on device", err, re.MULTILINE)
    assert str(out) in err
    newest = max(map(step, out.rglob("step-*.pt")), default=0)
    disk.free()
    code, err = prune(digits, out)
    assert code == 0
    assert newest == int((re.findall(r"at step (\d+)", err) or [0])[0])
    assert (newest > 0) == ((name, number) not in MOMENTS[:2])
    assert jobs.differences(undisturbed, out) == []
    assert not list(out.rglob("*.partial"))


def test_a_disk_that_is_full_for_a_while_costs_a_few_checkpoints(digits, undisturbed, disk, prune):
    out = disk.folder / "out"
    with writing(at("checkpoints", 4, disk.fill)), writing(at("checkpoints", 6, disk.free)):
        code, err = prune(digits, out)
    assert code == 0
    assert err.count("no checkpoint at step") == 1 and "No space left on device" in err
    assert jobs.differences(undisturbed, out) == []
