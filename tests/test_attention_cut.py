"""Attention with heads cut off: it equals the whole one without these heads, and torch's fused kernels never see it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern.attention import understood
from taylorkern.emission import observed
from tests.cases import distance, normal
from tests.listener import Listener

N, L, H, D = 3, 5, 4, 3
E = H * D
KEPT = [0, 3]
FUSED = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
OPTIONS = {
    "packed": {},
    "without bias": {"bias": False},
    "separate": {"kdim": 7, "vdim": 5},
    "with added positions": {"add_bias_kv": True, "add_zero_attn": True},
}


def cut(layer, kept):
    """Leave the heads ``kept`` in ``layer``, as surgery does."""
    rows = torch.cat([torch.arange(h * D, (h + 1) * D) for h in kept])
    packed = torch.cat([rows + part * E for part in range(3)])
    taken = {"in_proj_weight": (0, packed), "in_proj_bias": (0, packed), "bias_k": (2, rows), "bias_v": (2, rows)}
    taken |= {f"{name}_proj_weight": (0, rows) for name in "qkv"} | {"out_proj.weight": (1, rows)}
    for name, parameter in layer.named_parameters():
        if name in taken:
            parameter.data = parameter.data.index_select(*taken[name])
    layer.num_heads = len(kept)
    return layer


def masked(layer, kept):
    """Let the output projection see nothing of the heads that are not ``kept``."""
    with torch.no_grad():
        for h in set(range(H)) - set(kept):
            layer.out_proj.weight[:, h * D : (h + 1) * D] = 0
    return layer


def attention(**options):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(E, H, dtype=torch.float64, batch_first=True, **options)
    for name, parameter in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return made.eval()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("kept", [KEPT, [1]])
@pytest.mark.parametrize("options", OPTIONS)
def test_cut_heads_are_heads_that_the_projection_does_not_see(options, kept, masking, need_weights):
    whole = attention(**OPTIONS[options])
    ours = cut(tk.convert(copy.deepcopy(whole)), kept)
    theirs = masked(whole, kept)
    x, y, z = (normal((N, L, size), seed, torch.float64) for seed, size in enumerate((E, ours.kdim, ours.vdim)))
    hidden = torch.rand(N, H, L, L, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden[..., 0] = False
    call = {"need_weights": need_weights, "average_attn_weights": False}
    at = {"attn_mask": hidden.flatten(0, 1)} if masking else {}
    at_ours = {"attn_mask": hidden[:, kept].flatten(0, 1)} if masking else {}
    expected, got = theirs(x, y, z, **call, **at), ours(x, y, z, **call, **at_ours)
    assert distance(got[0], expected[0]) < 1e-12
    assert not need_weights or distance(got[1], expected[1][:, kept]) < 1e-12


def test_a_mask_of_heads_that_are_gone_is_refused():
    ours, x = cut(tk.convert(attention()), KEPT), normal((N, L, E), 1, torch.float64)
    with pytest.raises(RuntimeError, match=r"3D attn_mask is \(12, 5, 5\), but should be \(6, 5, 5\).* has 2 heads"):
        ours(x, x, x, attn_mask=torch.zeros(N * H, L, L, dtype=torch.float64))


def test_heads_that_are_left_are_scored():
    ours, x = cut(tk.convert(attention()), KEPT), normal((N, L, E), 1, torch.float64)
    seen = []
    with observed(lambda layer, a, dim: seen.append(a.detach())):
        y = ours(x, x, x)[0]
    (dy,) = torch.autograd.grad(y.pow(3).sum(), y)
    listener = Listener(ours, [""])
    ours(x, x, x)[0].backward(dy)
    assert distance(listener.heard_of(), (seen[0] * (dy @ ours.out_proj.weight)).sum(1)) < 1e-12


def test_state_copies_and_pickles_of_a_cut_one():
    ours, x = cut(tk.convert(attention()), KEPT), normal((N, L, E), 1, torch.float64)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), cut(tk.convert(attention()), KEPT)):
        other.load_state_dict(ours.state_dict())
        assert other.is_cut and torch.equal(other(x, x, x)[0], ours(x, x, x)[0])


def encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 9, batch_first=True, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor="norm_first" not in options).eval()


@pytest.fixture
def fused(monkeypatch):
    """The names of torch's fused kernels as they are called."""
    called = []
    for name in FUSED:
        kernel = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, name=name, kernel=kernel: called.append(name) or kernel(*args))
    return called


