import hashlib

import numpy
from PIL import Image
from sklearn.datasets import load_digits

from tests import digits_folder

CLASSES = [str(digit) for digit in range(10)]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_a_fifth_of_every_class_is_held_out(tmp_path):
    assert digits_folder.write(tmp_path, 8, per_class=10) == 100
    for part, count in {"train": 8, "val": 2}.items():
        assert sorted(folder.name for folder in (tmp_path / part).iterdir()) == CLASSES
        assert {len(list(folder.iterdir())) for folder in (tmp_path / part).iterdir()} == {count}


def test_images_are_the_digits_and_none_is_there_twice(tmp_path):
    digits_folder.write(tmp_path, 8, per_class=10)
    digits = load_digits()
    for digit in range(10):
        drawn = (digits.images[digits.target == digit][:10] * (255 / 16)).round()
        files = sorted(tmp_path.glob(f"*/{digit}/*.png"), key=lambda path: path.name)
        for file, expected in zip(files, drawn, strict=True):
            numpy.testing.assert_array_equal(numpy.asarray(Image.open(file)), expected)
    assert len({hashlib.sha256(image).digest() for image in contents(tmp_path).values()}) == 100


def test_the_command_writes_the_same_bytes_again(tmp_path, capsys):
    for name in ("one", "two"):
        digits_folder.main([str(tmp_path / name), "--size", "20", "--per-class", "3"])
        assert capsys.readouterr().out == f"30 images are in {tmp_path / name}\n"
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert Image.open(tmp_path / "one" / "val" / "7" / "000.png").size == (20, 20)


def test_all_digits_are_written_by_default(tmp_path):
    assert digits_folder.write(tmp_path, 8) == 1797 == len(contents(tmp_path))
