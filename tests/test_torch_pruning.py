"""Torch-Pruning ranks by our scores; where both can couple a network, its groups are our units."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from bench.zoo import torchvision
from taylorkern import Scores, convert, prune
from taylorkern.coupling import couple
from taylorkern.layers import Gated
from tests.networks import plain, randomised, residual
from tests.test_coupling import Net, conv

tp = pytest.importorskip("torch_pruning", reason="not installed: pip install -c constraints.txt -e '.[bench]'")
from taylorkern.integrations.torch_pruning import Importance  # noqa: E402  (imports torch_pruning)

IMAGE = torch.randn(2, 2, 8, 8)
Place = tuple[str, int]


def concatenated() -> nn.Module:
    def apply(net, x):
        x = net.stem(x).relu()
        x = torch.cat([x, net.norm(net.a(x)), net.b(x)], 1)
        return net.head(net.depthwise(x).mean((2, 3)))

    return Net(
        apply,
        stem=conv(2, 4),
        a=conv(4, 3, 3, padding=1),
        norm=nn.BatchNorm2d(3),
        b=conv(4, 5),
        depthwise=conv(12, 12, 3, padding=1, groups=12),
        head=nn.Linear(12, 2),
    )


def transposed() -> nn.Module:
    layers = [conv(2, 4), nn.PReLU(4), nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6), nn.MaxPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(96, 5), nn.ReLU(), nn.Linear(5, 2))


def excited() -> nn.Module:
    def apply(net, x):
        x = net.stem(x)
        gate = torch.sigmoid(net.up(net.down(x.mean((2, 3), keepdim=True)).relu()))
        return net.head((x * gate).mean((2, 3)))

    return Net(apply, stem=conv(2, 6), down=conv(6, 2), up=conv(2, 6), head=nn.Linear(6, 2))


def zoo(name: str):
    return lambda: torchvision().models.get_model(name, weights=None)


SMALL = {"residual": residual, "plain": plain, "concat": concatenated, "transposed": transposed, "excite": excited}
LARGE = ["resnet18", "resnet50", "vgg11_bn", "densenet121", "mobilenet_v2", "efficientnet_b0"]
NETWORKS = SMALL | {name: zoo(name) for name in LARGE}


def example(name: str) -> Tensor:
    return IMAGE if name in SMALL else torch.randn(1, 3, 64, 64)


def theirs(model: nn.Module, x: Tensor) -> set[frozenset[Place]]:
    """Every index of every group of Torch-Pruning, as the output channels that go with it."""
    graph = tp.DependencyGraph().build_dependency(model, x)
    names = {module: name for name, module in model.named_modules()}
    together: dict[Place, Place] = {}

    def root(place: Place) -> Place:
        while together.setdefault(place, place) != place:
            place = together[place]
        return place

    for group in graph.get_all_groups():
        for item in group:
            name = names.get(item.dep.target.module)
            if name is None or not graph.is_out_channel_pruning_fn(item.dep.handler):
                continue
            for index, of in zip(item.idxs, item.root_idxs, strict=True):
                together[root((name, index))] = root((names[group[0].dep.target.module], of))
    sets: dict[Place, set[Place]] = {}
    for place in together:
        sets.setdefault(root(place), set()).add(place)
    return {frozenset(places) for places in sets.values()}


def ours(coupling) -> set[frozenset[Place]]:
    """Every unit, as the output channels that belong to it."""
    sets: list[set[Place]] = [set() for _ in coupling.units]
    for name, units in coupling.outputs.items():
        for channel, unit in enumerate(units.tolist()):
            if unit >= 0:
                sets[unit].add((name, channel))
    return {frozenset(places) for places in sets}


def compared(model: nn.Module, x: Tensor):
    """Our units, their groups, and the channels that we freeze."""
    coupling = couple(model, x)
    groups = {frozenset(place for place in group if place[0] in coupling.outputs) for group in theirs(model, x)}
    frozen = {(layer, c) for layer, of in coupling.outputs.items() for c, unit in enumerate(of.tolist()) if unit < 0}
    return ours(coupling), groups, frozen


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_units(name):
    units, groups, frozen = compared(NETWORKS[name]().eval(), example(name))
    assert units and units <= groups
    # Besides the units they would cut what we freeze: the network's outputs.
    assert frozenset().union(*(groups - units)) == frozen


def test_they_cut_within_groups_of_a_convolution_and_we_whole_ones():
    model = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2))
    units, groups, frozen = compared(model, IMAGE)
    assert units == {
        frozenset([("0", 2 * g), ("0", 2 * g + 1), *((layer, 4 * g + j) for layer in "23" for j in range(4))])
        for g in range(2)
    }
    assert groups == {
        *(frozenset([("0", c)]) for c in range(4)),
        *(frozenset([("2", c), ("3", c)]) for c in range(8)),
        *(frozenset([place]) for place in frozen),
    }


def test_they_see_no_branch_that_only_training_runs():
    model = torchvision().models.googlenet(weights=None, init_weights=False).eval()
    units, groups, _ = compared(model, torch.randn(1, 3, 64, 64))
    only_training = {unit for unit in units if all(layer.startswith("aux") for layer, _ in unit)}
    assert units - groups == only_training != set()


def scored(model: nn.Module, x: Tensor, batches: int = 2) -> Scores:
    """Scores of a few minibatches, detached."""
    scores = Scores(model if any(isinstance(m, Gated) for m in model.modules()) else convert(model), x)
    for seed in range(batches):
        torch.manual_seed(seed)
        logits = model(torch.randn(4, *x.shape[1:]))
        nn.functional.cross_entropy(logits, torch.arange(4) % logits.shape[1]).backward()
    model.zero_grad()
    scores.detach()
    return scores


@pytest.fixture(params=["residual", "plain", "concat", "transposed"])
def case(request):
    torch.manual_seed(0)
    model = randomised(SMALL[request.param]())
    return model, scored(model, IMAGE)


def groups_of(model: nn.Module, x: Tensor = IMAGE):
    return list(tp.DependencyGraph().build_dependency(model, x).get_all_groups())


def test_an_index_is_as_important_as_its_unit(case):
    model, scores = case
    importance, names = scores.importance("taylor_fo"), {module: name for name, module in model.named_modules()}
    seen = set()
    for group in groups_of(model):
        found = Importance(scores)(group)
        units = scores.coupling.outputs[names[group[0].dep.target.module]]
        if found is None:
            assert bool((units < 0).all())
            continue
        assert torch.equal(found, importance[units])
        seen.update(units.tolist())
    assert seen == set(range(len(scores.units)))


def test_an_importance_of_some_indices_is_in_their_order(case):
    model, scores = case
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    for group in graph.get_all_groups():
        root, whole = group[0].dep, Importance(scores)(group)
        if whole is not None:
            some = graph.get_pruning_group(root.target.module, root.handler, [2, 0])
            assert torch.equal(Importance(scores)(some), whole[[2, 0]])


def test_their_pruner_takes_the_channels_that_ours_takes(case):
    model, scores = case
    expected, units = copy.deepcopy(model), len(scores.units)
    kept = units - round(0.3 * units)
    prune(expected, IMAGE, scores.importance("taylor_fo"), target=kept / units, of="channels")
    ratio = 1 - (kept + 0.5) / units  # the half is for their rounding
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        IMAGE,
        Importance(scores),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[head],
    )
    pruner.step()
    assert model.eval()(IMAGE).shape == expected.eval()(IMAGE).shape
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_local_pruner_takes_the_least_important_of_every_group(case):
    model, scores = case
    judge = Importance(scores)
    importances = {group[0].dep.target.module: judge(group) for group in groups_of(model)}
    cut = []
    for group in tp.pruner.BasePruner(model, IMAGE, judge, pruning_ratio=0.5).step(interactive=True):
        importance = importances[group[0].dep.target.module]
        count = len(importance) - len(importance) // 2
        assert group[0].idxs == importance.topk(count, largest=False).indices.sort().values.tolist()
        cut.append(group)
        group.prune()
    assert len(cut) == sum(found is not None for found in importances.values())
    assert model(IMAGE).shape[0] == 2


def test_layers_may_carry_their_gates_while_the_graph_is_built():
    torch.manual_seed(0)
    model = residual()
    detached = {str(group) for group in groups_of(model)}
    scores = Scores(convert(model), IMAGE)
    model(IMAGE).square().mean().backward()
    places = theirs(model, IMAGE)
    assert places == theirs(residual(), IMAGE) and len(detached) == len(groups_of(model))
    assert scores.minibatches == 1


def test_a_frozen_group_is_left_alone():
    def apply(net, x):
        x = net.a(x)
        return net.head(torch.cat([x, net.b(x)], 1)), x.mean((2, 3))

    model = Net(apply, a=conv(2, 3), b=conv(3, 4), head=conv(7, 2))
    scores = Scores(convert(model), IMAGE)
    model(IMAGE)[0].square().mean().backward()
    scores.detach()
    judged = {
        names: Importance(scores)(group)
        for group in groups_of(model)
        if (names := next(name for name, m in model.named_modules() if m is group[0].dep.target.module))
    }
    assert judged["a"] is None and judged["head"] is None
    assert torch.equal(judged["b"], scores.importance("taylor_fo"))


def test_an_index_with_a_frozen_channel_is_infinite():
    def apply(net, x):
        y = net.b(x)
        return net.head(net.depthwise(torch.cat([net.a(x), y], 1))), y.mean((2, 3))

    model = Net(apply, a=conv(2, 3), b=conv(2, 2), depthwise=conv(5, 5, groups=5), head=conv(5, 2))
    scores = Scores(convert(model), IMAGE)
    model(IMAGE)[0].square().mean().backward()
    scores.detach()
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    found = Importance(scores)(graph.get_pruning_group(model.depthwise, tp.prune_conv_out_channels, [4, 2, 0, 1, 3]))
    assert torch.equal(found[1:4], scores.importance("taylor_fo")[[2, 0, 1]])
    assert bool(found[[0, 4]].isinf().all())


def test_a_group_that_names_channels_which_are_not_there_is_left_alone_with_a_warning():
    """They don't see how wide the model's input is that is concatenated here."""

    def apply(net, x):
        return net.head(net.depthwise(torch.cat([net.a(x), x], 1)))

    model = Net(apply, a=conv(2, 3), depthwise=conv(5, 5, groups=5), head=conv(5, 2))
    scores = Scores(convert(model), IMAGE)
    model(IMAGE).square().mean().backward()
    scores.detach()
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    group = graph.get_pruning_group(model.depthwise, tp.prune_conv_out_channels, list(range(5)))
    with pytest.warns(UserWarning, match="couples channel 4 of a, which has 3"):
        assert Importance(scores)(group) is None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 12) for _ in range(3))
        self.project, self.head, self.gamma = nn.Linear(12, 6), nn.Linear(6, 3), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, -1, 4).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v  # [N, heads, T, 4]
        return self.head((x + self.gamma * self.project(y.transpose(1, 2).reshape(n, t, -1))).mean(1))


def test_heads_go_in_the_order_of_our_units():
    torch.manual_seed(0)
    attention, x = Attention(), torch.randn(4, 5, 7)
    model = nn.Sequential(nn.Linear(7, 6), attention)
    scores = scored(model, x)
    heads = scores.coupling.outputs["1.value"]
    least = scores.importance("taylor_fo")[heads.view(3, 4)[:, 0]].argmin()
    layers = (attention.query, attention.key, attention.value)
    weight = attention.value.bias.detach().view(3, 4)[[h for h in range(3) if h != least]]
    tp.pruner.BasePruner(
        model,
        x,
        Importance(scores),
        pruning_ratio=0.3,
        num_heads=dict.fromkeys(layers, 3),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.3,
        ignored_layers=[attention.head, model[0]],
    ).step()
    assert torch.equal(attention.value.bias.view(2, 4), weight)
    assert model(x).shape == (4, 3)


@pytest.mark.parametrize("inner", [conv(4, 8, 3, groups=2), nn.GroupNorm(2, 4)], ids=["convolution", "normalisation"])
def test_groups_within_layers_are_left_alone_with_a_warning(inner):
    width = getattr(inner, "out_channels", 4)
    model = nn.Sequential(conv(2, 4), inner, nn.ReLU(), conv(width, 3), nn.ReLU(), conv(3, 2))
    scores = Scores(convert(model), IMAGE)
    model(IMAGE).square().mean().backward()
    found = {}
    for group in groups_of(model):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[len(group[0].idxs)] = Importance(scores)(group), [str(w.message) for w in caught]
    assert found[4][0] is None and "1 goes by groups" in found[4][1][0]
    assert found[3][0] is not None and not found[3][1]


def test_scores_of_another_model_are_refused():
    scores = scored(residual(), IMAGE)
    with pytest.raises(ValueError, match="the scores are of another model: the group holds Linear"):
        Importance(scores)(groups_of(residual())[0])


def test_scores_from_before_a_cut_are_refused():
    model = residual()
    scores = scored(model, IMAGE)
    pruner = tp.pruner.BasePruner(model, IMAGE, Importance(scores), pruning_ratio=0.5, iterative_steps=2)
    pruner.step()
    with pytest.raises(ValueError, match="was cut since these scores were made"):
        pruner.step()
    pruner.importance = Importance(scored(model, IMAGE))
    pruner.current_step = 1
    pruner.step()
    assert model(IMAGE).shape == (2, 5)


def test_an_unknown_criterion_is_refused_as_by_the_scores():
    model = residual()
    with pytest.raises(ValueError, match="taylor_x"):
        Importance(scored(model, IMAGE), "taylor_x")(groups_of(model)[1])
