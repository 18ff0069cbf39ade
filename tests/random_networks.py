"""Random networks: a plan is plain data, from which a network is built, cut and compared with its masked dense self.

    python -m tests.random_networks 2000 [--seed 3] [--verify] [--kind Fused]

draws that many plans, prints how the cuts ended by kind of block, and the smallest plan of each kind of failure. Cuts
go unverified unless asked otherwise: the coupling itself must be right. ``--kind`` draws only plans with that block.
"""

import argparse
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taylorkern.coupling import Coupling, couple
from taylorkern.example import run, tensors
from taylorkern.state import named_tensors
from taylorkern.surgery import SurgeryError, cut
from tests import random_images, random_tokens  # noqa: F401  (they register their blocks)
from tests.random_blocks import KINDS, Chain, Options

TOLERANCE = 1e-8
LENIENT = {"deadline": None, "suppress_health_check": list(HealthCheck)}
Blocks = tuple[tuple[str, tuple[int, ...], tuple], ...]  # (kind, picks, a chain for each branch)


@dataclass(frozen=True)
class Plan:
    """A network: what it starts from, its chains of blocks on images or tokens, its head, and its random numbers."""

    start: str
    stages: tuple[tuple[str, Blocks], ...]
    picks: tuple[int, ...] = ()
    seed: int = 0

    def kinds(self) -> set[str]:
        return {kind for _, chain in self.stages for kind in _kinds(chain)}


def _kinds(chain: Blocks) -> Iterator[str]:
    for kind, _, branches in chain:
        yield kind
        for branch in branches:
            yield from _kinds(branch)


_picks = st.lists(st.integers(0, 11), max_size=6).map(tuple)


def _chains(where: str, depth: int) -> st.SearchStrategy[Blocks]:
    kinds = [k for k, block in KINDS[where].items() if depth == 2 or not block.top]
    simple = [k for k in kinds if not KINDS[where][k].inner]
    block = st.sampled_from(kinds if depth else simple).flatmap(lambda kind: _block(where, kind, depth))
    return st.lists(block, max_size=3 if depth == 2 else 2).map(tuple)


def _block(where: str, kind: str, depth: int) -> st.SearchStrategy[tuple]:
    inner = KINDS[where][kind].inner if depth else ()
    return st.tuples(st.just(kind), _picks, st.tuples(*(_chains(w or where, depth - 1) for w in inner)))


def plans() -> st.SearchStrategy[Plan]:
    """Every network that can be built."""
    stage = st.sampled_from(["image", "tokens"]).flatmap(lambda w: st.tuples(st.just(w), _chains(w, 2)))
    start = st.sampled_from(["image", "tokens", "ids"])
    return st.builds(Plan, start, st.lists(stage, min_size=1, max_size=2).map(tuple), _picks, st.integers(0, 999))


