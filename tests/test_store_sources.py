"""Models as they are when saved and loaded: converted, fused, scored, masked, compiled, wrapped, parametrised."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

import taylorkern as tk
from taylorkern.coupling import couple
from taylorkern.masking import mask
from taylorkern.surgery import cut
from tests.networks import residual
from tests.stored import assert_same_values, assert_untouched, build, header, refuses, snapshot

X = torch.rand(2, 2, 11, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(seed=0, width=6):
    torch.manual_seed(seed)
    return residual(width).double().eval()


@functools.cache
def cut_once(seed):
    model = network(seed)
    coupling = couple(model, X)
    cut(model, coupling, list(range(0, len(coupling.units), 3)), X)
    return model


def smaller(seed=1):
    """A network that has lost every third unit."""
    return copy.deepcopy(cut_once(seed))


def converted(model):
    return tk.convert(model)


def fused(model):
    return tk.convert(model, fuse=True)


def scored(model):
    scores = tk.Scores(tk.convert(model), X)
    model(X).sum().backward()
    assert scores.minibatches == 1
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def partly_compiled(model):
    model[3] = torch.compile(model[3], backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


SOURCES = [converted, fused, scored, compiled, partly_compiled, compiled_in_place, nn.DataParallel]
TARGETS = [source for source in SOURCES if source is not scored]


def plain_file(tmp_path):
    path = tmp_path / "plain"
    tk.save(smaller(), path)
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_the_file_is_the_plain_networks(tmp_path, source):
    right, model = smaller(), source(smaller())
    with torch.no_grad():
        model(X)  # what is compiled, or fused, has run
    tk.save(model, tmp_path / "other")
    assert header(tmp_path / "other") == header(plain_file(tmp_path))
    with torch.no_grad():
        assert torch.equal(tk.load(tmp_path / "other", network())(X), right(X))


@pytest.mark.parametrize("target", TARGETS)
def test_such_models_load_it(tmp_path, target):
    inner, right = network(), smaller()
    model = target(inner)
    with torch.no_grad():
        model(X)
        assert tk.load(plain_file(tmp_path), model) is model
        assert torch.allclose(model(X), right(X), rtol=1e-12, atol=1e-12)
    inner.eval()
    assert inner[0].out_channels == right[0].out_channels < 6


@pytest.mark.parametrize("target", TARGETS)
def test_refusals_leave_such_models_alone(tmp_path, target):
    tk.save(network(width=8), tmp_path / "wider")
    model = target(network())
    refuses(tmp_path / "wider", model, "has shape")
    tk.save(build(), tmp_path / "other")
    refuses(tmp_path / "other", model, "another network: the model lacks")


def test_nested_wrappers(tmp_path):
    model = nn.DataParallel(compiled(partly_compiled(smaller())))
    tk.save(model, tmp_path / "nested")
    assert header(tmp_path / "nested") == header(plain_file(tmp_path))


def test_zeros_of_a_mask_come_back(tmp_path):
    model = network(1)
    coupling = couple(model, X)
    mask(model, coupling, [0, 5], X)
    tk.save(model, tmp_path / "masked")
    loaded = tk.load(tmp_path / "masked", network())
    assert_same_values(loaded, model)
    assert torch.equal(loaded(X), model(X))
    assert not torch.equal(loaded(X), network(1)(X))
    assert loaded[0].out_channels == 6


def test_a_masked_model_keeps_its_shapes(tmp_path):
    model = network()
    mask(model, couple(model, X), [0, 5], X)
    refuses(plain_file(tmp_path), model, "units of the model are masked; build the model anew")


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def reduced(parallel, model):
    """Which of the model's gradients DistributedDataParallel reduces in a backward of ``parallel``."""
    seen = []

    def hook(state, bucket):
        seen.extend(bucket.parameters())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, hook)
    parallel(X).sum().backward()
    return {name for name, p in model.named_parameters() if any(p is other for other in seen)}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_data_parallel(tmp_path, one_process):
    inner = smaller(2)
    model = nn.parallel.DistributedDataParallel(inner)
    tk.save(model, tmp_path / "parallel")
    tk.save(smaller(2), tmp_path / "alone")
    assert header(tmp_path / "parallel") == header(tmp_path / "alone")
    tk.load(plain_file(tmp_path), model)
    assert torch.equal(model(X), smaller(1)(X))
    assert reduced(model, inner) == set(dict(inner.named_parameters()))
    refuses(plain_file(tmp_path), nn.parallel.DistributedDataParallel(network()), "wrap it afterwards")


