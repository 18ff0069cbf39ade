"""tk.MultiheadAttention computes what torch's does, with every option; and its heads' gates get their gradients."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taylorkern as tk
from taylorkern.emission import observed
from tests.cases import distance, normal
from tests.listener import Listener

N, L, S, H, D = 3, 4, 5, 2, 3
E = H * D


def attention(seed=0, kind=tk.MultiheadAttention, dtype=torch.float64, heads=H, **options):
    """One with biases that are not zero, as initialisation leaves them."""
    torch.manual_seed(seed)
    made = kind(heads * D, heads, dtype=dtype, **options)
    for name, parameter in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return made


def sequences(layer, batched, selfish, dtype=torch.float64):
    """Query, key and value as ``layer`` takes them, with gradients; one tensor thrice for self-attention."""
    sizes = [(L, layer.embed_dim)] if selfish else [(L, layer.embed_dim), (S, layer.kdim), (S, layer.vdim)]
    made = [normal((N, *size) if batched else size, seed, dtype) for seed, size in enumerate(sizes)]
    if batched and not layer.batch_first:
        made = [t.transpose(0, 1).contiguous() for t in made]
    made = [t.requires_grad_() for t in made]
    return made * 3 if selfish else made


def masks(kind, padding, batched, heads, keys, dtype=torch.float64):
    """attn_mask and key_padding_mask, none of which hides every key."""
    generator = torch.Generator().manual_seed(7)
    shape = {"2d": (L, keys), "3d": (N * heads if batched else heads, L, keys)}.get(kind.split()[0])
    hidden = None if shape is None else torch.rand(shape, generator=generator) < 0.4
    padded = torch.rand((N, keys) if batched else (keys,), generator=generator) < 0.4 if padding else None
    for mask in (m for m in (hidden, padded) if m is not None):
        mask[..., 0] = False
    if "float" in kind:
        hidden, padded = (None if m is None else m.to(dtype) * -1.5 for m in (hidden, padded))
    return {"attn_mask": hidden, "key_padding_mask": padded}


def computed(layer, inputs, **call):
    """Outputs of a run and the gradients of all that went in, with the random state as it was."""
    torch.manual_seed(11)
    output, weights = layer(*inputs, **call)
    loss = output.square().sum() if weights is None else output.square().sum() + weights.pow(3).sum()
    leaves = list({id(t): t for t in (*inputs, *layer.parameters())}.values())
    return [output, *([] if weights is None else [weights]), *torch.autograd.grad(loss, leaves, allow_unused=True)]


def assert_same(got, expected, tolerance=1e-12):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.shape == other.shape and distance(one, other) < tolerance)


CAUSAL = torch.zeros(L, S, dtype=torch.float64).masked_fill_(torch.ones(L, S).triu(1).bool(), -torch.inf)
MASKS = ("none", "none float", "2d bool", "2d float", "3d bool", "3d float", "causal float")


@st.composite
def options(draw):
    flags = st.booleans()
    separate, selfish = draw(st.sampled_from([(False, True), (False, False), (True, False)]))
    made = {name: draw(flags) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    made |= {"dropout": draw(st.sampled_from([0.0, 0.4]))} | ({"kdim": 7, "vdim": 5} if separate else {})
    batched, padding, training = (draw(flags) for _ in range(3))
    kind, keys = draw(st.sampled_from(MASKS)), L if selfish else S
    call = {name: draw(flags) for name in ("need_weights", "average_attn_weights")}
    call |= masks(kind, padding, batched, H, keys)
    if "causal" in kind:
        call |= {"attn_mask": CAUSAL[:, :keys], "is_causal": True}
    return made, selfish, batched, training, call


@settings(max_examples=150, deadline=None, derandomize=True)
@given(options())
def test_its_own_code_computes_what_torchs_does_with_every_option(drawn):
    made, selfish, batched, training, call = drawn
    theirs = attention(kind=nn.MultiheadAttention, **made).train(training)
    ours = tk.convert(copy.deepcopy(theirs))
    expected = computed(theirs, sequences(theirs, batched, selfish), **call)
    for one, other in zip(computed(ours, sequences(ours, batched, selfish), **call), expected, strict=True):
        assert one is other is None or torch.equal(one, other)
    seen = []
    with observed(lambda layer, a, dim: seen.append((layer, a.shape, dim))):
        assert_same(computed(ours, sequences(ours, batched, selfish), **call), expected)
    assert seen == [(ours, (N if batched else 1, L, E), 2)]


def by_hand(layer, q, k, v, z):
    """Attention [N, L, E] of batches [N, L or S, E], head by head, its channels multiplied by z [N, H·D]."""
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = (t @ w.t() + b for t, w, b in zip((q, k, v), weights, biases, strict=True))
    heads = []
    for h in range(layer.num_heads):
        own = slice(h * D, (h + 1) * D)
        scores = q[..., own] @ k[..., own].mT / D**0.5
        heads.append(scores.softmax(-1) @ v[..., own])
    return (torch.cat(heads, -1) * z[:, None]) @ layer.out_proj.weight.t() + layer.out_proj.bias


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_s_is_the_gradient_of_a_gate_on_the_heads_before_they_are_projected(dtype, batch_first, need_weights):
    layer = attention(dtype=dtype, batch_first=batch_first)
    x, y = normal((N, L, E), 1, dtype), normal((N, S, E), 2, dtype)
    z = torch.ones(N, E, dtype=torch.float64, requires_grad=True)
    out = by_hand(copy.deepcopy(layer).double(), x.double(), y.double(), y.double(), z)
    (want,) = torch.autograd.grad(out.pow(3).sum(), z)
    listener = Listener(layer, [""])
    given_ = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    layer(given_[0], given_[1], given_[1], need_weights=need_weights)[0].pow(3).sum().backward()
    assert distance(listener.heard_of(), want) < (1e-12 if dtype is torch.float64 else 1e-5)


def test_an_input_without_a_batch_is_a_batch_of_one():
    layer, x = attention(), normal((L, E), 1, torch.float64)
    listener = Listener(layer, [""])
    layer(x, x, x)[0].pow(3).sum().backward()
    alone = listener.heard_of()
    layer(x[:, None], x[:, None], x[:, None])[0].pow(3).sum().backward()
    assert alone.shape == (1, E) and distance(alone, listener.heard_of()) < 1e-12


def test_the_output_projections_gate_is_taken_too():
    layer, x = attention(batch_first=True), normal((N, L, E), 1, torch.float64)
    listener = Listener(layer, ["out_proj"])
    y = layer(x, x, x)[0]
    y.pow(3).sum().backward()
    assert distance(listener.heard_of("out_proj"), 3 * y.pow(3).sum(1)) < 1e-12
    assert layer.gate is None


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["none", "2d bool", "3d bool"])
def test_autocast_is_no_worse_than_twice_torchs(kind, need_weights):
    theirs = attention(kind=nn.MultiheadAttention, dtype=torch.float32, batch_first=True)
    x, call = normal((N, L, E), 1), masks(kind, True, True, H, L) | {"need_weights": need_weights}
    exact = copy.deepcopy(theirs).double()(*[x.double()] * 3, **call)[0]
    ours = tk.convert(copy.deepcopy(theirs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = theirs(x, x, x, **call)[0]
        listener = Listener(ours, [""])
        got = ours(x, x, x, **call)[0]
    got.sum().backward()
    assert got.dtype is expected.dtype and listener.heard_of().dtype is torch.float32
    assert distance(got, exact) <= 2 * distance(expected, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_narrow_weights_are_no_worse_than_twice_torchs(dtype, need_weights):
    theirs = attention(kind=nn.MultiheadAttention, dtype=dtype, batch_first=True)
    x = normal((N, L, E), 1, dtype)
    exact = copy.deepcopy(theirs).double()(*[x.double()] * 3)[0]
    with observed(lambda layer, a, dim: None):
        got = tk.convert(copy.deepcopy(theirs))(x, x, x, need_weights=need_weights)[0]
    expected = theirs(x, x, x, need_weights=need_weights)[0]
    assert got.dtype is dtype and distance(got, exact) <= 2 * distance(expected, exact)


def test_what_an_observer_returns_takes_the_place_of_the_heads():
    layer, x = attention(batch_first=True), normal((N, L, E), 1, torch.float64)
    z = torch.arange(E, dtype=torch.float64)
    with observed(lambda layer, a, dim: a * z), observed(lambda layer, a, dim: a + 1 if dim == 2 else a):
        got = layer(x, x, x)[0]
    plain = by_hand(layer, x, x, x, z.expand(N, E)) + layer.out_proj.weight.sum(1)
    assert distance(got, plain) < 1e-12


def test_nobody_observes_behind_an_error():
    layer, x = attention(), normal((L, E), 1, torch.float64)

    def failing(layer, a, dim):
        raise LookupError("no such layer")

    with pytest.raises(LookupError), observed(failing):
        layer(x, x, x)
    assert layer(x, x, x)[0].shape == (L, E)


def test_it_is_torchs_to_the_eye_and_copies_carry_no_gate():
    theirs = attention(kind=nn.MultiheadAttention, add_bias_kv=True, kdim=7, vdim=5)
    ours = attention(seed=1, add_bias_kv=True, kdim=7, vdim=5)
    assert repr(theirs) == repr(ours) and list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    listener = Listener(ours)
    inputs = sequences(ours, True, False)
    expected = computed(theirs, inputs)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is tk.MultiheadAttention and copied.gate is None
        assert_same(computed(copied, inputs), expected, 1e-300)
    assert not listener.heard()
    assert_same(computed(ours, inputs), expected)


def test_compiled_it_scores_as_it_does_in_eager():
    layer, x = attention(batch_first=True, dtype=torch.float32), normal((N, L, E), 1)
    plain = layer(x, x, x)[0]
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x, x, x)[0], plain)
    seen = []
    with observed(lambda layer, a, dim: seen.append(dim)):
        torch.compile(layer, backend="eager")(x, x, x)
    assert seen == [2]
    listener = Listener(layer, [""])
    found = []
    for run in (layer, torch.compile(layer, backend="eager")):
        run(x, x, x)[0].pow(3).sum().backward()
        found.append(listener.heard_of())
    assert distance(*found) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"attn_mask": torch.zeros(L, L + 1)}, "2D attn_mask is .* should be"),
        ({"attn_mask": torch.zeros(N * H + 1, L, L)}, f"3D attn_mask is .* this attention has {H} heads"),
        ({"key_padding_mask": torch.zeros(N, L + 1)}, "key_padding_mask has shape"),
        ({"is_causal": True}, "Need attn_mask"),
    ],
)
def test_masks_that_do_not_fit_are_refused(call, message):
    layer, x = attention(batch_first=True), normal((N, L, E), 1, torch.float64)
    with observed(lambda layer, a, dim: None), pytest.raises(RuntimeError, match=message):
        layer(x, x, x, **call)
