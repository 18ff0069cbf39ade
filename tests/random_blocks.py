"""What random networks are made of: the registry of blocks, and those that work on images and on tokens alike."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS: dict[str, dict[str, type["Block"]]] = {"image": {}, "tokens": {}}
WIDEST = 20


class Options:
    """Small numbers read one by one, each choosing among some; where they run out, the first is chosen."""

    def __init__(self, picks: tuple[int, ...]) -> None:
        self._picks = iter(picks)

    def pick(self, *choices):
        return choices[next(self._picks, 0) % len(choices)]

    def width(self) -> int:
        return self.pick(4, 6, 2, 8, 3, 12, 5)


class Block(nn.Module):
    """Channels → ``out`` channels at the same positions, along dimension 1 of images and the last of tokens."""

    inner: ClassVar[tuple[str, ...]] = ()  # what each branch works on; "" stands for what the block works on
    top: ClassVar[bool] = False  # changes the positions, so that it may stand in no branch
    fixes_positions = False  # this one's code or parameters hold the number of positions

    def __init__(self, where: str, c: int, positions: int, options: Options, branches: tuple) -> None:
        super().__init__()
        self.where, self.out, self.positions, self.plans = where, c, positions, branches
        self.make(c, options)

    def make(self, c: int, options: Options) -> None:
        raise NotImplementedError

    @property
    def along(self) -> int:
        return 1 if self.where == "image" else -1

    def branch(self, i: int, c: int) -> "Chain":
        where = self.inner[i] or self.where
        return Chain(where, c, self.positions, self.plans[i] if i < len(self.plans) else ())

    def point(self, i: int, o: int, bias: bool = True) -> nn.Module:
        """A layer that mixes channels only."""
        return nn.Conv2d(i, o, 1, bias=bias) if self.where == "image" else nn.Linear(i, o, bias=bias)

    def row(self, c: int) -> tuple[int, ...]:
        """The shape of one number per channel."""
        return (c, 1, 1) if self.where == "image" else (c,)


class Chain(nn.Module):
    """Blocks one after another; one that grew too wide is followed by a narrowing layer."""

    def __init__(self, where: str, c: int, positions: int, plans: tuple) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for kind, picks, branches in plans:
            block = KINDS[where][kind](where, c, positions, Options(picks), branches)
            self.blocks.append(block)
            c, positions = block.out, block.positions
            if c > WIDEST:
                self.blocks.append(block.point(c, 6))
                c = 6
        self.out, self.positions = c, positions

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def kind(*wheres: str):
    """Register a block under its class's name."""

    def register(block: type[Block]) -> type[Block]:
        for where in wheres:
            KINDS[where][block.__name__] = block
        return block

    return register


anywhere = kind("image", "tokens")


class ChannelsFirst(nn.Module):
    """A normalisation of the last dimension, applied to dimension 1."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class Swapped(nn.Module):
    """A layer of [N, C, T], applied to tokens [N, T, C]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


def groups_of(c: int, options: Options) -> int:
    return options.pick(*[g for g in range(2, c + 1) if c % g == 0], 1)


def norm(where: str, c: int, options: Options) -> nn.Module:
    groups = groups_of(c, options) if c > 1 else 1
    if where == "image":
        return options.pick(
            nn.Identity(),
            nn.BatchNorm2d(c),
            nn.GroupNorm(groups, c),
            nn.GroupNorm(1, c),
            ChannelsFirst(nn.LayerNorm(c)),
            nn.InstanceNorm2d(c, affine=True),
            nn.GroupNorm(c, c),
            nn.InstanceNorm2d(c),
            ChannelsFirst(nn.RMSNorm(c)),
            nn.BatchNorm2d(c, affine=False),
            nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
        )
    return options.pick(
        nn.Identity(),
        nn.LayerNorm(c),
        nn.RMSNorm(c),
        Swapped(nn.BatchNorm1d(c)),
        Swapped(nn.GroupNorm(groups, c)),
        nn.LayerNorm(c, elementwise_affine=False),
        nn.LayerNorm(c, bias=False),
    )


