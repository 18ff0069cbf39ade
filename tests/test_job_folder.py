import shutil

import pytest

from taylorkern.errors import CommandError
from taylorkern.job import folder


def plant(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return root


def test_classes_are_sorted_and_other_files_ignored(tmp_path):
    plant(tmp_path, "train/b/2.png", "train/b/1.JPG", "train/a/x.jpeg", "val/a/y.png", "validation/c/z.png")
    plant(
        tmp_path, "train/a/.hidden.png", "train/a/notes.txt", "train/.cache/1.png", "train/b/deep/3.png", "val/b/4.bmp"
    )
    found = folder.look(tmp_path, 0.2)
    assert found.classes == ("a", "b")
    assert found.train == (("train/a/x.jpeg", 0), ("train/b/1.JPG", 1), ("train/b/2.png", 1), ("train/b/deep/3.png", 1))
    assert found.val == (("val/a/y.png", 0), ("val/b/4.bmp", 1))
    assert found.warnings == ()


def test_of_plain_classes_the_same_share_of_each_is_held_out_every_time(tmp_path):
    plant(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(10)), "c/0.png", "c/1.png")
    found = folder.look(tmp_path, 0.3)
    assert found == folder.look(tmp_path, 0.3)
    assert [sum(label == number for _, label in found.val) for number in range(3)] == [3, 3, 1]
    assert len(found.train) == 22 - 7 and not set(found.train) & set(found.val)


def test_the_digest_tells_that_files_came_or_went(tmp_path):
    plant(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    before = folder.look(tmp_path, 0.5).digest
    assert folder.look(tmp_path, 0.5).digest == before
    assert folder.look(plant(tmp_path, "b/3.png"), 0.5).digest != before


@pytest.mark.parametrize(
    ("files", "gone", "told"),
    [
        ([], "train", "no such folder"),
        (["notes.txt"], None, "has no image"),
        (["train/a/1.png"], None, "no val/"),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], None, "class c is in validation"),
        (["train/a/1.png", "train/b/1.txt", "val/a/1.png"], None, "no image of class b"),
        (["train/a/1.png", "val/a/1.png"], None, "one class alone"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.txt"], None, "no held-out image"),
    ],
)
def test_what_can_not_be_learned_from_is_refused(files, gone, told, tmp_path):
    plant(tmp_path, *files)
    if gone:
        shutil.rmtree(tmp_path)
    with pytest.raises(CommandError, match=told):
        folder.look(tmp_path, 0.2)


def test_a_class_without_held_out_images_is_a_warning(tmp_path):
    plant(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png")
    assert "held out of b" in folder.look(tmp_path, 0.2).warnings[0]
