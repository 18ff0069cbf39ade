"""Fusion: the same gradients, scores and buffers; what fuses, counted; what must not; nothing left behind."""

import copy
import io
import pickle
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import taylorkern as tk
from taylorkern import backends, deferred
from taylorkern.demo.network import DigitsNet
from tests.cases import LAYOUTS, distance, in_layout, normal
from tests.networks import randomised, residual

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

pytestmark = pytest.mark.skipif(
    backends.provider("batch_norm_act", torch.zeros(2, 2)) is backends.reference, reason="no kernels here"
)

# Name → image size, BN→ReLU and BN→add→ReLU by hand: all of a ResNet's but the 1 + 3 or 4 that shortcuts end in.
NETWORKS = {
    "resnet18": (32, 9, 8),
    "mobilenet_v2": (32, 0, 0),
    "densenet121": (32, 121, 0),
    "googlenet": (32, 57, 0),
    "vgg11_bn": (32, 8, 0),
    "shufflenet_v2_x0_5": (32, 37, 0),
}
OTHERS = {
    "resnet50": (64, 33, 16),
    "resnext50_32x4d": (64, 33, 16),
    "mnasnet0_5": (64, 35, 0),
    "regnet_y_400mf": (64, 33, 16),
    "inception_v3": (75, 94, 0),
}
ARGUMENTS = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}


def build(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **ARGUMENTS.get(name, {}))
    if isinstance(model, torchvision.models.VGG):
        model.classifier = nn.Linear(512 * 7 * 7, 10)  # its own takes most of the time, and normalises nothing
    return randomised(model)


@pytest.fixture
def ran(monkeypatch):
    """What ran fused, counted: "act" without and "add" with a residual."""
    counts = Counter()
    fused = deferred.fused_batch_norm

    def counted(layer, gate, x, residual, activation):
        counts["act" if residual is None else "add"] += 1
        return fused(layer, gate, x, residual, activation)

    monkeypatch.setattr(deferred, "fused_batch_norm", counted)
    return counts


def step(model, x):
    torch.manual_seed(1)  # dropout's mask
    out = model(x)
    out.sin().sum().backward()
    return out


def state(model):
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([*gradients, torch.ones(1)]), torch.cat([b.double().flatten() for b in model.buffers()])


def same(plain, fused, x, tolerance=1e-9):
    """One step of each: the same output, gradients and buffers."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [step(model, leaf * 1) for model, leaf in zip((plain, fused), leaves, strict=True)]
    assert distance(outputs[1], outputs[0]) < tolerance
    assert distance(leaves[1].grad, leaves[0].grad) < tolerance
    for want, got in zip(state(plain), state(fused), strict=True):
        assert distance(got, want) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_scores_and_buffers_are_the_unfused_ones(name, training, layout, ran):
    size, act, add = NETWORKS[name]
    plain = tk.convert(build(name).double().train(training))
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    x = in_layout(normal((3, 3, size, size), 1, torch.float64), layout)
    if layout == "channels_last":
        plain, fused = (model.to(memory_format=torch.channels_last) for model in (plain, fused))
    scores = [tk.Scores(model, x[:1]) for model in (plain, fused)]
    ran.clear()
    same(plain, fused, x)
    assert (ran["act"], ran["add"]) == (act, add)
    want, got = (s.importance("taylor_fg") for s in scores)
    assert distance(got, want) < 1e-9 and want.count_nonzero() > len(want) / 2


@pytest.mark.parametrize("name", OTHERS)
def test_what_fuses_elsewhere_and_without_scores(name, ran):
    size, act, add = OTHERS[name]
    plain = build(name).double()
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    same(plain, fused, normal((3, 3, size, size), 1, torch.float64))
    assert (ran["act"], ran["add"]) == (act, add)


def test_the_demo_network_fuses_all_but_its_shortcuts(ran):
    plain = DigitsNet((4, 8, 8)).double()
    same(plain, tk.convert(copy.deepcopy(plain), fuse=True), normal((4, 1, 8, 8), 1, torch.float64))
    assert (ran["act"], ran["add"]) == (7, 6)


class SqueezeExcite(nn.Conv2d):
    def __init__(self, c):
        super().__init__(c, c, 1)

    def forward(self, x):
        return x * super().forward(x.mean((2, 3), keepdim=True)).sigmoid()


class Bottleneck(nn.Module):
    """The way timm writes it."""

    def __init__(self, c=4, stride=1, se=False):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, stride, 1), nn.BatchNorm2d(c)
        self.drop_block, self.act2, self.aa = nn.Identity(), nn.ReLU(inplace=True), nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)
        self.se = SqueezeExcite(c) if se else None
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(c, c, 1, stride), nn.BatchNorm2d(c)) if stride > 1 else None
        self.drop_path = None

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)
        x = self.conv3(x)
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act3(x)
        return x


@pytest.mark.parametrize(("arguments", "act", "add"), [((4, 1), 2, 1), ((4, 2), 2, 1), ((4, 1, True), 2, 0)])
def test_timms_bottleneck(arguments, act, add, ran):
    plain = randomised(Bottleneck(*arguments)).double()
    same(plain, tk.convert(copy.deepcopy(plain), fuse=True), normal((2, 4, 6, 6), 1, torch.float64))
    assert (ran["act"], ran["add"]) == (act, add)


class Written(nn.Module):
    """Two normalisations and what a forward may need; the spelling is the subclass's."""

    def __init__(self):
        super().__init__()
        self.bn, self.other, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.skip, self.norms, self.scale, self.on = nn.Identity(), nn.ModuleList([nn.BatchNorm2d(3)]), 0.5, True
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


