"""Coupling: the exact units of networks small enough to work out by hand, and what freezes them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorkern import Scores, convert
from taylorkern.coupling import Cost, Coupling, couple

IMAGE = torch.randn(1, 3, 8, 8)


class Net(nn.Module):
    """Layers by keyword, and the function that applies them."""

    def __init__(self, apply, **layers: nn.Module) -> None:
        super().__init__()
        self.apply_layers = apply
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Tensor, **kwargs: Tensor):
        return self.apply_layers(self, *args, **kwargs)


def conv(i: int, o: int, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def places(coupling: Coupling) -> list[tuple[tuple[str, int], ...]]:
    return [unit.places for unit in coupling.units]


def each(layer: str, count: int) -> list[tuple[tuple[str, int], ...]]:
    return [((layer, c),) for c in range(count)]


def frozen(coupling: Coupling) -> set[tuple[str, str]]:
    return {(f.operation, f.module) for f in coupling.frozen}


def axis(coupling: Coupling, name: str, dim: int) -> list[int]:
    return coupling.axes[name, dim].tolist()


def test_plain_chain():
    coupling = couple(
        nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 2)), IMAGE
    )
    assert places(coupling) == each("0", 4) + each("3", 5)
    assert axis(coupling, "0.weight", 0) == axis(coupling, "0.bias", 0) == axis(coupling, "2.weight", 1) == [0, 1, 2, 3]
    for name in ("2.weight", "2.bias", "3.weight", "3.bias", "3.running_mean", "3.running_var"):
        assert axis(coupling, name, 0) == [4, 5, 6, 7, 8]
    assert axis(coupling, "0.weight", 1) == [-1] * 3
    assert axis(coupling, "0.weight", 2) == [-1] * 3
    assert axis(coupling, "5.weight", 0) == [-1] * 2
    assert coupling.consumers == {("2.weight", 1), ("5.weight", 1)}
    assert coupling.filters == {("0.weight", 0), ("2.weight", 0)}
    assert frozen(coupling) == {("model input", "0"), ("model output", "")}
    assert {f.operation: f.labels for f in coupling.frozen} == {"model input": 3, "model output": 2}
    assert coupling.unreached == coupling.ungated == ()


def test_residual_places_are_joined():
    def apply(net, x):
        x = net.bn0(net.stem(x)).relu()
        out = net.bn2(net.conv2(net.bn1(net.conv1(x)).relu()))
        out += x
        return net.head(out.relu())

    norms = {f"bn{i}": nn.BatchNorm2d(4 if i != 1 else 2) for i in range(3)}
    coupling = couple(Net(apply, stem=conv(3, 4), conv1=conv(4, 2), conv2=conv(2, 4), head=conv(4, 2), **norms), IMAGE)
    assert places(coupling) == [(("bn0", c), ("bn2", c)) for c in range(4)] + each("bn1", 2)
    assert axis(coupling, "conv2.weight", 0) == axis(coupling, "stem.weight", 0) == [0, 1, 2, 3]


def test_pre_activation_gates_sit_behind_every_normalisation():
    def apply(net, x):
        x = net.stem(x)
        x = x + net.conv(net.bn0(x).relu())
        return net.head(net.bn1(x).relu())

    net = Net(apply, stem=conv(3, 4), bn0=nn.BatchNorm2d(4), conv=conv(4, 4), bn1=nn.BatchNorm2d(4), head=conv(4, 2))
    assert places(couple(net, IMAGE)) == [(("bn0", c), ("bn1", c)) for c in range(4)]


def test_concatenation_offsets_the_channels():
    def apply(net, x):
        return net.head(torch.cat([net.a(x), x, net.b(x)], 1))

    coupling = couple(Net(apply, a=conv(3, 2), b=conv(3, 3), head=conv(8, 2)), IMAGE)
    assert places(coupling) == each("a", 2) + each("b", 3)
    assert axis(coupling, "head.weight", 1) == [0, 1, -1, -1, -1, 2, 3, 4]


def test_concatenation_along_positions_ties_channels():
    def apply(net, x):
        return net.head(torch.cat([net.a(x), net.b(x)], 2))

    coupling = couple(Net(apply, a=conv(3, 2), b=conv(3, 2), head=conv(2, 2)), IMAGE)
    assert places(coupling) == [(("a", c), ("b", c)) for c in range(2)]


@pytest.mark.parametrize(
    "halves",
    [
        lambda x: x.chunk(2, 1),
        lambda x: x.split(x.shape[1] // 2, 1),
        lambda x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]),
        lambda x: x.view(x.shape[0], 2, -1, *x.shape[2:]).unbind(1),
    ],
    ids=["chunk", "split", "slices", "view"],
)
def test_equal_parts_are_tied(halves):
    def apply(net, x):
        a, b = halves(net.conv(x))
        return net.head(a * torch.sigmoid(b))

    coupling = couple(Net(apply, conv=conv(3, 6), head=conv(3, 2)), IMAGE)
    assert places(coupling) == [(("conv", c), ("conv", c + 3)) for c in range(3)]


@pytest.mark.parametrize(
    "pairs", [lambda x: (x[:, ::2], x[:, 1::2]), lambda x: x.view(1, -1, 2, 8, 8).unbind(2)], ids=["slices", "view"]
)
def test_strided_parts_tie_neighbours(pairs):
    def apply(net, x):
        even, odd = pairs(net.conv(x))
        return net.head(torch.cat([odd, even], 1))

    coupling = couple(Net(apply, conv=conv(3, 6), head=conv(6, 2)), IMAGE)
    assert places(coupling) == [(("conv", 2 * c), ("conv", 2 * c + 1)) for c in range(3)]


def test_glu_ties_halves():
    coupling = couple(nn.Sequential(conv(3, 6), nn.GLU(1), conv(3, 2)), IMAGE)
    assert axis(coupling, "0.weight", 0) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("apart", [lambda x: x[:, 1:3], lambda x: x.split([2, 4], 1)[0], lambda x: x[:, 2:3]])
def test_unequal_slices_freeze(apart):
    def apply(net, x):
        x = net.conv(x)
        part = apart(x)
        return net.head(x) + part.mean((1, 2, 3), keepdim=True)

    coupling = couple(Net(apply, conv=conv(3, 6), head=conv(6, 2)), IMAGE)
    assert not coupling.units
    assert any(f.operation.startswith(("aten.slice", "aten.split")) and f.labels == 6 for f in coupling.frozen)


@pytest.mark.parametrize("shuffle", ["view", "module"])
def test_channel_shuffle(shuffle):
    def apply(net, x):
        x = net.conv(x)
        n, c, h, w = x.shape
        if shuffle == "module":
            return net.head(F.channel_shuffle(x, 2))
        return net.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    coupling = couple(Net(apply, conv=conv(3, 6), head=conv(6, 2)), IMAGE)
    assert places(coupling) == [(("conv", c), ("conv", c + 3)) for c in range(3)]
    assert axis(coupling, "head.weight", 1) == [0, 0, 1, 1, 2, 2]


def test_depthwise_takes_over_the_gate():
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, 3, groups=4), conv(4, 2))
    coupling = couple(net, IMAGE)
    assert places(coupling) == each("3", 4)
    assert (
        axis(coupling, "0.weight", 0) == axis(coupling, "3.weight", 0) == axis(coupling, "4.weight", 1) == [0, 1, 2, 3]
    )


def test_depthwise_multiplier():
    coupling = couple(nn.Sequential(conv(3, 2), conv(2, 6, 3, groups=2), conv(6, 2)), IMAGE)
    assert places(coupling) == [tuple(("1", 3 * c + j) for j in range(3)) for c in range(2)]
    assert axis(coupling, "0.weight", 0) == [0, 1]


def test_functional_depthwise_leaves_the_gate_before_it():
    def apply(net, x):
        return net.head(F.conv2d(net.conv(x), net.norm.weight.view(-1, 1, 1, 1), groups=len(net.norm.weight)))

    coupling = couple(Net(apply, conv=conv(3, 4), norm=nn.BatchNorm2d(4), head=conv(4, 2)), IMAGE)
    assert places(coupling) == each("conv", 4)
    assert axis(coupling, "norm.weight", 0) == [0, 1, 2, 3]


def test_grouped_goes_by_whole_groups():
    coupling = couple(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 6, 3, groups=2), nn.ReLU(), conv(6, 2)), IMAGE)
    assert places(coupling) == [tuple(("2", 3 * g + j) for j in range(3)) for g in range(2)]
    assert axis(coupling, "0.weight", 0) == [0, 0, 1, 1]
    assert axis(coupling, "2.weight", 0) == [0, 0, 0, 1, 1, 1]
    assert axis(coupling, "2.weight", 1) == [-1, -1]


def test_transposed():
    coupling = couple(nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 5, 2), conv(5, 2)), IMAGE)
    assert places(coupling) == each("0", 4) + each("1", 5)
    assert axis(coupling, "1.weight", 0) == [0, 1, 2, 3]
    assert axis(coupling, "1.weight", 1) == axis(coupling, "1.bias", 0) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("groups", "inputs", "outs"), [(4, [0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]), (2, [0, 0, 1, 1], [0] * 4 + [1] * 4)]
)
def test_transposed_in_groups(groups, inputs, outs):
    coupling = couple(nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 8, 2, groups=groups), conv(8, 2)), IMAGE)
    assert axis(coupling, "1.weight", 0) == axis(coupling, "0.weight", 0) == inputs
    assert axis(coupling, "1.bias", 0) == axis(coupling, "2.weight", 1) == outs
    assert axis(coupling, "1.weight", 1) == [-1] * (8 // groups)


def test_squeeze_excite_gates_the_features_only():
    def apply(net, x):
        x = net.bn(net.conv(x)).relu()
        return net.head(torch.sigmoid(net.up(net.down(F.adaptive_avg_pool2d(x, 1)).relu())) * x)

    net = Net(apply, conv=conv(3, 4), bn=nn.BatchNorm2d(4), down=conv(4, 2), up=conv(2, 4), head=conv(4, 2))
    coupling = couple(net, IMAGE)
    assert places(coupling) == each("bn", 4) + each("down", 2)
    assert (
        axis(coupling, "up.weight", 0)
        == axis(coupling, "up.bias", 0)
        == axis(coupling, "down.weight", 1)
        == [0, 1, 2, 3]
    )


def test_hand_written_gating_gates_the_features_too():
    def apply(net, x):
        x = net.conv(x).relu()
        return net.head(F.relu6(net.up(x.mean((2, 3), keepdim=True)) + 3) / 6 * x)

    coupling = couple(Net(apply, conv=conv(3, 4), up=conv(4, 4), head=conv(4, 2)), IMAGE)
    assert places(coupling) == each("conv", 4)


def test_flatten_repeats_channels_over_positions():
    net = nn.Sequential(conv(3, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 2))
    coupling = couple(net, IMAGE)
    assert places(coupling) == each("0", 2) + each("3", 4)
    assert axis(coupling, "3.weight", 1) == [0] * 9 + [1] * 9
    assert coupling.consumers == {("3.weight", 1), ("5.weight", 1)}


def test_linear_over_tokens():
    coupling = couple(nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)), torch.randn(2, 5, 6))
    assert places(coupling) == each("0", 4)
    assert frozen(coupling) == {("model input", "0"), ("model output", "")}


def test_option_a_shortcut_frees_only_what_it_pads():
    def apply(net, x):
        x = net.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return net.head(net.conv(x) + short)

    coupling = couple(Net(apply, stem=conv(3, 2), conv=conv(2, 4, stride=2), head=conv(4, 2)), IMAGE)
    assert places(coupling) == [(("stem", c), ("conv", c + 1)) for c in range(2)]
    assert axis(coupling, "head.weight", 1) == [-1, 0, 1, -1]


def test_a_layer_called_twice_ties_its_channels():
    def apply(net, x):
        return net.head(net.shared(net.shared(net.stem(x)).relu()).relu())

    coupling = couple(Net(apply, stem=conv(3, 4), shared=conv(4, 4), head=conv(4, 2)), IMAGE)
    assert places(coupling) == [(("stem", c), ("shared", c)) for c in range(4)]


def test_a_shared_weight_appears_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    coupling = couple(net, torch.randn(2, 4))
    assert not coupling.units  # its inputs are the model's
    assert ("2.weight", 0) not in coupling.axes


def test_pixel_shuffle():
    coupling = couple(nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 2)), IMAGE)
    assert places(coupling) == [tuple(("0", 4 * c + j) for j in range(4)) for c in range(2)]
    coupling = couple(nn.Sequential(conv(3, 2), nn.PixelUnshuffle(2), conv(8, 2)), IMAGE)
    assert axis(coupling, "2.weight", 1) == [0] * 4 + [1] * 4


def test_group_normalisation_goes_by_whole_groups():
    net = nn.Sequential(conv(3, 6), nn.GroupNorm(3, 6), nn.ReLU(), conv(6, 2))
    coupling = couple(net, IMAGE)
    assert places(coupling) == [(("1", 2 * g), ("1", 2 * g + 1)) for g in range(3)]
    assert axis(coupling, "0.weight", 0) == axis(coupling, "1.bias", 0) == axis(coupling, "3.weight", 1)
    assert {key: units.tolist() for key, units in coupling.attributes.items()} == {("1", "num_groups"): [0, 1, 2]}


@pytest.mark.parametrize(
    ("layer", "operation"),
    [
        (nn.Softmax(1), "aten._softmax.default"),
        (nn.GroupNorm(1, 4), "aten.native_group_norm.default"),
        (nn.LayerNorm((4, 8, 8)), "aten.native_layer_norm.default"),
        (nn.LocalResponseNorm(2), "aten.avg_pool3d.default"),
    ],
)
def test_what_mixes_channels_freezes_them_by_name(layer, operation):
    coupling = couple(nn.Sequential(conv(3, 4), layer, conv(4, 2)), IMAGE)
    assert not coupling.units
    assert (operation, "1") in frozen(coupling)
    assert operation in coupling.report()


def test_an_unknown_operation_freezes_and_is_named():
    coupling = couple(
        Net(lambda net, x: net.head(torch.cdist(net.a(x), net.b(x))), a=conv(3, 4), b=conv(3, 4), head=conv(4, 2)),
        IMAGE,
    )
    assert not coupling.units
    assert any("cdist" in operation for operation, _ in frozen(coupling))


def test_constants_that_meet_channels_freeze_them():
    scale = torch.randn(1, 4, 1, 1)
    coupling = couple(Net(lambda net, x: net.head(net.conv(x) * scale), conv=conv(3, 4), head=conv(4, 2)), IMAGE)
    assert not coupling.units
    assert ("aten.mul.Tensor", "") in frozen(coupling)


def test_partly_unlabelled_channels_freeze_only_those():
    mask = torch.cat([torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)], 1)

    def apply(net, x):
        return net.head(torch.cat([net.a(x), mask[:, :2]], 1) + net.b(x))

    coupling = couple(Net(apply, a=conv(3, 2), b=conv(3, 4), head=conv(4, 2)), IMAGE)
    assert places(coupling) == [(("a", c), ("b", c)) for c in range(2)]
    assert axis(coupling, "b.weight", 0) == [0, 1, -1, -1]


def test_what_is_added_through_a_view_keeps_its_gate():
    def apply(net, x):
        y = net.a(x)
        y[:, :, 2:] += net.b(x)[:, :, 2:]
        return net.head(y)

    coupling = couple(Net(apply, a=conv(3, 4), b=conv(3, 4), head=conv(4, 2)), IMAGE)
    assert places(coupling) == [(("a", c), ("b", c)) for c in range(4)]


def test_writing_into_an_unlabelled_tensor_freezes():
    def apply(net, x):
        buffer = torch.zeros(1, 4, 8, 8)
        buffer[:, :, :, :] = net.conv(x)
        return net.head(buffer)

    coupling = couple(Net(apply, conv=conv(3, 4), head=conv(4, 2)), IMAGE)
    assert not coupling.units


def test_products_of_activations_freeze_what_they_sum_over():
    def apply(net, x):
        q, k = net.q(x).flatten(2), net.k(x).flatten(2)  # [N, C, T]
        return net.head((q.transpose(1, 2) @ k).unsqueeze(1))

    coupling = couple(Net(apply, q=conv(3, 4), k=conv(3, 4), head=conv(1, 2)), IMAGE)
    assert not coupling.units
    assert ("aten.bmm.default", "") in frozen(coupling)


def test_channels_before_a_functional_norm_have_no_place_for_a_gate():
    def apply(net, x):
        return net.head(F.batch_norm(net.conv(x), None, None, training=True))

    coupling = couple(Net(apply, conv=conv(3, 4), head=conv(4, 2)), IMAGE)
    assert not coupling.units
    assert ("conv.weight", 0) in coupling.ungated
    assert "no place for a gate" in coupling.report()


def test_outputs_of_any_structure_freeze():
    def apply(net, x):
        x = net.conv(x)
        return {"features": [(x,)], "out": net.head(x)}

    assert not couple(Net(apply, conv=conv(3, 4), head=conv(4, 2)), IMAGE).units


@pytest.mark.parametrize("inputs", [(IMAGE, IMAGE), [IMAGE, IMAGE], {"x": IMAGE, "y": IMAGE}])
def test_example_inputs_of_every_form(inputs):
    net = Net(lambda net, x, y: net.head(net.conv(x) + y.mean()), conv=conv(3, 4), head=conv(4, 2))
    assert places(couple(net, inputs)) == each("conv", 4)


class Auxiliary(nn.Module):
    """A head that runs only in training, as googlenet's do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = conv(3, 4), nn.BatchNorm2d(4)
        self.head, self.aux, self.drop = (
            nn.Linear(4, 2),
            nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
            nn.Dropout(0.5),
        )

    def forward(self, x):
        x = self.norm(self.body(x)).mean((2, 3))
        return (self.head(x), self.aux(self.drop(x))) if self.training else self.head(x)


