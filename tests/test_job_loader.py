from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from taylorkern.job import images
from taylorkern.job.loader import ImageFiles, Order, Skip, loader


def picture(path, value=200, size=(6, 4), mode="L"):
    Image.new(mode, size, value).save(path)
    return path


@pytest.mark.parametrize(
    "mode, value", [("L", 200), ("RGB", (200, 200, 200)), ("P", 0), ("RGBA", (200,) * 4), ("1", 1)]
)
def test_images_of_every_kind_are_read_in_colour_and_square(mode, value, tmp_path):
    image = images.read(picture(tmp_path / "a.png", value, mode=mode), 5)
    assert image.shape == (3, 5, 5) and image.dtype == torch.uint8


@pytest.mark.parametrize("kind, ending", [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_sixteen_bits_of_grey_keep_their_shades(kind, ending, tmp_path):
    shades = np.array([[0, 257 * 50], [257 * 128, 65535]], dtype=kind)
    Image.fromarray(shades).save(tmp_path / f"a.{ending}")
    assert images.read(tmp_path / f"a.{ending}", 2)[0].tolist() == [[0, 50], [128, 255]]


def test_few_numbers_of_32_bits_are_bytes(tmp_path):
    Image.fromarray(np.array([[0, 50], [128, 255]], dtype=np.int32)).save(tmp_path / "a.tif")
    assert images.read(tmp_path / "a.tif", 2)[1].tolist() == [[0, 50], [128, 255]]


@pytest.mark.parametrize(
    "numbers", [np.ones((2, 2), np.float32), np.full((2, 2), -1, np.int32), np.full((2, 2), 70000, np.int32)]
)
def test_images_without_a_known_white_are_unreadable(numbers, tmp_path):
    Image.fromarray(numbers).save(tmp_path / "a.tif")
    with pytest.raises(images.UnreadableError, match="white is not known"):
        images.read(tmp_path / "a.tif", 2)


def test_images_are_turned_upright(tmp_path):
    sideways = Image.fromarray(np.array([[0, 50], [100, 255]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the left
    sideways.save(tmp_path / "a.png", exif=exif)
    assert images.read(tmp_path / "a.png", 2)[0].tolist() == [[100, 0], [255, 50]]
    sideways.save(tmp_path / "b.png", exif=b"Exif\0\0no such thing")
    assert images.read(tmp_path / "b.png", 2)[0].tolist() == [[0, 50], [100, 255]]


def test_files_that_hold_no_whole_image_say_so(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-900])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name in ("cut.png", "empty.png", "text.png", "folder.png", "missing.png"):
        with pytest.raises(images.UnreadableError, match=r"\w"):
            images.read(tmp_path / name, 8)


def test_an_unreadable_file_makes_its_minibatch_smaller_and_is_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    files = ImageFiles(tmp_path, [("a.png", 3), ("b.png", 4)], 4)
    [(batch, labels, skipped)] = loader(files, [[(0, 0), (0, 1)]], 0)
    assert batch.shape == (1, 3, 4, 4) and labels.tolist() == [3]
    assert [skip.file for skip in skipped] == ["b.png"]
    assert files.collate([Skip("b.png", "why")]).images.shape == (0, 3, 4, 4)


def test_order_begun_anywhere_is_the_rest_of_the_whole():
    whole = list(islice(Order(10, 3, seed=5, start=0), 9))
    assert list(islice(Order(10, 3, seed=5, start=4), 5)) == whole[4:]
    epochs = [[index for batch in whole[at : at + 3] for _, index in batch] for at in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert list(islice(Order(10, 3, seed=6, start=0), 9)) != whole


def test_random_changes_depend_on_seed_epoch_and_image_alone(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    files = ImageFiles(tmp_path, [("a.png", 0)], 16, augment=1)
    shown = [files[epoch, 0][0] for epoch in range(6)]
    torch.manual_seed(7)
    assert all(torch.equal(files[epoch, 0][0], image) for epoch, image in enumerate(shown))
    assert len({image.numpy().tobytes() for image in shown}) > 3


def test_loading_draws_none_of_the_global_random_numbers(tmp_path):
    picture(tmp_path / "a.png")
    before = torch.get_rng_state()
    list(loader(ImageFiles(tmp_path, [("a.png", 0)], 4), [[(0, 0)]], 1))
    assert torch.equal(torch.get_rng_state(), before)
