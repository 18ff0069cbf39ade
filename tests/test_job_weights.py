import argparse
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import taylorkern as tk
from taylorkern.errors import CommandError
from taylorkern.job import sources, weights_file
from tests import tiny_job


def test_weights_are_found_in_files_of_every_kind(tmp_path):
    state = {name: tensor + 1 for name, tensor in tiny_job.build(3).state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, tmp_path / "c.pth"
    )
    torch.save({"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}}, tmp_path / "d.pt")
    for path in sorted(tmp_path.iterdir()):
        model = tiny_job.build(3)
        weights_file.put(path, weights_file.read(path), model)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def wrapped(state, before):
    return {before + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "saved",
    [
        lambda state: {"state_dict": wrapped(state, "model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
        lambda state: wrapped(state, "_orig_mod.module."),
        lambda state: wrapped(state, "module._orig_mod.model."),
        lambda state: {"net": state, "acc": 91.2, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)},
        lambda state: {**state, "aux1.conv.conv.weight": torch.ones(2), "AuxLogits.fc.bias": torch.ones(2)},
    ],
)
def test_weights_are_found_as_trainers_wrap_them(saved, tmp_path):
    state = {name: tensor + 1 for name, tensor in tiny_job.build(3).state_dict().items()}
    torch.save(saved(state), tmp_path / "last.ckpt")
    model = tiny_job.build(3)
    weights_file.put(tmp_path / "last.ckpt", weights_file.read(tmp_path / "last.ckpt"), model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_part_that_was_compiled_alone_and_a_models_own_first_name_are_understood():
    for names, saved in (({"body"}, {"body": "body._orig_mod"}), ({"module"}, {}), ({"model"}, {})):
        model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
        state = {}
        for name, tensor in model.state_dict().items():
            first, _, rest = name.partition(".")
            state[f"{saved.get(first, first)}.{rest}"] = tensor + 1
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        weights_file.put("a file", state, model)
        assert all(torch.equal(tensor, before[name] + 1) for name, tensor in model.state_dict().items())


def test_of_several_networks_in_a_file_none_is_guessed(tmp_path):
    torch.save({"ema": {"w": torch.ones(1)}, "net": {"w": torch.ones(1)}}, tmp_path / "two.pt")
    with pytest.raises(CommandError, match=r"holds no state_dict \(it has 'ema', 'net'\)"):
        weights_file.read(tmp_path / "two.pt")


def test_objects_in_a_file_are_named_and_not_made(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}, "model": tiny_job.build(3)}, tmp_path / "whole.pt")
    with pytest.raises(CommandError, match=r"objects beside its tensors \(torch.nn.modules") as caught:
        weights_file.read(tmp_path / "whole.pt")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_pruned_network_is_recognised(tmp_path):
    model = tk.convert(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)))
    tk.prune(model, torch.ones(1, 2), torch.arange(6.0), target=0.5)
    tk.save(model, tmp_path / "pruned.safetensors")
    with pytest.raises(CommandError, match=r"pruned network of taylorkern's: tk\.load"):
        weights_file.read(tmp_path / "pruned.safetensors")


def test_what_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    for name in ("text.pt", "cut.safetensors", "other.pt", "code.pt", "missing.pt"):
        with pytest.raises(CommandError, match=name):
            weights_file.read(tmp_path / name)


def test_another_networks_weights_are_refused_by_name_and_nothing_changes(tmp_path):
    model = tiny_job.build(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for other, told in (
        (tiny_job.build(5), r"8.weight is \[5, 32\] there and \[3, 32\] here"),
        (nn.Linear(2, 2), "lacks 0.weight"),
    ):
        with pytest.raises(CommandError, match=told):
            weights_file.put(tmp_path / "w.pt", other.state_dict(), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_networks_come_from_torchvision_timm_and_files_for_any_number_of_classes():
    pytest.importorskip("torchvision")
    named = ["torchvision:resnet18", f"{tiny_job.FILE}:build"]
    for name in named:
        model = sources.network(name, 7, seed=1).eval()
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 7)
        again = sources.network(name, 7, seed=1).state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


def test_unknown_networks_are_named():
    pytest.importorskip("torchvision")
    with pytest.raises(CommandError, match=r"'resnet19'; it has .*resnet18"):
        sources.network("torchvision:resnet19", 2, 0)
    with pytest.raises(CommandError, match="gave a tuple"):
        sources.network(f"{tiny_job.FILE}:batches", 2, 0)


def test_a_torchvision_whose_library_does_not_load_is_imported_all_the_same():
    pytest.importorskip("torchvision")
    program = (
        "import torch; from taylorkern.job.sources import network;"
        "print(list(network('torchvision:squeezenet1_1', 4, 0)(torch.rand(1, 3, 64, 64)).shape))"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("[1, 4]\n", "")