@pytest.mark.parametrize("size", [8, 1], ids=["batch of one trains", "training needs a batch of two"])
def test_training_branches_are_traced_too(size):
    coupling = couple(Auxiliary(), torch.randn(1, 3, size, size))
    assert coupling.trained
    assert places(coupling) == each("norm", 4) + each("aux.0", 3)
    assert axis(coupling, "aux.0.weight", 1) == [0, 1, 2, 3]
    assert not coupling.unreached


def test_unused_parameters_are_named():
    net = Net(lambda net, x: net.head(net.conv(x)), conv=conv(3, 4), head=conv(4, 2), spare=conv(4, 2))
    coupling = couple(net, IMAGE)
    assert coupling.unreached == ("spare.weight", "spare.bias")
    assert axis(coupling, "spare.weight", 1) == [-1] * 4
    assert "spare.weight was not used" in coupling.report()


def test_training_that_fails_is_told():
    def apply(net, x):
        if net.training:
            raise RuntimeError("no labels given")
        return net.head(net.conv(x))

    with pytest.warns(UserWarning, match="no labels given") as caught:
        coupling = couple(Net(apply, conv=conv(3, 4), head=conv(4, 2), spare=conv(1, 1)), IMAGE)
    assert {warning.filename for warning in caught} == {__file__}
    assert places(coupling) == each("conv", 4)


