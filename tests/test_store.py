import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import taylorkern as tk
from taylorkern import files, store
from tests.stored import assert_untouched, build, refuses, snapshot


class Tied(nn.Module):
    """Two names for one weight, a non-persistent buffer, an integer buffer."""

    def __init__(self, width=6):
        super().__init__()
        self.encoder = nn.Linear(width, width, bias=False)
        self.decoder = nn.Linear(width, width, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("scale", torch.ones(width), persistent=False)

    def forward(self, x):
        return self.decoder(self.encoder(x) * self.scale)


class Counting(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "pruned.safetensors"
    tk.save(build(5, seed=1), path)
    return path


def test_smaller_network_comes_back_bit_for_bit(tmp_path, saved):
    small, dense = build(5, seed=1).eval(), build(8).eval()
    identities = {name: id(parameter) for name, parameter in dense.named_parameters()}
    assert tk.load(saved, dense) is dense
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(dense(x), small(x))
    assert {name: id(parameter) for name, parameter in dense.named_parameters()} == identities
    assert (dense[0].out_channels, dense[1].num_features, dense[3].in_channels, dense[7].in_features) == (
        5,
        5,
        5,
        5,
    )


def test_depthwise_groups_follow(tmp_path):
    tk.save(build(5, groups=5), tmp_path / "depthwise")
    dense = tk.load(tmp_path / "depthwise", build(8, groups=8))
    assert dense[3].groups == 5
    assert dense(torch.randn(2, 3, 9, 9)).shape == (2, 4)


def test_converted_models_share_files_with_plain_ones(tmp_path):
    tk.save(tk.convert(build(5, seed=1)), tmp_path / "converted")
    dense = tk.load(tmp_path / "converted", tk.convert(build(8)))
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(dense.eval()(x), build(5, seed=1).eval()(x))


def test_loaded_network_trains_on(saved):
    dense = build(8)
    dense(torch.randn(2, 3, 9, 9)).sum().backward()
    tk.load(saved, dense)
    assert all(parameter.grad is None for parameter in dense.parameters())
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    before = dense[0].weight.detach().clone()
    dense(torch.randn(2, 3, 9, 9)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(dense[0].weight, before)


def test_channels_last_stays_the_models_own_layout(tmp_path):
    tk.save(build(5, seed=1).to(memory_format=torch.channels_last), tmp_path / "last")
    dense = tk.load(tmp_path / "last", build(8).to(memory_format=torch.channels_last))
    assert dense[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dense[3].weight, build(5, seed=1)[3].weight)
    assert tk.load(tmp_path / "last", build(8))[3].weight.is_contiguous()


def test_tied_weights_and_non_persistent_buffers(tmp_path):
    small = Tied(4)
    small.scale.fill_(2.0)
    tk.save(small, tmp_path / "tied")
    dense = tk.load(tmp_path / "tied", Tied(6))
    assert dense.decoder.weight is dense.encoder.weight
    assert torch.equal(dense.scale, torch.full((4,), 2.0))
    untied = Tied(6)
    untied.decoder.weight = nn.Parameter(torch.randn(6, 6))
    refuses(tmp_path / "tied", untied, "tie different weights.*decoder.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(tmp_path, dtype):
    tk.save(build(5, seed=1).to(dtype), tmp_path / "same")
    assert torch.equal(tk.load(tmp_path / "same", build(8).to(dtype))[3].weight, build(5, seed=1)[3].weight.to(dtype))
    if dtype == torch.float64:
        refuses(tmp_path / "same", build(8), "float64.*model.to")
    else:
        wide = tk.load(tmp_path / "same", build(8))[3].weight
        assert wide.dtype == torch.float32
        assert torch.equal(wide, build(5, seed=1)[3].weight.to(dtype).float())


def test_missing_file_and_folder(tmp_path):
    refuses(tmp_path / "nowhere.safetensors", build(), "can't read .*nowhere")
    refuses(tmp_path, build(), "can't read")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not this", b"\x80\x04\x95" + bytes(60), b"\xff" * 64])
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    refuses(tmp_path / "other", build(), "not a safetensors file")


def test_pickled_checkpoint_is_not_unpickled(tmp_path):
    torch.save(build(5).state_dict(), tmp_path / "pickle.pt")
    refuses(tmp_path / "pickle.pt", build(), "not a safetensors file")


def test_foreign_safetensors(tmp_path):
    save_file(build(8).state_dict(), tmp_path / "foreign")
    refuses(tmp_path / "foreign", build(), "no taylorkern plan")


def test_other_networks_are_named(tmp_path, saved):
    refuses(saved, nn.Sequential(nn.Conv2d(3, 8, 3)), "the model lacks .* and .* more")
    refuses(saved, nn.Sequential(*build(), nn.Linear(4, 2)), "the file lacks 8.bias, 8.weight")
    refuses(saved, build(4), r"0.weight has shape \[5, 3, 3, 3\], the model's has \[4, 3, 3, 3\]")


def test_meta_model_is_refused(saved):
    with torch.device("meta"):
        model = build()
    with pytest.raises(tk.StoreError, match=r"meta.*materialise"):
        tk.load(saved, model)


@pytest.mark.parametrize(("name", "index"), [("1.running_var", 0), ("3.weight", 2)])
def test_changes_no_cut_makes(tmp_path, name, index):
    model = build(5)
    layer = model.get_submodule(name.split(".")[0])
    tensor = getattr(layer, name.split(".")[1])
    tensor.data = tensor.data.narrow(index, 0, tensor.shape[index] - 1).clone()
    tk.save(model, tmp_path / "odd")
    refuses(tmp_path / "odd", build(8), "no cut leaves")


@pytest.mark.parametrize("at", [1, 4, 9])
def test_failure_while_swapping_puts_everything_back(saved, monkeypatch, at):
    assign, calls = store._assign, []

    def failing(*arguments):
        calls.append(arguments)
        assign(*arguments)
        if len(calls) == at:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(store, "_assign", failing)
    model = build()
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        tk.load(saved, model)
    assert_untouched(model, before)


def test_an_attribute_that_cannot_be_set_puts_everything_back(saved):
    class Stubborn(nn.Linear):
        def __setattr__(self, name, value):
            if name == "in_features" and "in_features" in vars(self) and not self.weight.is_meta:
                raise AttributeError("in_features is what it is")
            super().__setattr__(name, value)

    model = build()
    model[7] = Stubborn(8, 4)
    before = snapshot(model)
    with pytest.raises(AttributeError, match="what it is"):
        tk.load(saved, model)
    assert_untouched(model, before)


def test_extra_state_and_uninitialised_layers_are_refused(tmp_path):
    with pytest.raises(tk.StoreError, match="1 \\(Counting\\) keeps extra state"):
        tk.save(nn.Sequential(nn.Linear(2, 2), Counting(2, 2)), tmp_path / "extra")
    with pytest.raises(tk.StoreError, match="run or materialise"):
        tk.save(nn.LazyLinear(3), tmp_path / "lazy")
    assert os.listdir(tmp_path) == []


def test_old_file_survives_a_failed_save(saved, monkeypatch):
    old = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(tk.StoreError, match=r"No space left.*writable folder"):
        tk.save(build(3), saved)
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == [saved.name]


def test_unwritable_targets(tmp_path):
    with pytest.raises(tk.StoreError, match="can't write"):
        tk.save(build(), tmp_path / "no" / "such" / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(tk.StoreError, match="can't write"):
        tk.save(build(), tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_save_follows_links_and_loaded_tensors_outlive_the_file(tmp_path, saved):
    link = tmp_path / "link"
    link.symlink_to(saved)
    tk.save(build(4, seed=2), link)
    assert link.is_symlink()
    (tmp_path / "plain").touch()
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode
    dense = tk.load(link, build(8))
    shutil.copyfile(os.devnull, saved)
    assert torch.equal(dense[0].weight, build(4, seed=2)[0].weight)


def test_scored_model_is_not_reshaped_under_its_scores(saved):
    model = tk.convert(build(8))
    scores = tk.Scores(model, torch.randn(1, 3, 9, 9))
    refuses(saved, model, "is being scored.*detach")
    scores.detach()
    assert tk.load(saved, model)[0].out_channels == 5


def test_scored_model_takes_weights_of_its_own_shape(tmp_path):
    tk.save(build(8, seed=1), tmp_path / "best")
    model = tk.convert(build(8))
    scores = tk.Scores(model, torch.randn(1, 3, 9, 9))
    tk.load(tmp_path / "best", model)
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    assert scores.minibatches == 1
    assert torch.equal(model[0].weight, build(8, seed=1)[0].weight)