class Turn(nn.Module):
    """From images to tokens or back."""

    def __init__(self, where: str, c: int, options: Options) -> None:
        super().__init__()
        self.where, self.way = where, options.pick("flatten", "patches", "permute")
        self.patches = self.way == "patches" and where == "tokens"
        self.layer = nn.Conv2d(c, 4, 2, 2) if self.patches else nn.Identity()
        self.out = 4 if self.patches else c

    def sizes(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Height and width, or the number of tokens, behind it."""
        if self.where == "image":
            return (*before, 3)
        return (prod(n // 2 for n in before) if self.patches else prod(before),)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "image":
            return x.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 3)
        x = self.layer(x) if self.patches else x
        return x.permute(0, 2, 3, 1).flatten(1, 2) if self.way == "permute" else x.flatten(2).transpose(1, 2)


class RandomNetwork(nn.Module):
    """What a plan says: a stem, chains with turns between them, a head."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        options = Options(plan.picks)
        self.start, c = plan.start, options.pick(4, 6, 3)
        where = "image" if plan.start == "image" else "tokens"
        self.stem = {"image": nn.Conv2d(2, c, 3, padding=1), "tokens": nn.Linear(3, c), "ids": nn.Embedding(7, c)}[
            plan.start
        ]
        self.stages = nn.ModuleList()
        sizes: tuple[int, ...] = (6, 5) if where == "image" else (6,)
        for stage, chain in plan.stages:
            if stage != where:
                self.stages.append(turn := Turn(stage, c, options))
                where, c, sizes = stage, turn.out, turn.sizes(sizes)
            self.stages.append(built := Chain(where, c, prod(sizes), chain))
            c = built.out
            sizes = (built.positions,) if where == "tokens" else sizes
        self.where = where
        self.way = options.pick("pooled", "flat", "map", "hidden", "first", "tuple", "dict")
        self.fixed = self.way == "flat" or any(getattr(m, "fixes_positions", False) for m in self.modules())
        self.norm = nn.LayerNorm(c) if options.pick(False, True) else nn.Identity()
        self.hidden = nn.Linear(c, 4)
        self.head = nn.Linear({"flat": c * prod(sizes), "hidden": 4}.get(self.way, c), 3)
        self.modulated = [m for m in self.modules() if hasattr(m, "second")]

    def forward(self, x: Tensor, second: Tensor | None = None) -> Any:
        for module in self.modulated:
            module.second = second
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        for module in self.modulated:
            module.second = None
        return self.end(x)

    def end(self, x: Tensor) -> Any:
        if self.way == "flat":
            return self.head(x.flatten(1))
        x = x.permute(0, 2, 3, 1) if self.where == "image" else x
        if self.way == "map":
            return self.head(self.norm(x))
        pooled = self.norm(x.mean((1, 2)) if self.where == "image" else x[:, 0] if self.way == "first" else x.mean(1))
        if self.way == "hidden":
            return self.head(self.hidden(pooled).relu())
        y = self.head(pooled)
        others = {"tuple": lambda: (y, self.hidden(x)), "dict": lambda: {"out": y, "more": [self.hidden(pooled)]}}
        return others[self.way]() if self.way in others else y


def build(plan: Plan) -> tuple[nn.Module, list[Any]]:
    """The network in float64, and inputs: the example, and others of another batch and, where it may be, size."""
    torch.manual_seed(plan.seed)
    model = RandomNetwork(plan).double()
    randomise(model)
    sizes = [(2, 6, 5), (3, 6, 5) if model.fixed else (3, 8, 7), (1, 6, 5)]
    return model, [_inputs(model, *size) for size in sizes]


def _inputs(model: nn.Module, n: int, h: int, w: int) -> Any:
    x = {
        "image": lambda: torch.randn(n, 2, h, w, dtype=torch.float64),
        "tokens": lambda: torch.randn(n, h, 3, dtype=torch.float64),
        "ids": lambda: torch.randint(0, 7, (n, h)),
    }[model.start]()
    return (x, torch.randn(n, 3, dtype=torch.float64)) if model.modulated else x


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Whatever starts as a constant or small is drawn, so that no channel is without effect or like another."""
    for name, tensor in named_tensors(model).items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1 or bool((tensor == tensor.flatten()[:1]).all()):
            tensor.normal_(0, 0.5)


def draw(coupling: Coupling) -> Tensor:
    """10 to 90 % of the units at random, something of every dimension spared."""
    count = len(coupling.units)
    gone = torch.zeros(count + 1, dtype=torch.bool)
    gone[torch.randperm(count)[: max(1, round(float(torch.empty(()).uniform_(0.1, 0.9)) * count))]] = True
    for units in coupling.axes.values():
        if bool(gone[units].all()):
            gone[units[torch.randint(len(units), ())]] = False
    return gone[:-1].nonzero().flatten()


class WrongCutError(AssertionError):
    """A cut that is wrong; ``how`` it went wrong, in a word or two."""

    def __init__(self, how: str, plan: Plan, detail: str) -> None:
        super().__init__(f"{how}: {detail}\n{plan}")
        self.how, self.plan, self.detail = how, plan, detail


@dataclass
class Outcome:
    """How it ended, and how many of the channels of its layers a unit holds."""

    how: str  # "equal", "refused" or "nothing to cut"
    free: int = 0
    channels: int = 0


def examine(plan: Plan, verify: bool, rounds: int = 2) -> Outcome:
    """Couple, cut twice and compare; WrongCutError where anything is wrong."""
    model, inputs = build(plan)
    _told("the network itself fails", plan, lambda: (_outputs(model, inputs), _train(model, inputs[0])))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were not used on the example inputs")
        coupling = _told("couple fails", plan, lambda: couple(model, inputs[0]))
    channels = torch.cat([torch.zeros(0, dtype=torch.int64), *coupling.outputs.values()])
    outcome = Outcome("nothing to cut", int((channels >= 0).sum()), len(channels))
    for _ in range(rounds):
        removed = draw(coupling) if coupling.units else torch.zeros(0)
        if not len(removed):
            break
        after = _cut_and_compare(plan, model, coupling, removed, inputs, verify)
        if after is None:
            return replace(outcome, how="refused")
        coupling, outcome.how = after, "equal"
    return outcome


def _cut_and_compare(
    plan: Plan, model: nn.Module, coupling: Coupling, removed: Tensor, inputs: list[Any], verify: bool
) -> Coupling | None:
    with masked(model, coupling, removed):
        expected = _outputs(model, inputs)
    before = state(model)
    try:
        after = _told("cut fails", plan, lambda: cut(model, coupling, removed, inputs[0], verify=verify))
    except SurgeryError:
        if not same(before, state(model)):
            raise WrongCutError("changed by a refusal", plan, "") from None
        return None
    got = _told("does not run", plan, lambda: _outputs(model, inputs))
    worst = max(difference(a, b) for a, b in zip(expected, got, strict=True))
    if not worst <= TOLERANCE:
        raise WrongCutError("differs", plan, f"by {worst:.1e} of the largest")
    _told("does not train", plan, lambda: _train(model, inputs[0]))
    return after


def _told(how: str, plan: Plan, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (WrongCutError, SurgeryError):
        raise
    except Exception as error:
        raise WrongCutError(how, plan, f"{type(error).__name__}: {error}") from error


def _outputs(model: nn.Module, inputs: list[Any]) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        found = [t for example in inputs for t in tensors(run(model, example))]
    assert all(bool(t.isfinite().all()) for t in found), "the network itself is broken"
    return found


def _train(model: nn.Module, example: Any) -> None:
    """A step forward and backward; statistics and gradients are put back."""
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    model.train()
    sum(t.square().mean() for t in tensors(run(model, example))).backward()
    model.zero_grad()
    for name, tensor in named_tensors(model).items():
        tensor.data.copy_(before[name])


@contextmanager
def masked(model: nn.Module, coupling: Coupling, removed: Tensor) -> Iterator[None]:
    """Within, the weights that consume the units ``removed`` are zero there."""
    named, stays = named_tensors(model), coupling.staying(removed)
    held = {name: named[name].detach().clone() for name, _ in coupling.consumers}
    for name, dim in coupling.consumers:
        named[name].data.index_fill_(dim, (~stays[coupling.axes[name, dim]]).nonzero().flatten(), 0)
    try:
        yield
    finally:
        for name, values in held.items():
            named[name].data.copy_(values)


def difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference relative to the largest magnitude."""
    if expected.shape != got.shape:
        return float("inf")
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1e-3))