@pytest.mark.parametrize("options", [{}, {"norm_first": True}])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_fused_kernel_runs_cut_attention(fused, mode, options):
    whole = encoder(**options)
    model = tk.convert(copy.deepcopy(whole))
    x = normal((N, L, E), 1, torch.float64)
    with mode():
        expected = whole(x)
        assert torch.equal(model(x), expected) and fused == [FUSED[0]] * 4  # converted, it is as fast as before
        attention = model.layers[1].self_attn
        cut(attention, KEPT)
        attention(x, x, x)
        got = model(x)
        assert fused == [FUSED[0]] * 5  # the other layer's
        masked(whole.layers[1].self_attn, KEPT)
        assert distance(got, whole(x)) < 1e-12


def test_padding_that_torch_leaves_out_by_nested_tensors_is_left_out_of_cut_attention():
    whole = encoder(3)
    model = tk.convert(copy.deepcopy(whole))
    cut(model.layers[1].self_attn, KEPT), masked(whole.layers[1].self_attn, KEPT)
    x, padding = normal((N, L, E), 1, torch.float64), torch.arange(L) >= torch.tensor([L, 2, 4])[:, None]
    with torch.no_grad():
        got, expected = (each(x, src_key_padding_mask=padding) for each in (model, whole))
    assert not got[padding].any()
    assert distance(got, expected) < 1e-12


def test_no_fused_kernel_runs_scored_attention(fused):
    model = tk.convert(encoder(1)).requires_grad_(False)
    x = normal((N, L, E), 1, torch.float64)
    plain = model(x)
    assert fused == [FUSED[0]]
    listener = Listener(model, ["layers.0.self_attn"])
    y = model(x)
    y.square().sum().backward()
    assert fused == [FUSED[0]] and distance(y, plain) < 1e-12
    assert listener.heard_of("layers.0.self_attn").shape == (N, E)
    with torch.no_grad():
        assert torch.equal(model(x), plain)  # no gate is wanted


def test_a_nested_tensor_at_a_gate_is_refused():
    model = tk.convert(encoder(1)).requires_grad_(False)
    listener = Listener(model, ["layers.0.self_attn", "layers.0.linear1"])
    with pytest.raises(ValueError, match="nested tensor reached the gate of a Linear"):
        model(normal((N, L, E), 1, torch.float64), src_key_padding_mask=torch.arange(L).expand(N, L) > 2)
    assert not listener.heard()


def test_masks_beside_a_nested_tensor_are_refused():
    ours = cut(tk.convert(attention()), KEPT)
    x = torch.nested.nested_tensor([normal((length, E), 1, torch.float64) for length in (2, 4)])
    with torch.no_grad(), pytest.raises(ValueError, match="without masks only"):
        ours(x, x, x, attn_mask=torch.zeros(4, 4))


def test_an_observer_hears_of_attention_that_torch_would_fuse(fused):
    model = tk.convert(encoder())
    seen = []
    with torch.no_grad(), observed(lambda layer, a, dim: seen.append(layer)):
        model(normal((N, L, E), 1, torch.float64))
    assert seen == [layer.self_attn for layer in model.layers] and not fused


def test_understood_attention_is_torchs_again_afterwards_unless_it_was_cut(fused):
    model = encoder()
    x = normal((N, L, E), 1, torch.float64)
    with understood(model):
        assert {type(layer.self_attn) for layer in model.layers} == {tk.MultiheadAttention}
        assert not torch.backends.mha.get_fastpath_enabled()
        with torch.no_grad():
            model(x)
        assert not fused
        cut(model.layers[1].self_attn, KEPT)
    assert torch.backends.mha.get_fastpath_enabled()
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert vars(model.layers[0].self_attn).keys() == vars(attention()).keys()
    assert type(model.layers[1].self_attn) is tk.MultiheadAttention
    with torch.no_grad():
        model(x)
    assert fused == [FUSED[0]]


def test_understood_leaves_nothing_behind_an_error_and_others_alone():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([nn.MultiheadAttention(4, 2), Own(4, 2), tk.MultiheadAttention(4, 2)])
    before = [type(layer) for layer in model]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.raises(KeyError), understood(model):
            assert type(model[1]) is Own
            raise KeyError
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [type(layer) for layer in model] == before


def test_reverting_leaves_cut_attention_as_it_is():
    model = tk.convert(nn.ModuleList([attention(), attention(), nn.Linear(E, 2)]))
    cut(model[0], KEPT)
    Listener(model, ["0", "1"])
    tk.revert(model)
    assert [type(layer) for layer in model] == [tk.MultiheadAttention, nn.MultiheadAttention, nn.Linear]
    assert model[0].gate is None and "gate" not in vars(model[1])
    with pytest.raises(ValueError, match="but attention that was cut"):
        tk.revert(model)
