import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

import taylorkern as tk

ROOT = Path(__file__).resolve().parent.parent
TRACKED = ("LICENSE", "MANIFEST.in", "README.md", "csrc", "pyproject.toml", "setup.py", "taylorkern")


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_resnet50_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = python_blocks()[0]
    for large, small in (("224, 224", "64, 64"), ("every=30", "every=1"), ("step=100", "step=3000")):
        assert large in code
        code = code.replace(large, small)
    # Eight images of 64 pixels: the last stage normalises over 32 values a channel; over 2 it would diverge.
    batch = (torch.randn(8, 3, 64, 64), torch.arange(8))
    names = {"loader": [batch] * 4}
    exec(code, names)
    assert names["pruner"].done
    assert names["pruner"].kept <= 0.5
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(names["pruned"].eval()(x), names["model"].eval()(x))


def test_readme_loop_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in python_blocks() if "GradScaler" in block)
    for large, small in (("every=30", "every=2"), ("step=100", "step=3")):
        assert large in code
        code = code.replace(large, small)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    data = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(24)]
    names = {
        "model": model, "example": data[0][0][:1], "device": "cpu", "half": True, "tk": tk, "torch": torch,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01), "batches": lambda start: data[start:],
    }  # fmt: skip
    exec(code, names)
    assert names["pruner"].kept < 1 and model[0].out_channels < 8
    assert (tmp_path / "checkpoints").is_dir()


def test_readme_scores_run():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 5),
    )  # fmt: skip
    names = {"network": network, "images": torch.randn(4, 3, 8, 8), "labels": torch.arange(4), "tk": tk, "torch": torch}
    exec(python_blocks()[1], names)
    assert names["importance"].shape == (len(names["scores"].units) + len(names["removed"]),)
    assert network[0].out_channels + network[3].out_channels < 16


def test_readme_sets_run():
    network = tk.convert(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, 5),
        )
    )  # fmt: skip
    names = {"network": network, "images": torch.randn(4, 3, 8, 8), "labels": torch.arange(4), "tk": tk, "torch": torch}
    exec(next(block for block in python_blocks() if "surgeon" in block), names)
    assert names["removed"] and network[0].out_channels + network[3].out_channels < 16
    assert names["scores"].minibatches == 0  # the gates have moved


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy without torch in sight."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in TRACKED:
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder)], check=True)
    blocked = "import sys; sys.modules['torch'] = None; import setuptools.build_meta as b; print(b.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", blocked], cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(folder / built.stdout.splitlines()[-1]) as archive:
        yield archive


def test_wheel_ships_every_source_and_nothing_built(wheel):
    shipped = {name.removeprefix("taylorkern/csrc/") for name in wheel.namelist() if "/csrc/" in name}
    sources = {str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert shipped == sources
    assert not [name for name in wheel.namelist() if name.endswith((".so", ".pyc"))]
    assert "taylorkern/py.typed" in wheel.namelist()


def test_wheel_metadata(wheel):
    metadata = wheel.read(f"taylorkern-{tk.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {tk.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    entry = wheel.read(f"taylorkern-{tk.__version__}.dist-info/entry_points.txt").decode()
    assert "taylorkern = taylorkern.cli:main" in entry


def test_constraints_fit_the_requirements():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["bench"], *extras["test"], *extras["lint"], *extras["demo"]]:
        required = Requirement(line)
        assert required.name == "taylorkern" or pins[required.name] in required.specifier, line


def test_version_is_readable_without_torch():
    code = "import runpy; print(runpy.run_path('taylorkern/_version.py')['__version__'])"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == tk.__version__