SPELLINGS = {}


def spelled(forward, act, add):
    kind = type(forward.__name__, (Written,), {"forward": forward})
    SPELLINGS[forward.__name__] = (kind, act, add)


def module(self, x):
    return self.relu(self.bn(x))


def functional(self, x):
    return F.relu(self.bn(x))


def functional_in_place(self, x):
    y = F.relu(self.bn(x), inplace=True)
    return torch.relu(self.other(y)) + torch.relu_(self.tail(y))


def methods(self, x):
    return self.bn(x).relu() + self.other(x).relu_() + (self.tail(x) + x).relu()


def sums(self, x):
    return self.relu(self.bn(x) + x) + F.relu(2 * x + self.other(x)) + F.relu(self.tail(x) + self.bn(x))


def statements(self, x):
    y = self.bn(x)
    z = x * 2
    y = self.skip(y)
    y += z
    y = self.relu(y)
    y = self.other(y)
    y = z + y
    return self.relu(y)


def bare_in_place(self, x):
    y = self.bn(x)
    y.relu_()
    z = self.other(x)
    F.relu(z, inplace=True)
    return y * z


def renamed(self, x):
    normed = self.bn(x)
    summed = normed + x
    active = self.relu(summed)
    return (active, self.relu(self.other(x)))[0] + active


def interleaved(self, x):
    a = self.bn(x)
    b = self.other(x)
    a = F.relu(a)
    b = F.relu(b)
    return a - b


def sum_in_return(self, x):
    y = self.bn(x)
    return self.relu(y + x).mean((2, 3))


def sequential_tail(self, x):
    y = self.tail(x)
    return F.relu(y + x)


def conditional_activation(self, x):
    y = self.bn(x)
    if self.on:
        y = self.relu(y)
    return y


def conditional_return(self, x):
    y = self.bn(x)
    if self.on:
        return self.relu(y)
    return y


def conditional_start(self, x):
    if self.on:
        y = self.bn(x) + x
    else:
        x = 2 * x
        y = x + self.other(x)
    return self.relu(y)


def local_callable(self, x):
    for norm in self.norms:
        x = norm(x)
        x = F.relu(x)
    bn = self.bn
    return F.relu(bn(x))


def shared(self, x):
    return F.relu(self.bn(x) + self.bn(3 * x + 1))


def shared_in_statements(self, x):
    y = self.bn(x)
    z = F.relu(self.bn(2 * x + 5))
    y = F.relu(y)
    return y - z