def activation(where: str, c: int, options: Options) -> nn.Module:
    prelu = nn.PReLU(c) if where == "image" else nn.PReLU()
    return options.pick(
        nn.Identity(), nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Sigmoid(), prelu, nn.Softplus()
    )  # fmt: skip


@anywhere
class Point(Block):
    """A layer, a normalisation, an activation, dropout."""

    def make(self, c, options):
        self.out = options.width()
        self.layer = self.point(c, self.out, options.pick(True, False))
        self.norm = norm(self.where, self.out, options)
        self.activation = activation(self.where, self.out, options)
        self.dropout = nn.Dropout(options.pick(0.0, 0.1))

    def forward(self, x):
        return self.dropout(self.activation(self.norm(self.layer(x))))


@anywhere
class Normalised(Block):
    def make(self, c, options):
        self.norm, self.activation = norm(self.where, c, options), activation(self.where, c, options)

    def forward(self, x):
        return self.norm(x + 0) if isinstance(self.norm, nn.Identity) else self.activation(self.norm(x))


def in_place(a: Tensor, b: Tensor) -> Tensor:
    a = a + 0  # never the caller's own tensor
    a += b
    return a


JOINED = {
    "add": torch.add,
    "in place": in_place,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "maximum": torch.maximum,
    "weighted": lambda a, b: torch.add(a, b, alpha=0.5),
    "where": lambda a, b: torch.where(b > 0, a, b),
    "stack": lambda a, b: torch.stack([a, b]).sum(0),
    "gate": lambda a, b: a * torch.sigmoid(b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.25),
    "masked": lambda a, b: a.masked_fill(b > 0.5, 0.0),
    "divide": lambda a, b: a / (1 + b.abs()),
    "constant": lambda a, b: a * 0.5 + b - 1.5,
}


@anywhere
class Residual(Block):
    """A branch joined with a shortcut, which is projected where the widths differ."""

    inner = ("", "")

    def make(self, c, options):
        self.join = options.pick(*JOINED)
        self.body = self.branch(0, c)
        self.out = self.body.out
        projected = options.pick(False, True) or self.out != c
        self.shortcut = self.point(c, self.out, bias=False) if projected else nn.Identity()
        self.norm = norm(self.where, self.out, options)

    def forward(self, x):
        return self.norm(JOINED[self.join](self.shortcut(x), self.body(x)))


@anywhere
class Dense(Block):
    """Branches and the block's input concatenated, in some order, some twice."""

    inner = ("", "")

    def make(self, c, options):
        self.a, self.b = self.branch(0, c), self.branch(1, c)
        self.order = options.pick("xa", "xab", "ax", "bxa", "xx", "aba", "axa", "ab", "bbx")
        widths = {"x": c, "a": self.a.out, "b": self.b.out}
        self.out = sum(widths[part] for part in self.order)

    def forward(self, x):
        parts = {"x": x, "a": self.a(x), "b": self.b(x)}
        return torch.cat([parts[part] for part in self.order], self.along)