def state(model: nn.Module) -> tuple[list[Tensor], list[tuple], list[dict[str, Any]]]:
    """Everything that a refused cut must leave alone."""
    held = list(named_tensors(model).values())
    plain = [{k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple))} for m in model.modules()]
    return [t.detach().clone() for t in held], [(id(t), t.data_ptr(), t.stride()) for t in held], plain


def same(a: Any, b: Any) -> bool:
    return a[1:] == b[1:] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def fails(plan: Plan, verify: bool) -> str:
    """How the plan fails, or nothing."""
    try:
        examine(plan, verify)
    except WrongCutError as failure:
        return failure.how
    return ""


def smaller(plan: Plan) -> Iterator[Plan]:
    """Plans with something left out or made simple."""
    for i, (where, chain) in enumerate(plan.stages):
        if len(plan.stages) > 1:
            yield replace(plan, stages=plan.stages[:i] + plan.stages[i + 1 :])
        for less in _smaller_chains(chain):
            yield replace(plan, stages=(*plan.stages[:i], (where, less), *plan.stages[i + 1 :]))
    yield from (replace(plan, picks=less) for less in _smaller_picks(plan.picks))
    if plan.seed:
        yield replace(plan, seed=0)


def _smaller_chains(chain: Blocks) -> Iterator[Blocks]:
    for i, (kind, picks, branches) in enumerate(chain):
        yield chain[:i] + chain[i + 1 :]
        for k, branch in enumerate(branches):
            others = [(kind, picks, (*branches[:k], less, *branches[k + 1 :])) for less in _smaller_chains(branch)]
            yield from ((*chain[:i], block, *chain[i + 1 :]) for block in others)
        yield from ((*chain[:i], (kind, less, branches), *chain[i + 1 :]) for less in _smaller_picks(picks))