def used_twice(self, x):
    y = self.bn(x)
    return F.relu(y) - y


def used_after(self, x):
    y = self.bn(x)
    z = F.relu(y)
    return z * y


def captured(self, x):
    y = self.bn(x)
    late = lambda: y * 2  # noqa: E731
    z = F.relu(y)
    return z + late()


def captured_before(self, x):
    late = lambda: y * 2  # noqa: E731
    y = self.bn(x)
    z = F.relu(y)
    return z + late()


def left_by_a_break(self, x):
    for _ in range(2):
        y = self.bn(x)
        if self.on:
            break
        y = F.relu(y)
    return y * 2


def activation_not_come_to(self, x):
    y = self.bn(x)
    if not self.on:
        y = self.relu(y)
        y = y * 2
    return y * 3


def activation_or_something_else(self, x):
    y = self.bn(x)
    if not self.on:
        return self.relu(y)
    else:
        z = y + x
        x = z * 2
    return x


def needed_in_the_next_round(self, x):
    y = x
    for _ in range(2):
        x = x + y
        y = self.bn(x)
        z = F.relu(y)
    return z


def broadcast(self, x):
    return F.relu(self.bn(x) + x.mean((2, 3), keepdim=True))


def other_dtype(self, x):
    return F.relu(self.bn(x) + x.float())


def summed_twice(self, x):
    y = self.bn(x)
    y += x
    y = y + 2 * x
    return self.relu(y)


def gradientless(self, x):
    with torch.no_grad():
        y = F.relu(self.bn(x))
    return self.tail(x) + y


def guarded(self, x):
    try:
        return F.relu(self.bn(x))
    finally:
        self.on = True


def behind_a_condition(self, x):
    y = self.bn(x)
    return F.relu(y) if self.scale > 1 else self.tail(x)


def another_activation(self, x):
    return F.leaky_relu(self.bn(x))


for _forward, _act, _add in [
    (module, 1, 0),
    (functional, 1, 0),
    (functional_in_place, 3, 0),
    (methods, 2, 1),
    (sums, 0, 3),
    (statements, 0, 2),
    (bare_in_place, 2, 0),
    (renamed, 1, 1),
    (interleaved, 2, 0),
    (sum_in_return, 0, 1),
    (sequential_tail, 0, 1),
    (conditional_activation, 1, 0),
    (conditional_return, 1, 0),
    (conditional_start, 0, 1),
    (local_callable, 2, 0),
    (shared, 0, 0),
    (shared_in_statements, 1, 0),
    (used_twice, 0, 0),
    (used_after, 0, 0),
    (captured, 0, 0),
    (captured_before, 0, 0),
    (left_by_a_break, 0, 0),
    (activation_not_come_to, 0, 0),
    (activation_or_something_else, 0, 0),
    (needed_in_the_next_round, 0, 0),
    (broadcast, 0, 0),
    (other_dtype, 0, 0),
    (summed_twice, 0, 0),
    (gradientless, 0, 0),
    (guarded, 0, 0),
    (behind_a_condition, 0, 0),
    (another_activation, 0, 0),
]:
    spelled(_forward, _act, _add)


def pair(kind):
    """A network and its fused twin; that something may be left is not the question here."""
    torch.manual_seed(0)
    plain = randomised(kind()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain, tk.convert(copy.deepcopy(plain), fuse=True)


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling(name, ran):
    kind, act, add = SPELLINGS[name]
    plain, fused = pair(kind)
    for seed in range(2):
        same(plain, fused, normal((2, 3, 5, 5), seed, torch.float64))
    assert (ran["act"], ran["add"]) == (2 * act, 2 * add)


@pytest.mark.parametrize("name", SPELLINGS)
def test_evaluation_without_gradients_is_bit_for_bit_the_plain_networks(name, ran):
    plain, fused = pair(SPELLINGS[name][0])
    x = normal((2, 3, 5, 5), 1, torch.float64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), fused.eval()(x))
    assert not ran


def sequential(*more):
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *more, nn.ReLU(), nn.Conv2d(4, 2, 1))