def snapshot(model: nn.Module):
    modes = [m.training for m in model.modules()]
    return modes, {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()


def unchanged(before, model: nn.Module) -> bool:
    modes, state, random = snapshot(model)
    same = all(torch.equal(state[k], v) for k, v in before[1].items())
    return modes == before[0] and same and torch.equal(random, before[2])


def test_the_model_is_left_as_it_was():
    model = Auxiliary().train()
    model.norm.eval()
    model(torch.randn(4, 3, 8, 8))
    before = snapshot(model)
    buffers = [id(b) for b in model.buffers()]
    couple(model, IMAGE)
    assert unchanged(before, model)
    assert buffers == [id(b) for b in model.buffers()]
    assert all(not hasattr(p, "grad") or p.grad is None for p in model.parameters())


def test_a_failing_example_says_where_and_changes_nothing():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(7, 2)).train()
    before = snapshot(model)
    with pytest.raises(ValueError, match="stopped in module '3'"):
        couple(model, IMAGE)
    assert unchanged(before, model)


def test_a_model_without_outputs_is_refused():
    with pytest.raises(ValueError, match="returned no tensor"):
        couple(Net(lambda net, x: None, conv=conv(3, 4)), IMAGE)


def test_uninitialised_parameters_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight is not initialised"):
        couple(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))