@anywhere
class Split(Block):
    """The channels in two parts that go different ways and come together again."""

    inner = ("", "")

    def make(self, c, options):
        self.way = options.pick("chunk", "split", "slices", "strided", "unequal", "baked", "narrow", "unbind", "three")
        self.width = options.pick(4, 6, 2, 8)
        self.layer = self.point(c, self.width if self.way != "three" else 6)
        sizes = {"unequal": (1, self.width - 1), "three": (2, 2)}.get(self.way, (self.width // 2, self.width // 2))
        self.a, self.b = self.branch(0, sizes[0]), self.branch(1, sizes[1])
        self.end = options.pick("cat", "reversed", "join")
        if self.end == "join" and self.a.out != self.b.out:
            self.b = nn.Sequential(self.b, self.point(self.b.out, self.a.out))
            self.b.out = self.a.out
        self.join = options.pick("add", "gate", "multiply", "maximum")
        self.out = self.a.out if self.end == "join" else self.a.out + self.b.out

    def parts(self, x):
        along, half = self.along % x.dim(), self.width // 2
        if self.way == "strided":
            return (x[:, ::2], x[:, 1::2]) if self.where == "image" else (x[..., ::2], x[..., 1::2])
        if self.way == "slices":
            middle = x.shape[along] // 2
            return x.narrow(along, 0, middle), x.narrow(along, middle, x.shape[along] - middle)
        if self.way == "narrow":
            return (x[:, :half], x[:, half:]) if self.where == "image" else (x[..., :half], x[..., half:])
        if self.way == "unbind":
            return x.unflatten(along, (2, -1)).unbind(along)
        return {
            "chunk": lambda: x.chunk(2, along),
            "split": lambda: x.split(x.shape[along] // 2, along),
            "unequal": lambda: x.split([1, x.shape[along] - 1], along),
            "baked": lambda: x.split([half, half], along),
            "three": lambda: x.chunk(3, along)[:2],
        }[self.way]()

    def forward(self, x):
        a, b = self.parts(self.layer(x))
        a, b = self.a(a), self.b(b)
        if self.end == "join":
            return JOINED[self.join](a, b)
        return torch.cat([a, b] if self.end == "cat" else [b, a], self.along)


@anywhere
class Gated(Block):
    """GLU and its relatives."""

    def make(self, c, options):
        self.out, self.way = options.width(), options.pick("glu", "chunk", "swiglu", "two", "module")
        self.layer = self.point(c, self.out if self.way == "two" else 2 * self.out)
        self.gate = self.point(c, self.out) if self.way == "two" else nn.GLU(self.along)
        self.activation = options.pick(nn.Sigmoid(), nn.Identity(), nn.GELU(), nn.Tanh())

    def forward(self, x):
        y = self.layer(x)
        if self.way == "two":
            return self.activation(self.gate(x)) * y
        if self.way in ("glu", "module"):
            return self.gate(y) if self.way == "module" else F.glu(y, self.along)
        a, b = y.chunk(2, self.along)
        return F.silu(a) * b if self.way == "swiglu" else a * self.activation(b)


@anywhere
class Scaled(Block):
    """Numbers per channel: learned, kept in a buffer, or in none."""

    inner = ("",)

    def make(self, c, options):
        self.body = self.branch(0, c)
        self.out = self.body.out
        self.way = options.pick("parameter", "bias", "buffer", "both", "constant", "unlearned", "broadcast")
        shape = self.row(self.out)
        if self.way == "broadcast":
            shape = (1, *shape) if self.where == "image" else (1, 1, *shape)
        self.weight = nn.Parameter(torch.ones(shape))
        self.register_buffer("offset", torch.zeros(shape))
        if self.way == "unlearned":
            self.weight.requires_grad_(False)

    def forward(self, x):
        x = self.body(x)
        if self.way == "constant":  # has no name that surgery could cut
            return x + torch.linspace(0, 1, self.out, dtype=x.dtype).view(self.row(self.out))
        if self.way in ("bias", "buffer"):
            return x + (self.weight if self.way == "bias" else self.offset)
        return x * self.weight + (self.offset if self.way == "both" else 0)


TIED = {
    "transposed": lambda y, weight: y @ weight,
    "linear": F.linear,
    "between": lambda y, weight: y @ weight.t(),
}


@anywhere
class Shared(Block):
    """One module called twice, or two whose weight is one parameter."""

    inner = ("",)

    def make(self, c, options):
        self.way = options.pick("again", "two inputs", "tied", "transposed", "linear", "between")
        self.body = self.branch(0, c)
        self.close = self.point(self.body.out, c)
        self.tied = self.point(c, c)
        if self.way == "tied":
            self.other = self.point(c, c)
            self.other.weight = self.tied.weight

    def once(self, x):
        return self.close(self.body(x))

    def forward(self, x):
        if self.way == "again":
            return self.once(self.once(x))
        if self.way == "two inputs":
            return self.once(x) + self.once(-x)
        y = self.tied(self.once(x))
        if self.way == "tied":
            return self.other(F.relu(y))
        weight = self.tied.weight.flatten(1)
        y = y.movedim(self.along, -1)
        y = {
            "transposed": lambda: y @ weight,
            "linear": lambda: F.linear(y, weight),
            "between": lambda: y @ weight.t(),
        }[self.way]()
        return y.movedim(-1, self.along)


MIXING = {
    "softmax": lambda x, d: x.softmax(d),
    "centred": lambda x, d: x - x.mean(d, keepdim=True),
    "normalised": lambda x, d: F.normalize(x, dim=d),
    "cumulative": lambda x, d: x.cumsum(d),
    "sorted": lambda x, d: x.sort(d).values,
    "largest": lambda x, d: x - x.amax(d, keepdim=True),
    "rolled": lambda x, d: x + x.roll(1, d),
    "flipped": lambda x, d: x + x.flip(d),
    "turned": lambda x, d: x.flip(d),
    "norm": lambda x, d: x / (1 + x.norm(dim=d, keepdim=True)),
    "log softmax": lambda x, d: x.log_softmax(d),
    "variance": lambda x, d: x / (1 + x.var(d, keepdim=True, unbiased=False)),
    "summed": lambda x, d: x * torch.sigmoid(x.sum(d, keepdim=True)),
    "top": lambda x, d: x * (x >= x.topk(2, d).values.amin(d, keepdim=True)),
    "difference": lambda x, d: F.pad(x.diff(dim=d), (0, 0, 0, 0, 0, 1) if d == 1 and x.dim() == 4 else (0, 1)),
}


@anywhere
class Mixed(Block):
    """What makes channels depend on one another."""

    def make(self, c, options):
        self.layer = self.point(c, options.pick(4, 6, 3))
        self.out = self.layer.weight.shape[0]
        self.way = options.pick(*MIXING)

    def forward(self, x):
        return MIXING[self.way](self.layer(x), self.along)


@anywhere
class Picked(Block):
    """Channels taken by number."""

    def make(self, c, options):
        self.way = options.pick("index", "select", "parameter", "gather")
        self.register_buffer("order", torch.randperm(c))

    def forward(self, x):
        if self.way == "select":
            return x.index_select(self.along, self.order)
        if self.way == "gather":
            return x.gather(self.along, self.order.view(self.row(-1)).expand_as(x))
        return x[:, self.order] if self.where == "image" else x[..., self.order]


@anywhere
class Mixture(Block):
    """Two branches weighted by the softmax of two numbers per position or of two parameters."""

    inner = ("", "")

    def make(self, c, options):
        self.a, self.b = self.branch(0, c), self.branch(1, c)
        self.out = self.a.out
        self.match = self.point(self.b.out, self.out) if self.b.out != self.out else nn.Identity()
        self.way = options.pick("router", "parameters", "stacked")
        self.router = self.point(c, 2)
        self.weights = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        a, b = self.a(x), self.match(self.b(x))
        if self.way == "parameters":
            w = self.weights.softmax(0)
            return w[0] * a + w[1] * b
        w = self.router(x).softmax(self.along)
        if self.way == "router":
            first, second = w.split(1, self.along)
            return first * a + second * b
        return (torch.stack([a, b], self.along % a.dim()) * w.unsqueeze(self.along % a.dim() + 1)).sum(
            self.along % a.dim()
        )


@anywhere
class Trained(Block):
    """A branch that only training runs."""

    inner = ("",)

    def make(self, c, options):
        self.body = self.branch(0, c)
        self.close = self.point(self.body.out, c)

    def forward(self, x):
        return x + self.close(self.body(x)) if self.training else x