def test_sequentials_fuse_through_identities_and_into_each_other(ran):
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU(), nn.BatchNorm2d(4))
    for plain in (sequential(), sequential(nn.Identity()), nested):
        ran.clear()
        same(plain.double(), tk.convert(copy.deepcopy(plain), fuse=True), normal((2, 3, 5, 5), 1, torch.float64))
        assert ran == {"act": 1}


X = normal((2, 3, 5, 5), 1)


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("tracked", [True, False])
def test_running_statistics_are_torchs(momentum, tracked, ran):
    plain = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum, track_running_stats=tracked), nn.ReLU()).double()
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    for seed in range(3):
        x = normal((2, 3, 4, 4), seed, torch.float64) * 2 + 1
        assert distance(fused(x), plain(x)) < 1e-12
    assert ran["act"] == 3 and len(list(plain.buffers())) == 3 * tracked
    for want, got in zip(plain.buffers(), fused.buffers(), strict=True):
        assert distance(got, want) < 1e-12
    assert distance(fused.eval()(x), plain.eval()(x)) < 1e-12


def test_untracked_statistics_stay_put(ran):
    model = tk.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), fuse=True)
    model[0].track_running_stats = False
    before = [b.clone() for b in model.buffers()]
    model(X)
    assert ran["act"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_one_value_per_channel_is_refused_as_torch_does():
    model = tk.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), fuse=True)
    for shape, text in (((1, 3, 1, 1), "more than 1 value per channel"), ((2, 3), "4D")):
        with pytest.raises(ValueError, match=text):
            model(torch.ones(shape))


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_on_either_see_what_they_saw(kind, which, ran):
    fused = tk.convert(sequential(), fuse=True)
    seen = []
    handle = getattr(fused[which], kind)(lambda *given: seen.append(given))
    fused(X).sum().backward()
    assert len(seen) == 1 and not ran
    handle.remove()
    fused(X)
    assert ran == {"act": 1}


def test_global_hooks_see_every_module(ran):
    fused = tk.convert(sequential(), fuse=True)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    fused(X)
    handle.remove()
    assert seen == [*fused, fused] and not ran


@pytest.mark.parametrize("other", [nn.Identity(), nn.GELU(), nn.LeakyReLU()])
@pytest.mark.parametrize("kind", [lambda: SPELLINGS["module"][0](), lambda: SPELLINGS["statements"][0]()])
def test_a_module_replaced_later_is_what_runs(kind, other, ran):
    plain, fused = pair(kind)
    plain.relu = fused.relu = other
    same(plain, fused, X.double())
    assert not ran
    plain, fused = pair(kind)
    plain.bn = fused.bn = other
    same(plain, fused, X.double())
    plain, fused = pair(kind)
    plain.skip = fused.skip = other
    same(plain, fused, X.double())


def test_an_instance_forward_put_on_a_layer_later_is_what_runs(ran):
    fused = tk.convert(sequential(), fuse=True)
    fused[2].forward = lambda x: 0 * x
    assert fused(X).isfinite().all() and not ran
    assert torch.equal(fused(X)[:, :, 0, 0], fused[3].bias.expand(2, 2))


class Meddling(Written):
    def forward(self, x):
        x = 1 * x
        y = self.bn(x)
        x.mul_(2)
        return self.relu(y)


class MeddlingWithTheSum(Written):
    def forward(self, x):
        z = 2 * x
        y = self.bn(x)
        y += z
        z.zero_()
        return self.relu(y)


@pytest.mark.parametrize(("kind", "what"), [(Meddling, "input"), (MeddlingWithTheSum, "addend")])
def test_in_place_changes_in_between_are_refused(kind, what):
    fused = tk.convert(kind(), fuse=True)
    with pytest.raises(tk.InplaceError, match=f"the {what} of a fused BatchNorm2d was modified in place"):
        fused(X)