def _smaller_picks(picks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if picks:
        yield picks[:-1]
    yield from ((*picks[:i], 0, *picks[i + 1 :]) for i, pick in enumerate(picks) if pick)


def shrunk(plan: Plan, verify: bool) -> Plan:
    """The smallest plan that can be reached and fails in the same way."""
    how = fails(plan, verify)
    while less := next((p for p in smaller(plan) if fails(p, verify) == how), None):
        plan = less
    return plan


def survey(count: int, first: int, verify: bool, kind: str | None = None) -> tuple[Counter, dict, list[WrongCutError]]:
    """``count`` plans: how they end, how they end by kind of block, and the failures."""
    totals: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    failures: list[WrongCutError] = []
    wanted = plans() if kind is None else plans().filter(lambda plan: kind in plan.kinds())

    @seed(first)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    @given(wanted)
    def each(plan: Plan) -> None:
        try:
            outcome = examine(plan, verify)
        except WrongCutError as failure:
            failures.append(failure)
            outcome = Outcome(failure.how)
        totals[outcome.how] += 1
        for name in plan.kinds():
            by_kind[name][outcome.how] += 1
            by_kind[name]["free"] += outcome.free
            by_kind[name]["channels"] += outcome.channels

    each()
    return totals, by_kind, failures


def smallest(failures: list[WrongCutError], count: int) -> list[WrongCutError]:
    """Of each way to fail the ``count`` smallest plans."""
    ranked = sorted(failures, key=lambda failure: len(str(failure.plan)))
    return [f for how in sorted({f.how for f in ranked}) for f in [f for f in ranked if f.how == how][:count]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verify", action="store_true", help="let surgery verify its cuts")
    parser.add_argument("--kind", help="only plans with this block")
    parser.add_argument("--show", type=int, default=3, help="of each way to fail, how many are made small and printed")
    parser.add_argument("--how", default="", help="print only failures whose name holds this, such as differs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    totals, by_kind, failures = survey(options.count, options.seed, options.verify, options.kind)
    for name, counts in sorted(by_kind.items()):
        free = counts.pop("free") / max(1, counts.pop("channels"))
        print(f"{name:16} {free:4.0%} free  " + "  ".join(f"{how} {n}" for how, n in counts.most_common()))
    print("  ".join(f"{how}: {n}" for how, n in totals.most_common()), flush=True)
    for failure in smallest(failures, options.show):
        if options.how in failure.how:
            print(f"\n{failure.how}: {failure.detail}\n{shrunk(failure.plan, options.verify)}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