def test_averages_are_named(tmp_path):
    averaged = AveragedModel(smaller())
    with pytest.raises(tk.StoreError, match=r"AveragedModel.*\.module"):
        tk.save(averaged, tmp_path / "averaged")
    before = snapshot(averaged)
    with pytest.raises(tk.StoreError, match=r"AveragedModel.*\.module"):
        tk.load(plain_file(tmp_path), averaged)
    assert_untouched(averaged, before)
    tk.save(averaged.module, tmp_path / "averaged")
    assert_same_values(tk.load(tmp_path / "averaged", network()), smaller())


def test_scripts_are_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(smaller(), X)
    with pytest.raises(tk.StoreError, match="runs code that is fixed"):
        tk.save(traced, tmp_path / "traced")
    assert list(tmp_path.iterdir()) == []


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def linear(width, make, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(make(nn.Linear(3, width)), nn.Linear(width, 2)).double()


def doubled(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize("make", [doubled, parametrizations.weight_norm])
def test_parametrised_weights_come_back(tmp_path, make):
    tk.save(linear(4, make, seed=1), tmp_path / "parametrised")
    x = torch.randn(5, 3, dtype=torch.float64)
    dense = tk.load(tmp_path / "parametrised", linear(6, make))
    assert torch.equal(dense(x), linear(4, make, seed=1)(x))
    assert (dense[0].out_features, dense[1].in_features) == (4, 4)
    refuses(tmp_path / "parametrised", linear(6, nn.Identity()), "another network: the model lacks 0.parametrizations")


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrisations_with_a_state(tmp_path, make):
    small = linear(3, make, seed=1).eval()
    tk.save(small, tmp_path / "parametrised")
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(tk.load(tmp_path / "parametrised", linear(3, make).eval())(x), small(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [weight_norm, spectral_norm])
def test_weights_that_hooks_make(tmp_path, make):
    small = linear(4, make, seed=1).eval()
    tk.save(small, tmp_path / "hooked")
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(tk.load(tmp_path / "hooked", linear(4, make).eval())(x), small(x))
    refuses(tmp_path / "hooked", linear(6, make), "0.*a hook makes from other parameters; use .*parametrizations")


def test_loading_in_inference_mode_gives_tensors_that_train(tmp_path):
    path, model = plain_file(tmp_path), network()
    with torch.inference_mode():
        tk.load(path, model)
    model(X).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


def test_default_devices_and_types_do_not_matter(tmp_path):
    path, before = plain_file(tmp_path), torch.get_default_dtype()
    model = network()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            tk.load(path, model)
            tk.save(model, tmp_path / "again")
    finally:
        torch.set_default_dtype(before)
    assert header(tmp_path / "again") == header(path)


def test_names_that_are_no_identifiers(tmp_path):
    model = nn.Module()
    for name in ("ünïcödé", "日本", "a b", '"quoted"', "back\\slash", "new\nline", "\U0001f600", "__metadata_"):
        model.register_parameter(name, nn.Parameter(torch.rand(3)))
        model.register_module(name + "!", nn.Linear(2, 2))
    tk.save(model, tmp_path / "names")
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.zero_()
    tk.load(tmp_path / "names", model)
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800"])
def test_names_that_no_file_can_hold(tmp_path, name):
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.rand(3)))
    with pytest.raises(tk.StoreError, match="no safetensors file can hold"):
        tk.save(model, tmp_path / "names")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.int8, torch.bool]
)
def test_buffers_of_any_type(tmp_path, dtype):
    model = nn.Module()
    model.register_buffer("held", torch.tensor([0.0, 1.0, 2.0]).to(dtype))
    model.register_buffer("none", torch.zeros(0, 3).to(dtype))
    model.register_buffer("one", torch.ones(()).to(dtype))
    tk.save(model, tmp_path / "held")
    wanted = model.held
    model.held = torch.zeros(3).to(dtype)
    tk.load(tmp_path / "held", model)
    assert model.held.dtype == dtype and torch.equal(model.held.view(torch.uint8), wanted.view(torch.uint8))


def test_types_that_no_file_holds(tmp_path):
    model = nn.Module()
    model.register_buffer("held", torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(tk.StoreError, match=r"held is torch\.complex128, which a safetensors file can't hold"):
        tk.save(model, tmp_path / "held")