def test_the_rest_of_a_class_is_kept():
    class Base(Written):
        def forward(self, x, scale=2.0, *, shift=1.0):
            """Documented."""
            return self.relu(self.bn(x)) * scale + shift

    factor = 3

    class Derived(Base):
        def forward(self, x, scale=5.0, *, shift: float = 7.0):
            y = self.other(x)
            y = self.relu(y) * factor
            return super().forward(y, scale, shift=shift)

    plain, fused = pair(Derived)
    same(plain, fused, X.double())
    assert distance(fused(X.double(), 1, shift=0), plain(X.double(), 1, shift=0)) < 1e-12
    assert fused.forward.__doc__ == plain.forward.__doc__ and fused.forward.__defaults__ == (5.0,)


def test_tracebacks_point_to_the_code_that_was_written():
    class Failing(Written):
        def forward(self, x):
            y = self.relu(self.bn(x))
            raise RuntimeError(f"here: {y.shape}")

    plain, fused = pair(Failing)
    places = []
    for model in (plain, fused):
        with pytest.raises(RuntimeError, match="here") as caught:
            model(X.double())
        code = caught.traceback[-1]
        places.append((str(code.path), code.lineno, code.name))
    assert places[0] == places[1]


def keys(model):
    return [set(vars(m)) for m in model.modules()]


def test_state_names_and_repr_stay_and_revert_is_exact():
    plain = build("resnet18")
    before, text, state_keys = keys(plain), repr(plain), list(plain.state_dict())
    forwards = [m.forward for m in plain.modules()]
    fused = tk.convert(plain, fuse=True)
    assert repr(fused) == text and list(fused.state_dict()) == state_keys
    assert "forward" in vars(fused.layer1[0])
    tk.revert(fused)
    assert keys(fused) == before and [m.forward for m in fused.modules()] == forwards
    tk.convert(fused)
    assert "forward" not in vars(fused.layer1[0])


def test_a_converted_model_is_fused_by_a_second_call(ran):
    model = tk.convert(sequential())
    model(X)
    assert not ran
    tk.convert(model, fuse=True)
    tk.convert(model, fuse=True)
    model(X)
    assert ran["act"] == 1
    with pytest.raises(ValueError, match="converted already"):
        tk.convert(model)
    with pytest.raises(ValueError, match="no layer"):
        tk.convert(nn.ReLU(), fuse=True)


def test_copies_are_fused_and_apart(ran):
    fused = tk.convert(Bottleneck(), fuse=True)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    x = normal((2, 4, 6, 6), 1)
    assert other(x).abs().sum() > x.relu().sum() * 1.01 and sum(ran.values()) == 3
    assert other.forward.__self__ is other


@pytest.mark.parametrize("make", [Bottleneck, lambda: torchvision.models.vgg11_bn(num_classes=2).features[:4]])
def test_pickles_come_back_working_and_can_be_fused_again(make, ran):
    fused = tk.convert(make(), fuse=True)
    x = normal((2, next(fused.parameters()).shape[1], 6, 6), 1)
    want = fused(x)
    ran.clear()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
        ran.clear()
        assert distance(other(x), want) < 1e-5 and not ran
        tk.convert(other, fuse=True)
        assert distance(other(x), want) < 1e-5 and ran
        tk.revert(other)
        assert "forward" not in vars(other)


def test_what_is_left_is_said_once():
    model = nn.Sequential(Written(), *[SPELLINGS["used_twice"][0]() for _ in range(3)])
    model[0].forward = model[0].relu.forward
    with pytest.warns(UserWarning) as caught:
        tk.convert(model, fuse=True)
    (said,) = [str(w.message) for w in caught]
    assert said == "fusion leaves 0 (Written): the instance has a forward of its own; and 3 more"
    assert caught[0].filename == __file__


def test_code_that_is_not_in_its_file_is_left():
    names = {"nn": nn, "Written": Written}
    exec("class Unseen(Written):\n    def forward(self, x):\n        return self.relu(self.bn(x))", names)
    with pytest.warns(UserWarning, match=r"the model \(Unseen\): the source of Unseen.forward can't be had"):
        tk.convert(names["Unseen"](), fuse=True)


