"""Which backend serves: the provider table, and measurements that are kept in the package."""

import json

import pytest
import torch

from taylorkern import backends, ops
from taylorkern.backends import choice, cuda, reference
from tests.cases import in_layout


def row(operation, dtype, layout, log2_numel, backend):
    return {
        "operation": operation, "dtype": dtype, "layout": layout, "log2_numel": log2_numel, "backend": backend,
        "ratio_to_next": 0.9,
    }  # fmt: skip


ROWS = [
    row("channel_scores", "float32", "contiguous", 12, "triton_operations"),
    row("channel_scores", "float32", "contiguous", 20, "cuda"),
    row("channel_scores", "float32", "channels_last", 12, "cuda resident"),
    row("channel_scores", "bfloat16", "contiguous", 12, "reference"),
]


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "expected"),
    [
        ((2, 4, 8, 8), "contiguous", torch.float32, "triton_operations"),  # 2^9, nearest to 2^12
        ((1, 64, 32, 32), "contiguous", torch.float32, "triton_operations"),  # 2^16: as near to the one as to the other
        ((2, 64, 32, 32), "contiguous", torch.float32, "cuda"),  # 2^17
        ((2, 64, 32, 32), "channels_last", torch.float32, "cuda resident"),
        ((64, 64), "contiguous", torch.float32, "cuda resident"),  # without positions both layouts are the same memory
        ((2, 4, 8, 8), "contiguous", torch.bfloat16, "reference"),
        ((2, 4, 8, 8), "channels_last", torch.bfloat16, None),
        ((2, 4, 8, 8), "contiguous", torch.float16, None),
    ],
)
def test_the_nearest_measurement_of_that_kind_answers(shape, layout, dtype, expected):
    x = in_layout(torch.zeros(shape, dtype=dtype), layout)
    of = choice.Choice(ROWS)
    assert of.of("channel_scores", x) == expected
    assert of.of("channel_scores", x) == expected  # remembered
    assert of.of("batch_norm_act", x) is None


def test_a_backward_stays_with_its_forwards_kind_of_kernels():
    def serving(forward, backward):
        rows = [
            row(operation, "float32", "contiguous", 12, backend)
            for operation, backend in (("batch_norm_act", forward), ("batch_norm_act_backward", backward))
            if backend
        ]
        return choice.Choice(rows).fastest("batch_norm_act_backward", "float32", "contiguous", 12)

    assert serving("cuda", "cuda resident") == "cuda resident"
    assert serving("triton_operations", "cuda") == "triton_operations"
    assert serving("triton_operations", "triton_operations") == "triton_operations"
    assert serving("cuda", None) == "cuda" and serving(None, "cuda") is None


def test_a_gpu_has_its_own_rows_or_those_of_one_like_it(monkeypatch, tmp_path):
    devices = {
        name: {"capability": capability, "rows": [row("channel_scores", "float32", "contiguous", 12, name)]}
        for name, capability in (("first", [9, 0]), ("second", [9, 0]), ("third", [8, 6]))
    }
    monkeypatch.setattr(choice, "MEASURED", tmp_path / "measured.json")
    choice.MEASURED.write_text(json.dumps({"devices": devices}))
    there = [("second", (9, 0)), ("third", (8, 6)), ("another", (9, 0)), ("unknown", (7, 5))]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: there[device.index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: there[device.index][1])
    choice.on.cache_clear()
    try:
        found = [choice.on(torch.device("cuda", i)).of("channel_scores", torch.ones(2, 3, 4)) for i in range(4)]
    finally:
        choice.on.cache_clear()
    assert found == ["second", "third", "first", None]


def test_a_backward_is_served_by_what_its_x_is(monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "provider", lambda operation, t: asked.append(t) or reference)
    dy, x = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    one = torch.ones(3)
    ops.IMPLEMENTATIONS["batch_norm_act_backward"](dy, x, None, one, one, one, one, True, 0.1, "none", 0.0, False)
    ops.IMPLEMENTATIONS["channel_scores"](dy, x)
    assert asked[0] is x and asked[1] is dy


def test_the_kept_measurements_name_backends_operations_and_layouts_that_there_are():
    kept = json.loads(choice.MEASURED.read_text())
    names = {backends.name(backend) for backend in backends.PROVIDERS["cuda"]}
    for device in kept["devices"].values():
        assert len(device["capability"]) == 2
        for of in device["rows"]:
            assert of["backend"] in names and of["operation"] in backends.OPERATIONS and of["layout"] in choice.LAYOUTS
            assert isinstance(of["log2_numel"], int) and isinstance(getattr(torch, of["dtype"]), torch.dtype)


def test_the_fastest_goes_first_and_the_others_stand_behind_it_in_their_order():
    providers = backends.PROVIDERS["cuda"]
    assert backends._beginning_with(None, providers) == providers
    assert backends._beginning_with("nobody", providers) == providers
    first, *others = backends._beginning_with("reference", providers)
    assert first is reference and others == [backend for backend in providers if backend is not reference]


class Fast:
    """A backend of no device in particular."""

    __name__ = "somewhere.fast"

    def supports(self, operation, tensor):
        return tensor.dtype is torch.float32

    def channel_scores(self, a, g):
        return torch.full(a.shape[:2], 7.0)


def test_a_measured_backend_serves_what_it_can_and_the_table_the_rest(monkeypatch):
    """On "GPU" tensors that say they are: the table and the choice, without a device."""

    class Pretender(torch.Tensor):
        is_cuda = True

    fast = Fast()
    monkeypatch.setitem(backends.PROVIDERS, "cpu", (reference, fast))
    monkeypatch.setattr(
        choice, "on", lambda device: choice.Choice([row("channel_scores", "float32", "contiguous", 4, "fast")])
    )
    a = torch.ones(2, 3, 4).as_subclass(Pretender)
    assert backends.provider("channel_scores", a) is fast
    assert backends.provider("batch_norm_act", a) is reference
    assert backends.provider("channel_scores", torch.ones(2, 3, 4)) is reference
    wide = torch.ones(2, 3, 4, dtype=torch.float64).as_subclass(Pretender)
    assert backends.provider("channel_scores", wide) is reference


def test_the_table_ends_with_what_serves_everything():
    for providers in backends.PROVIDERS.values():
        assert providers[-1] is reference
    assert [backends.name(backend) for backend in backends.PROVIDERS["cuda"]] == [
        "cuda", "cuda resident", "triton_operations", "reference",
    ]  # fmt: skip
    assert not cuda.streamed.resident and cuda.resident.resident
    assert set(ops.IMPLEMENTATIONS) == set(backends.OPERATIONS)
