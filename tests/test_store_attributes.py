"""The counts of heads, groups and channels that a file carries: set with the tensors, or refused before them."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taylorkern as tk
from taylorkern import plan as plans
from taylorkern import store
from taylorkern.widths import KNOWN, widths
from tests.stored import as_format_1, assert_untouched, header, refuses, rewrite, sign, snapshot


class Attention(nn.Module):
    """Self-attention as timm writes it: heads and their widths are attributes, and a config is shared."""

    def __init__(self, dim=12, heads=4, head_dim=3):
        super().__init__()
        self.config = SimpleNamespace(num_heads=heads, head_dim=head_dim)
        self.num_heads, self.head_dim, self.all_head_size = heads, head_dim, heads * head_dim
        self.qkv, self.proj = nn.Linear(dim, 3 * heads * head_dim), nn.Linear(heads * head_dim, dim)
        self.causal, self.width_of_window, self.scale = True, 7, head_dim**-0.5

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        y = F.scaled_dot_product_attention(*(t.transpose(-3, -2) for t in (q, k, v)))
        return self.proj(y.transpose(-3, -2).reshape(*x.shape[:-1], self.all_head_size))


def attention(heads=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), Attention(heads=heads), nn.Linear(12, 2)).double()


def normalised(width=12, groups=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.GroupNorm(groups, width), nn.Conv2d(width, 2, 1)).double()


@pytest.fixture
def heads(tmp_path):
    path = tmp_path / "two heads"
    tk.save(attention(2, seed=1), path)
    return path


def told(path):
    return json.loads(header(path)[0]["__metadata__"][plans.PLAN])["attributes"]


def test_only_known_counts_of_modules_are_written(heads):
    assert told(heads)["1"] == {"num_heads": 2, "head_dim": 3, "all_head_size": 6}
    assert told(heads)["0"] == {"in_features": 5, "out_features": 12}
    assert set().union(*told(heads).values()) <= KNOWN


def test_counts_are_plain_integers_of_the_instance():
    module = nn.Module()
    module.num_heads, module.groups, module.dim, module.width, module.heads = True, 2.0, 0, -1, torch.tensor(3)
    module.head_dim, module.unknown = 5, 6
    assert widths(module) == {"head_dim": 5}
    type(module).nf = 7
    try:
        assert widths(module) == {"head_dim": 5}
    finally:
        del type(module).nf
    assert widths(nn.Softmax(dim=1)) == {}


def test_fewer_heads_come_back(heads):
    small, dense = attention(2, seed=1), attention(4)
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    assert torch.equal(tk.load(heads, dense)(x), small(x))
    assert (dense[1].num_heads, dense[1].head_dim, dense[1].all_head_size) == (2, 3, 6)
    assert (dense[1].causal, dense[1].width_of_window) == (True, 7)
    assert dense[1].config == SimpleNamespace(num_heads=4, head_dim=3)


def test_fewer_groups_come_back(tmp_path):
    tk.save(normalised(6, 2, seed=1), tmp_path / "groups")
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    dense = tk.load(tmp_path / "groups", normalised())
    assert torch.equal(dense(x), normalised(6, 2, seed=1)(x))
    assert (dense[1].num_groups, dense[1].num_channels) == (2, 6)


@pytest.mark.parametrize(("module", "count"), [("1", "num_heads"), ("1", "all_head_size"), ("1.qkv", "out_features")])
def test_no_count_of_a_module_that_changes_may_be_left_out(heads, module, count):
    rewrite(heads, lambda plan: plan["attributes"][module].pop(count))
    refuses(heads, attention(4), f"changes the shape of {module} and does not tell its {count}")
    rewrite(heads, lambda plan: plan["attributes"].clear())
    refuses(heads, attention(4), "does not tell its")


def test_counts_of_what_stays_may_be_left_out(heads):
    rewrite(heads, lambda plan: plan["attributes"].pop("0"))
    assert tk.load(heads, attention(4))[0].out_features == 12


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        ("1", {"num_heads": 5}),
        ("1", {"num_heads": 2**70}),
        ("1", {"num_heads": 2, "groups": 1}),
        ("1", {"causal": 1}),
        ("1", {"width_of_window": 3}),
        ("1", {"training": 1}),
        ("1", {"forward": 1}),
        ("1", {"__class__": 1}),
        ("1", {"num_heads": 0}),
        ("1", {"num_heads": -2}),
        ("1", {"num_heads": 2.0}),
        ("1", {"num_heads": True}),
        ("1", {"num_heads": "2"}),
        ("1", {"num_heads": None}),
        ("1", {"num_heads": [2]}),
        ("1", []),
        ("1", None),
        ("1.qkv.weight", {"num_heads": 2}),
        ("3", {"num_heads": 1}),
        ("", {"num_heads": 1}),
        ("2", {"out_features": 1}),
        ("1.qkv", {"out_features": 17}),
        ("1.qkv", {"in_features": 11}),
    ],
)
def test_counts_that_do_not_fit_are_refused(heads, module, counts):
    rewrite(heads, lambda plan: plan["attributes"].update({module: counts}))
    refuses(heads, attention(4), "plan of another form|holds another network|contradicts the weights")


@pytest.mark.parametrize("attributes", [None, [], 1, "1", [["1", {"num_heads": 2}]]])
def test_attributes_of_another_form(heads, attributes):
    rewrite(heads, lambda plan: plan.update(attributes=attributes))
    refuses(heads, attention(4), "plan of another form")


def test_a_count_that_stands_twice(heads):
    text = header(heads)[0]["__metadata__"][plans.PLAN]
    sign(heads, text.replace('"num_heads": 2', '"num_heads": 4, "num_heads": 2'))
    refuses(heads, attention(4), "plan of another form.*twice")


@pytest.mark.parametrize("value", ["NaN", "1e2", "9" * 5000])
def test_counts_that_are_no_numbers(heads, value):
    text = header(heads)[0]["__metadata__"][plans.PLAN]
    sign(heads, text.replace('"num_heads": 2', f'"num_heads": {value}'))
    refuses(heads, attention(4), "plan of another form")


def test_a_model_that_counts_otherwise(heads):
    model = attention(4)
    model[1].num_heads = torch.tensor(4)
    with pytest.raises(tk.StoreError, match="no such count"):
        tk.load(heads, model)
    refuses(heads, attention(1), "1.qkv.weight has shape")


def test_two_names_of_one_module_count_alike(tmp_path):
    shared = Attention()
    model = nn.ModuleList([shared, shared])
    tk.save(model, tmp_path / "shared")
    assert tk.load(tmp_path / "shared", model)[1].num_heads == 4
    rewrite(tmp_path / "shared", lambda plan: plan["attributes"]["0"].update(num_heads=2))
    refuses(tmp_path / "shared", model, "contradicts")


def test_groups_that_do_not_divide(tmp_path):
    tk.save(normalised(6, 2, seed=1), tmp_path / "groups")
    rewrite(tmp_path / "groups", lambda plan: plan["attributes"]["1"].update(num_groups=4))
    refuses(tmp_path / "groups", normalised(), "no cut leaves 1 .GroupNorm")


@pytest.mark.parametrize(
    ("kept", "out"),
    [
        (slice(0, 5), 5),  # two groups of four channels: five are one group and a bit
        (slice(0, 3), 3),
    ],
)
def test_parts_of_a_group_are_refused(tmp_path, kept, out):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    model[0].weight.data, model[0].bias.data = model[0].weight.data[kept].clone(), model[0].bias.data[kept].clone()
    model[0].out_channels = out
    tk.save(model, tmp_path / "odd")
    refuses(tmp_path / "odd", nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), "no cut leaves 0|can follow|contradicts")


@pytest.mark.parametrize("make", [lambda width: nn.Linear(3, width), lambda width: nn.Conv1d(3, width, 1)])
def test_a_bias_of_another_length(tmp_path, make):
    layer, dense = make(2), make(4)
    layer.bias.data = torch.zeros(1)
    tk.save(layer, tmp_path / "odd")
    refuses(tmp_path / "odd", dense, "no cut leaves")


def test_recurrent_layers_lose_inputs_only(tmp_path):
    x = torch.randn(2, 5, 3)
    fewer, inside = nn.LSTM(3, 6, 2), nn.LSTM(6, 4, 2)
    tk.save(fewer, tmp_path / "fewer")
    dense = tk.load(tmp_path / "fewer", nn.LSTM(6, 6, 2))
    assert torch.equal(dense(x)[0], fewer(x)[0]) and dense.input_size == 3
    tk.save(inside, tmp_path / "inside")
    refuses(tmp_path / "inside", nn.LSTM(6, 6, 2), "no cut leaves")


def multihead(**options):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(12, 4, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **options)


def behead(layer, kept=(0, 2)):
    """``layer`` with these heads only, by hand."""
    attention, rows = layer.self_attn, torch.arange(12).view(4, 3)[list(kept)].flatten()
    attention.in_proj_weight.data = attention.in_proj_weight.data.view(3, 12, 12)[:, rows].flatten(0, 1)
    attention.in_proj_bias.data = attention.in_proj_bias.data.view(3, 12)[:, rows].flatten()
    attention.out_proj.weight.data = attention.out_proj.weight.data[:, rows].contiguous()
    attention.out_proj.in_features = len(rows)
    attention.num_heads = len(kept)
    attention.__class__ = tk.MultiheadAttention
    return layer


@pytest.mark.parametrize("converted", [False, True])
def test_attention_with_heads_gone_gets_the_class_that_runs_it(tmp_path, converted):
    small = behead(multihead()).eval()
    tk.save(small, tmp_path / "heads")
    dense = tk.convert(multihead()) if converted else multihead()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(tk.load(tmp_path / "heads", dense).eval()(x), small(x), rtol=1e-12, atol=1e-12)
    assert type(dense.self_attn) is tk.MultiheadAttention
    assert (dense.self_attn.num_heads, dense.self_attn.head_dim, dense.self_attn.embed_dim) == (2, 3, 12)


def test_attention_that_keeps_its_heads_keeps_its_class(tmp_path):
    tk.save(tk.convert(multihead()), tmp_path / "all")
    assert type(tk.load(tmp_path / "all", multihead()).self_attn) is nn.MultiheadAttention


def test_attention_of_a_class_of_its_own_is_refused(tmp_path):
    class Own(nn.MultiheadAttention):
        pass

    tk.save(behead(multihead()), tmp_path / "heads")
    dense = multihead()
    dense.self_attn.__class__ = Own
    refuses(tmp_path / "heads", dense, "self_attn 2 heads of 3 in a width of 12, which a Own can't run")


@pytest.mark.parametrize("counts", [{"num_heads": 3}, {"head_dim": 2}, {"num_heads": 1, "head_dim": 3}])
def test_heads_that_contradict_the_weights(tmp_path, counts):
    tk.save(behead(multihead()), tmp_path / "heads")
    rewrite(tmp_path / "heads", lambda plan: plan["attributes"]["self_attn"].update(counts))
    refuses(tmp_path / "heads", multihead(), "no cut leaves self_attn")


def test_heads_without_attributes_are_refused(tmp_path):
    tk.save(behead(multihead()), tmp_path / "heads")
    as_format_1(tmp_path / "heads")
    refuses(tmp_path / "heads", multihead(), "no cut leaves self_attn")


def test_a_class_that_cannot_be_changed_puts_everything_back(tmp_path, monkeypatch):
    tk.save(behead(multihead()), tmp_path / "heads")
    dense, assign = multihead(), store._assign
    before = snapshot(dense)
    seen = []

    def failing(tensor, data, *grad):
        seen.append(type(dense.self_attn))
        if len(seen) == 3:
            raise MemoryError("no room")
        assign(tensor, data, *grad)

    monkeypatch.setattr(store, "_assign", failing)
    with pytest.raises(MemoryError):
        tk.load(tmp_path / "heads", dense)
    assert seen[0] is tk.MultiheadAttention
    assert_untouched(dense, before)
