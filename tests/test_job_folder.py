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
        (["Training/a/1.png", "Training/b/1.png"], None, "Training/ but no val/"),
        (
            [f"{part}/{name}/1.png" for part in ("one", "two") for name in "ab"],
            None,
            "one, two hold no images but a, b",
        ),
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


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "training"])
@pytest.mark.parametrize("val", ["val", "Valid", "VALIDATION", "test", "Testing"])
def test_parts_are_known_by_any_of_their_names(train, val, tmp_path):
    plant(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{val}/a/2.png", f"{val}/b/2.png")
    found = folder.look(tmp_path, 0.2)
    assert found.classes == ("a", "b")
    assert found.train == ((f"{train}/a/1.png", 0), (f"{train}/b/1.png", 1))
    assert found.val == ((f"{val}/a/2.png", 0), (f"{val}/b/2.png", 1))


def test_classes_may_keep_their_images_in_a_folder_of_the_same_name(tmp_path):
    plant(tmp_path, *(f"{name}/images/{number}.png" for name in "ab" for number in range(4)))
    assert folder.look(tmp_path, 0.5).classes == ("a", "b")


def test_links_to_folders_are_followed_once(tmp_path):
    plant(tmp_path / "elsewhere", "deep/7.png")
    data = plant(tmp_path / "data", "train/a/1.png", "train/b/1.jfif", "val/a/1.png", "val/b/1.png")
    for name, target in {"b/more": tmp_path / "elsewhere", "b/same": tmp_path / "elsewhere", "b/up": data}.items():
        (data / "train" / name).symlink_to(target)
    (data / "train/b/round").symlink_to(data / "train/b")
    assert [file for file, label in folder.look(data, 0.2).train if label] == [
        "train/b/1.jfif",
        "train/b/more/deep/7.png",
    ]


def test_images_that_are_left_out_are_told_of(tmp_path):
    plant(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    plant(tmp_path, "train/loose.png", "train/a/odd.HEIC", "val/b/deep/odd.jp2", "train/.hidden.png", "train/notes.txt")
    loose, odd = folder.look(tmp_path, 0.2).warnings
    assert loose.startswith("1 images") and "train/loose.png" in loose
    assert odd.startswith("2 files that end in .heic .jp2") and "train/a/odd.HEIC" in odd and "deep/odd.jp2" in odd
    plain = plant(tmp_path / "plain", "1.png", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    assert ["lie in no class" in warning for warning in folder.look(plain, 0.5).warnings] == [True]