def test_source_that_changed_since_the_import_is_left(tmp_path, monkeypatch):
    file = tmp_path / "edited_network.py"
    text = "import tests.test_fusion as t\nclass Net(t.Written):\n    def forward(self, x):\n        return {}\n"
    file.write_text(text.format("self.relu(self.bn(x))"))
    monkeypatch.syspath_prepend(tmp_path)
    import edited_network

    file.write_text(text.format("self.relu(self.bn(3 * x))"))
    with pytest.warns(UserWarning, match="is not the code that runs"):
        tk.convert(edited_network.Net(), fuse=True)


def test_compiled_in_one_graph(ran):
    plain, fused = pair(Bottleneck)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = normal((2, 4, 6, 6), 1, torch.float64)
    assert distance(compiled(x), plain(x)) < 1e-12 and not ran


def test_checkpointing_and_transforms(ran):
    plain, fused = pair(Bottleneck)
    x = normal((2, 4, 6, 6), 1, torch.float64).requires_grad_()
    for reentrant in (True, False):
        for model in (plain, fused):
            model.zero_grad()
            checkpoint(model, x, use_reentrant=reentrant).sin().sum().backward()
        assert distance(state(fused)[0], state(plain)[0]) < 1e-9
    ran.clear()
    parameters = dict(fused.eval().named_parameters())
    loss = lambda p: torch.func.functional_call(fused, p, x).sum()  # noqa: E731
    assert torch.func.grad(loss)(parameters).keys() == parameters.keys() and not ran
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(m.eval()(forward_ad.make_dual(x, x.detach()))).tangent for m in (plain, fused)
        ]
    assert distance(tangents[1], tangents[0]) < 1e-12 and not ran


def test_mixed_dtypes_and_autocast(ran):
    plain = randomised(Bottleneck())
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    wide, x = copy.deepcopy(plain).double(), normal((4, 4, 9, 9), 1)
    want = step(wide, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [step(model, x) for model in (plain, fused)]
    assert sum(ran.values()) >= 2
    assert distance(outputs[1], want) <= 2 * distance(outputs[0], want) + 1e-6
    assert distance(state(fused)[0], state(wide)[0]) <= 2 * distance(state(plain)[0], state(wide)[0]) + 1e-6


def trained(fuse):
    """A scored network after three steps."""
    torch.manual_seed(0)
    model = tk.convert(residual().double(), fuse=fuse)
    x = normal((4, 2, 8, 8), 1, torch.float64)
    scores = tk.Scores(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    return model, x, scores, optimizer


def test_coupling_oracle_and_masks_see_the_plain_network(ran):
    (plain, x, _, _), (fused, _, _, _) = trained(False), trained(True)
    assert ran == {"act": 12, "add": 8}  # three steps, and the forward by which Scores looks at the layers
    couplings = [tk.couple(model, x) for model in (plain, fused)]
    assert couplings[0].units == couplings[1].units and couplings[0].layers.keys() == couplings[1].layers.keys()
    batches = [(x, torch.arange(4))]
    changes = [tk.oracle(model.eval(), x, F.cross_entropy, batches) for model in (plain, fused)]
    assert distance(changes[1], changes[0]) < 1e-9


def test_a_fused_model_is_pruned_and_goes_on_training(ran):
    results = []
    for fuse in (False, True):
        model, x, scores, _ = trained(fuse)
        tk.prune(model, x, scores.importance("taylor_fo"), target=0.7, of="channels")
        ran.clear()
        results.append((step(model, x), state(model)[0]))
    assert ran == {"act": 3, "add": 2}
    for want, got in zip(*results, strict=True):
        assert distance(got, want) < 1e-9


def test_the_pruner_works_on_a_fused_model(ran):
    model = tk.convert(residual().double(), fuse=True)
    x = normal((4, 2, 8, 8), 1, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = tk.Pruner(model, x, optimizer=optimizer, target=0.6, of="channels", every=1, step=2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
        pruner.step()
        if pruner.done:
            break
    assert pruner.done and ran["add"] > 2
    assert isinstance(model(x), Tensor)
