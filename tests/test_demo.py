import json

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern import cli
from taylorkern.demo import data, measure
from taylorkern.demo.network import DigitsNet


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert cli.main(["demo", "--quick", "--out", str(folder / "new" / "out")]) == 0
    return folder / "new" / "out"


@pytest.fixture(scope="module")
def summary(out):
    return json.loads((out / "summary.json").read_text())


def test_figures(summary):
    dense, pruned = summary["dense"], summary["pruned"]
    assert dense["accuracy"] > 0.96
    assert pruned["accuracy"] > dense["accuracy"] - 0.02
    assert pruned["flops"] <= summary["plan"]["target"] * dense["flops"]
    assert pruned["params"] < dense["params"]
    assert pruned["latency_ms"] > 0
    assert summary["ratios"]["flops"] == pruned["flops"] / dense["flops"]
    assert summary["accuracy_lost"] == dense["accuracy"] - pruned["accuracy"]


def test_history_goes_down_to_the_target(summary):
    channels = [point["channels"] for point in summary["history"]]
    assert channels == sorted(channels, reverse=True)
    assert len(channels) > 3
    assert summary["history"][0]["accuracy"] == summary["dense"]["accuracy"]
    assert summary["history"][-1]["flops_kept"] <= summary["plan"]["target"]


def test_saved_network_is_the_measured_one(out, summary):
    loaded = tk.load(out / "pruned.safetensors", DigitsNet()).eval()
    digits = data.digits()
    quality = measure.held_out(loaded, digits.test_images, digits.test_labels)
    assert quality["accuracy"] == summary["pruned"]["accuracy"]
    assert measure.size(loaded, digits.test_images[:1])["flops"] == summary["pruned"]["flops"]
    assert measure.widths(loaded) == summary["widths"]["pruned"]


@pytest.mark.parametrize("name", ["trajectory", "widths", "scores"])
def test_pictures(out, name):
    picture = (out / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_every_layer_has_scores(summary):
    assert set(summary["widths"]["dense"]) - {"stem.0"} <= {
        name.replace("bn", "conv").replace("shortcut.1", "shortcut.0") for name in summary["importance"]
    }


def test_split_is_fixed_and_held_out_images_are_not_trained_on():
    first, second = data.digits(), data.digits()
    assert torch.equal(first.test_labels, second.test_labels)
    assert len(first.test_labels) == 599
    assert len(first.train_labels) == 1198
    assert abs(float(first.train_images.mean())) < 1e-5


def test_shift_moves_each_image_by_at_most_one_pixel():
    images = torch.rand(50, 1, 8, 8) + 1
    moved = data.shifted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    for image, around in zip(moved, padded, strict=True):
        windows = [around[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
        assert any(torch.equal(image, window) for window in windows)
