"""Gates on subclasses of torch's layers, by hooks that come and go with them, and what Attachment keeps of others."""

import copy
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern.attachment import attached
from taylorkern.emission import gate_of
from taylorkern.layers import channel_dim, gateable, scorable, width
from tests.cases import distance, normal
from tests.listener import Listener


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class GroupNormAct(nn.GroupNorm):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Either(nn.LayerNorm):
    def __init__(self, width, data_format):
        super().__init__(width)
        self.data_format = data_format

    def forward(self, x):
        second = self.data_format == "channels_first"
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if second else super().forward(x)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


class Wide(nn.Linear):
    def forward(self, x, times=1):
        return times * super().forward(x)


class Conv1D(nn.Module):
    """transformers' layer of this name, to which its module is looked up without an import."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", SimpleNamespace(Conv1D=Conv1D))


X = normal((3, 5, 5, 5), 1, torch.float64)
SUBCLASSES = {
    "convolution": (lambda: Doubled(5, 7, 3), X, 1),
    "convolution without a batch": (lambda: Doubled(5, 7, 3), X[0], 0),
    "batch normalisation": (lambda: NormAct(5), X, 1),
    "group normalisation": (lambda: GroupNormAct(1, 5), X, 1),
    "layer normalisation of images": (lambda: LayerNorm2d(5), X, 1),
    "channels first": (lambda: Either(5, "channels_first"), X, 1),
    "channels last": (lambda: Either(5, "channels_last"), X, 3),
    "embedding": (lambda: Scaled(9, 4), torch.tensor([[1, 8, 3], [2, 2, 0]]), 2),
    "linear": (lambda: Wide(5, 3), X, 3),
    "Conv1D": (lambda: Conv1D(7, 5), X, 3),
}
over_subclasses = pytest.mark.parametrize("name", SUBCLASSES)


def build(name):
    torch.manual_seed(0)
    make, x, dim = SUBCLASSES[name]
    layer = make().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, x, dim


@over_subclasses
def test_s_is_the_gradient_of_an_explicit_gate(name):
    layer, x, dim = build(name)
    y = layer(x)
    assert gateable(layer) and scorable(layer)
    assert channel_dim(layer, y) == dim and width(layer) == y.shape[dim]
    samples = 1 if "without" in name else len(y)
    shape = [n if d == dim or (d == 0 and samples > 1) else 1 for d, n in enumerate(y.shape)]
    z = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad((y * z).pow(3).sum(), z)
    kind, before, text = type(layer), dict(vars(layer)), repr(layer)
    listener = Listener(layer)
    got = layer(x)
    assert torch.equal(got, y) and type(layer) is kind and repr(layer) == text
    got.pow(3).sum().backward()
    assert distance(listener.heard_of(), want.reshape(samples, -1)) < 1e-12
    listener.detach()
    assert vars(layer) == before and not layer._forward_hooks
    layer(x).sum().backward()
    assert not listener.heard()


def test_torchs_own_layers_take_no_gate_before_they_are_converted():
    with pytest.raises(ValueError, match=r"'0' and 0 more .* not converted"):
        Listener(nn.Sequential(nn.Linear(3, 2)), ["0"])
    model = nn.Sequential(Doubled(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="not converted"):
        Listener(model, ["0", "2"])
    assert gate_of(model[0]) is None and not model[0]._forward_hooks


def test_what_has_another_gate_of_its_own_or_is_no_layer_takes_none():
    class Routed(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.gate = nn.Linear(3, 1)

    class Heads(nn.MultiheadAttention):
        pass

    for module in (Routed(), Heads(4, 2), nn.ReLU(), nn.MultiheadAttention(4, 2)):
        assert not gateable(module) and not scorable(module) and gate_of(module) is None


def test_no_class_of_transformers_is_imported_for_the_look(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    assert not gateable(Conv1D(2, 3)) and gateable(nn.Linear(3, 2))
    assert "transformers.pytorch_utils" not in sys.modules


def model():
    torch.manual_seed(0)
    return nn.Sequential(Doubled(5, 4, 3), NormAct(4), nn.Flatten(), Wide(36, 2)).double()


def test_convert_says_that_subclasses_need_none():
    with pytest.raises(ValueError, match="scored as they are"):
        tk.convert(model())


def test_a_second_listener_displaces_the_first_and_gives_way_again():
    net = model()
    first = Listener(net)
    second = Listener(net, ["0"])
    with pytest.warns(UserWarning, match="already feeds another"):
        assert second.attachment.displaced() == [first]
    assert attached(net) == [second, first] and second.attachment.intact and not first.attachment.intact
    net(X).sum().backward()
    assert list(second.heard()) == ["0"] and list(first.heard()) == ["1", "3"]
    second.attachment.withdraw()
    assert attached(net) == [first] and first.attachment.intact
    net(X).sum().backward()
    assert [len(found) for found in first.heard().values()] == [1, 1, 1] and not second.heard()
    first.detach()
    assert attached(net) == [] and not any(layer._forward_hooks for layer in net)


def test_withdrawn_from_layers_that_had_no_gate_no_hook_is_left():
    net = model()
    listener = Listener(net)
    listener.attachment.withdraw()
    assert not any(layer._forward_hooks or "gate" in vars(layer) for layer in net)


def test_gates_of_a_listener_that_is_gone_do_nothing():
    net = model()
    Listener(net)
    y = net(X)
    assert gate_of(net[0]).owner() is None and not gate_of(net[0]).leaves()
    assert "ChannelGate" not in type(y.grad_fn).__name__


def test_reverting_takes_these_gates_out_too():
    net = tk.convert(nn.Sequential(Doubled(5, 4, 3), nn.Conv2d(4, 2, 1)))
    Listener(net)
    tk.revert(net)
    assert type(net[1]) is nn.Conv2d and not net[0]._forward_hooks and "gate" not in vars(net[0])


def test_copies_and_pickles_score_nothing_until_they_are_scored_themselves():
    net = model()
    listener = Listener(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other(X).sum().backward()
        assert not listener.heard() and attached(other) == []
        theirs = Listener(other)
        other(X).sum().backward()
        net(X).sum().backward()
        heard, own = theirs.heard(), listener.heard()
        assert list(heard) == ["0", "1", "3"]
        assert all(torch.equal(heard[name][0], own[name][0]) for name in heard)  # once, not by a copied hook as well
        theirs.detach()
        assert not any(layer._forward_hooks for layer in other)


def test_overwriting_a_hooked_output_in_place_is_refused_by_name():
    layer = Doubled(5, 4, 3).double()
    listener = Listener(layer)
    y = layer(X).relu_()
    with pytest.raises(tk.InplaceError, match=r"a scored Doubled was overwritten in place .* out-of-place form"):
        y.sum().backward()
    assert not listener.heard()


def test_hooks_of_the_users_stay_and_see_the_gated_output():
    layer = Wide(5, 3).double()
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output) or 2 * output)
    listener = Listener(layer)
    y = layer(X, times=3)
    y.sum().backward()
    assert distance(listener.heard_of(), 2 * seen[0].sum((1, 2))) < 1e-12
    listener.detach()
    assert len(layer._forward_hooks) == 1 and torch.equal(layer(X, times=3), y)


def test_outputs_that_are_no_tensor_are_handed_on():
    class Routing(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y.softmax(-1), y

    layer = Routing(5, 3).double()
    listener = Listener(layer)
    sum(t.sum() for t in layer(X)).backward()
    assert not listener.heard()


def test_a_gate_for_every_element():
    layer = Wide(5, 3).double()
    listener = Listener(layer, every_element=True)
    y = layer(X)
    y.pow(3).sum().backward()
    ((products,),) = listener.attachment.drain_elements().values()
    assert distance(products, (3 * y**3).movedim(-1, 1)) < 1e-12


def test_the_batch_normalisations_among_them_are_known():
    assert Listener(model()).attachment.batch_norms == {"1"}


def test_compiled_a_hooked_layer_scores_as_it_does_in_eager():
    net = model().float()
    listener = Listener(net)
    found = []
    for run in (net, torch.compile(net, backend="eager")):
        run(X.float()).pow(2).sum().backward()
        found.append(listener.heard())
    assert list(found[0]) == list(found[1]) == ["0", "1", "3"]
    for name, (want,) in found[0].items():
        assert distance(found[1][name][0], want) < 1e-6


def test_parametrised_layers_take_a_gate_by_a_hook():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3).double())
    listener = Listener(layer)
    y = layer(X)
    y.pow(2).sum().backward()
    assert distance(listener.heard_of(), 2 * y.pow(2).sum((1, 2))) < 1e-12
