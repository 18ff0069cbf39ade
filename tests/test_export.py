"""Cut networks outside of Python: torch.export, ONNX and TorchScript compute what the network computes."""

import copy
import functools
import logging
import warnings

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern.coupling import couple
from taylorkern.surgery import cut
from tests.networks import randomised, residual

X = torch.rand(3, 2, 12, 10, generator=torch.Generator().manual_seed(0))


class Convolutional(nn.Module):
    """Residual blocks, a depthwise and a grouped convolution, two activations that fuse, a classifier."""

    def __init__(self):
        super().__init__()
        self.body = residual(8)[:5]
        self.depthwise, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.norm2 = nn.Conv2d(16, 24, 3, groups=4), nn.BatchNorm2d(24)
        self.act, self.head = nn.SiLU(), nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.depthwise(self.body(x))))
        return self.head(self.act(self.norm2(self.grouped(x))).mean((2, 3)))


class Transformer(nn.Module):
    """Patches, two pre-norm encoder layers, a classifier."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, 12, 2, 2)
        self.layers = nn.ModuleList([self.layer(), self.layer()])
        self.head = nn.Linear(12, 5)

    @staticmethod
    def layer():
        return nn.TransformerEncoderLayer(12, 4, 24, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def plain(model):
    return model


def converted(model):
    return tk.convert(model)


def fused(model):
    return tk.convert(model, fuse=True)


def scored(model):
    tk.Scores(tk.convert(model), X)
    return model


@functools.cache
def cut_once(kind):
    torch.manual_seed(1)
    model = randomised(kind()).eval()
    coupling = couple(model, X)
    gone = list(range(0, len(coupling.units), 3))
    before = sum(p.numel() for p in model.parameters())
    cut(model, coupling, gone, X)
    assert gone and sum(p.numel() for p in model.parameters()) < before
    return model


CASES = [
    *((Convolutional, make) for make in (plain, converted, fused, scored)),
    *((Transformer, make) for make in (plain, converted, scored)),
]


@pytest.fixture(params=CASES, ids=lambda case: " ".join(part.__name__.lower() for part in case))
def network(request):
    kind, make = request.param
    return make(copy.deepcopy(cut_once(kind)))


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(params=[False, True], ids=["without gradients", "recording gradients"])
def recording(request):
    """Fused and gated layers take other ways where gradients are recorded."""
    with torch.set_grad_enabled(request.param):
        yield


def batches():
    """X and a batch of another size."""
    return X, X[:2]


def dynamic():
    return ({0: torch.export.Dim("samples", min=2, max=64)},)


def agrees(found, expected, tolerance):
    assert found.shape == expected.shape
    assert torch.allclose(found, expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exported_program(network, strict, recording):
    network.double()
    program = torch.export.export(network, (X.double(),), dynamic_shapes=dynamic(), strict=strict)
    module = program.module()
    for x in batches():
        agrees(module(x.double()), network(x.double()), 1e-12)


def test_exported_program_of_one_size(network):
    program = torch.export.export(network, (X,))
    agrees(program.module()(X), network(X), 1e-6)


def sessions(model, path, **options):
    """ONNX Runtime's output for every batch, of the model written to ``path``."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.onnx.export(model, (X,), path, input_names=["x"], verbose=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(None, {"x": x.numpy()})[0]) for x in batches()]


def test_onnx(network, tmp_path, recording):
    found = sessions(network, tmp_path / "cut.onnx", dynamo=True, dynamic_shapes=dynamic())
    for output, x in zip(found, batches(), strict=True):
        agrees(output, network(x), 1e-5)


def test_onnx_by_torchscript(network, tmp_path):
    found = sessions(network, tmp_path / "cut.onnx", dynamo=False, dynamic_axes={"x": {0: "samples"}})
    for output, x in zip(found, batches(), strict=True):
        agrees(output, network(x), 1e-5)


def test_trace(network):
    traced = torch.jit.trace(network, X)
    for x in batches():
        agrees(traced(x), network(x), 1e-6)