def bottleneck() -> nn.Module:
    return nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(4, 4, 3, groups=4), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def test_the_same_model_gives_the_same_units_and_fingerprint():
    net = bottleneck()
    first, second = couple(net, IMAGE), couple(copy.deepcopy(net), torch.randn(2, 3, 8, 8))
    assert places(first) == places(second)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != couple(nn.Sequential(conv(3, 5), conv(5, 2)), IMAGE).fingerprint


def test_conversion_and_layout_change_nothing():
    net = bottleneck()
    plain = couple(net, IMAGE)
    layout = couple(
        copy.deepcopy(net).to(memory_format=torch.channels_last), IMAGE.to(memory_format=torch.channels_last)
    )
    assert couple(convert(net), IMAGE).fingerprint == layout.fingerprint == plain.fingerprint


def test_attached_scores_change_nothing():
    net = convert(bottleneck())
    before = couple(net, IMAGE).fingerprint
    scores = Scores(net, IMAGE)
    assert couple(net, IMAGE).fingerprint == before == scores.coupling.fingerprint


def test_inference_mode_inside_the_model_is_understood():
    net = Net(
        torch.inference_mode()(lambda net, x: net.head(net.conv(x).relu().flatten(1))),
        conv=conv(3, 4),
        head=nn.Linear(256, 2),
    )
    assert places(couple(net, IMAGE)) == each("conv", 4)


def test_costs_are_flops_of_every_contraction():
    net = nn.Sequential(
        conv(3, 4, bias=False), conv(4, 4, 3, groups=4, padding=1), conv(4, 6), nn.Flatten(), nn.Linear(384, 2)
    )
    coupling = couple(net, IMAGE)
    flops = [2 * 3 * 4 * 64, 2 * 9 * 4 * 64, 2 * 4 * 6 * 64, 2 * 384 * 2]
    assert [cost.flops for cost in coupling.costs] == flops
    kept = coupling.keep(torch.tensor([0, 2, 4, 5, 6]))
    assert [cost.flops for cost in kept.costs] == pytest.approx(
        [f * part for f, part in zip(flops, (0.5, 0.5, 0.25, 0.5), strict=True)]
    )


def test_keep_renumbers_everything():
    coupling = couple(nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(256, 3), nn.Linear(3, 2)), IMAGE)
    kept = coupling.keep(torch.tensor([1, 3, 4, 6]))
    assert places(kept) == each("0", 2) + each("2", 2)
    assert kept.dense.tolist() == [1, 3, 4, 6]
    assert axis(kept, "2.weight", 1) == [0] * 64 + [1] * 64
    assert axis(kept, "0.weight", 1) == [-1] * 3
    assert kept.keep(torch.tensor([0, 1, 3])).dense.tolist() == [1, 3, 6]
    assert all(isinstance(cost, Cost) for cost in kept.costs)


def test_alone_couples_nothing():
    layers = {"a": conv(3, 2), "n": nn.BatchNorm2d(2), "t": nn.ConvTranspose2d(2, 3, 1)}
    coupling = Coupling.alone(layers)
    assert places(coupling) == each("a", 2) + each("n", 2) + each("t", 3)
    assert coupling.filters == {("a.weight", 0), ("t.weight", 1)}
    assert axis(coupling, "n.weight", 0) == [2, 3]
