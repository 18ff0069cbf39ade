"""Blocks of random networks on tokens [N, T, C]. Each keeps the number of tokens, but for those at the top."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_blocks import Block, Swapped, activation, groups_of, kind, norm

tokens = kind("tokens")


@tokens
class Mlp(Block):
    """Two layers with a normalisation before and a residual around them."""

    def make(self, c, options):
        hidden = options.pick(6, 4, 8, 3)
        self.norm = norm("tokens", c, options)
        self.up, self.down = nn.Linear(c, hidden), nn.Linear(hidden, c)
        self.activation = activation("tokens", hidden, options)
        self.inner_norm = norm("tokens", hidden, options)
        self.way = options.pick("residual", "plain", "rows", "einsum")

    def forward(self, x):
        y = self.norm(x)
        if self.way == "rows":
            n, t, c = x.shape
            return self.down(self.activation(self.up(y.reshape(-1, c)))).view(n, t, -1)
        if self.way == "einsum":
            y = torch.einsum("btc,hc->bth", y, self.up.weight) + self.up.bias
            return x + torch.einsum("bth,ch->btc", self.activation(y), self.down.weight)
        y = self.down(self.inner_norm(self.activation(self.up(y))))
        return x + y if self.way == "residual" else y


@tokens
class Module(Block):
    """torch's own attention."""

    inner = ("",)

    def make(self, c, options):
        heads, d = options.pick(2, 1, 3), options.pick(2, 3, 4)
        width = heads * d
        self.way = options.pick("self", "cross", "widths")
        self.first, self.weights = options.pick(True, False), options.pick(False, True)
        self.enter = nn.Linear(c, width)
        self.memory = self.branch(0, c)
        other = self.memory.out
        if self.way == "cross":
            self.match = nn.Linear(other, width)
        widths = {"kdim": other, "vdim": other} if self.way == "widths" else {}
        bias = options.pick(True, False)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=self.first, bias=bias, **widths)
        self.out = width

    def forward(self, x):
        q = self.enter(x)
        k = {"self": lambda: q, "cross": lambda: self.match(self.memory(x)), "widths": lambda: self.memory(x)}
        k = k[self.way]()
        if self.first:
            return self.attention(q, k, k, need_weights=self.weights)[0]
        q, k = q.transpose(0, 1), q.transpose(0, 1) if k is q else k.transpose(0, 1)
        return self.attention(q, k, k, need_weights=self.weights)[0].transpose(0, 1)


@tokens
class Encoder(Block):
    """torch's own layers of a transformer, which take a shortcut of their own in evaluation mode."""

    def make(self, c, options):
        heads, d = options.pick(2, 1), options.pick(2, 3)
        self.enter, self.out = nn.Linear(c, heads * d), heads * d
        norm_first, activation = options.pick(False, True), options.pick("relu", "gelu")
        self.layer = nn.TransformerEncoderLayer(
            heads * d, heads, options.pick(6, 4), 0.1, activation, batch_first=True, norm_first=norm_first
        )

    def forward(self, x):
        return self.layer(self.enter(x))


class Heads(Block):
    """What hand-written attention has in common: the product of heads, with all that networks put into it."""

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[N, heads, T, d] each → [N, heads, T, d]."""
        if self.core_way == "function":
            return F.scaled_dot_product_attention(q, k, v)
        if self.core_way == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
            return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        scores = q * self.scale @ k.transpose(-2, -1)
        if self.extra == "causal":
            t = q.shape[2]
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        elif self.extra == "per head":
            scores = scores * self.per_head
        elif self.extra == "bias":
            t = q.shape[2]
            scores = scores + self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        elif self.extra == "plain bias":
            scores = scores + self.plain
        elif self.extra == "talking":
            scores = torch.einsum("bhij,hk->bkij", scores, self.talk)
        return self.dropout(scores.softmax(-1)) @ v

    def prepare(self, heads: int, d: int, options) -> None:
        t = self.positions
        self.num_heads, self.head_dim, self.scale = heads, d, d**-0.5
        self.core_way = options.pick("matmul", "function", "einsum")
        self.extra = options.pick("none", "bias", "per head", "causal", "plain bias", "talking")
        self.merge = options.pick("minus one", "flatten", "width", "input", "literal")
        self.fixes_positions = self.extra in ("bias", "plain bias")
        self.dropout = nn.Dropout(0.1)
        if self.extra == "bias":
            self.table = nn.Parameter(torch.zeros(2 * t - 1, heads))
            steps = torch.arange(t)
            self.register_buffer("index", steps[:, None] - steps[None, :] + t - 1)
        elif self.extra == "plain bias":
            self.plain = nn.Parameter(torch.zeros(heads, t, t))
        elif self.extra == "per head":
            self.per_head = nn.Parameter(torch.ones(heads, 1, 1))
        elif self.extra == "talking":
            self.talk = nn.Parameter(torch.zeros(heads, heads))

    def merged(self, y: Tensor, x: Tensor) -> Tensor:
        """[N, heads, T, d] → [N, T, heads·d]."""
        n, t, c = x.shape
        y = y.transpose(1, 2)
        if self.merge == "flatten":
            return y.flatten(2)
        whole = {
            "minus one": -1,
            "width": self.num_heads * self.head_dim,
            "input": c if c == self.num_heads * self.head_dim else -1,
            "literal": self.all_head_size,
        }
        return y.reshape(n, t, whole[self.merge])


@tokens
class Fused(Heads):
    """One layer for queries, keys and values."""

    def make(self, c, options):
        heads, d = options.pick(2, 4, 3, 1), options.pick(2, 3, 4, 1)
        if options.pick(False, True) and c % heads == 0:
            d = c // heads
        self.all_head_size = heads * d
        self.way = options.pick("unbind", "index", "minus one", "chunk", "inner", "within heads", "split")
        self.qkv = nn.Linear(c, 3 * heads * d, bias=options.pick(True, False))
        self.project = nn.Linear(heads * d, c)
        self.norms = options.pick("none", "layer", "rms", "unit")
        make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(self.norms, lambda d: nn.Identity())
        self.q_norm, self.k_norm = make(d), make(d)
        self.prepare(heads, d, options)

    def parts(self, x):
        n, t, _ = x.shape
        h, d, y = self.num_heads, self.head_dim, self.qkv(x)
        if self.way in ("chunk", "split"):
            thirds = y.chunk(3, -1) if self.way == "chunk" else y.split(y.shape[-1] // 3, -1)
            return [part.view(n, t, h, -1).transpose(1, 2) for part in thirds]
        if self.way == "within heads":
            return [part.transpose(1, 2) for part in y.view(n, t, h, 3 * d).chunk(3, -1)]
        if self.way == "inner":
            return y.reshape(n, t, h, d, 3).permute(4, 0, 2, 1, 3).unbind(0)
        y = y.reshape(n, t, 3, h, -1 if self.way == "minus one" else d).permute(2, 0, 3, 1, 4)
        return (y[0], y[1], y[2]) if self.way == "index" else y.unbind(0)

    def forward(self, x):
        q, k, v = self.parts(x)
        if self.norms == "unit":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return x + self.project(self.merged(self.core(self.q_norm(q), self.k_norm(k), v), x))


@tokens
class Separate(Heads):
    """A layer each for queries, keys and values; keys and values may have fewer heads."""

    inner = ("",)

    def make(self, c, options):
        heads, d = options.pick(2, 4, 1), options.pick(2, 3, 4, 1)
        self.all_head_size = heads * d
        self.way = options.pick("heads", "widths", "both", "literal", "input")
        if self.way == "literal":
            heads, self.all_head_size = 2, 2 * d
        self.shares = options.pick(1, 2, heads) if heads % 2 == 0 else 1  # query heads per key head
        self.sharing = options.pick("interleave", "expand", "repeat")
        self.memory = self.branch(0, c)
        other = self.memory.out
        self.query, self.key = nn.Linear(c, heads * d), nn.Linear(other, heads // self.shares * d)
        self.value = nn.Linear(other, heads // self.shares * d)
        self.project, self.norm = nn.Linear(heads * d, c), norm("tokens", c, options)
        self.prepare(heads, d, options)

    def split(self, y, heads):
        n, t, c = y.shape
        sizes = {
            "heads": (heads, -1),
            "widths": (-1, self.head_dim),
            "both": (heads, self.head_dim),
            "literal": (2 if heads == 2 else heads, -1),
            "input": (heads, c // heads),
        }
        return y.view(n, t, *sizes[self.way]).transpose(1, 2)

    def spread(self, y):
        if self.shares == 1:
            return y
        if self.sharing == "interleave":
            return y.repeat_interleave(self.shares, 1)
        if self.sharing == "repeat":
            return y.repeat(1, self.shares, 1, 1)
        n, h, t, d = y.shape
        return y[:, :, None].expand(n, h, self.shares, t, d).reshape(n, h * self.shares, t, d)

    def forward(self, x):
        memory = self.memory(x)
        q = self.split(self.query(x), self.num_heads)
        k, v = (self.split(layer(memory), self.num_heads // self.shares) for layer in (self.key, self.value))
        return self.norm(x + self.project(self.merged(self.core(q, self.spread(k), self.spread(v)), x)))


@tokens
class Linear1d(Block):
    """Convolutions along the tokens."""

    def make(self, c, options):
        self.way = options.pick("dense", "depthwise", "grouped", "causal")
        self.out = c if self.way == "depthwise" else 2 * options.pick(2, 3, 1)
        groups = {"depthwise": c, "grouped": 2}.get(self.way, 1)
        self.enter = nn.Linear(c, 4) if self.way == "grouped" else nn.Identity()
        into = 4 if self.way == "grouped" else c
        self.layer = Swapped(nn.Conv1d(into, self.out, 3, padding=2 if self.way == "causal" else 1, groups=groups))
        self.norm = norm("tokens", self.out, options)

    def forward(self, x):
        return self.norm(self.layer(self.enter(x))[:, : x.shape[1]])


@tokens
class TokenMixer(Block):
    """Layers over the tokens of every channel."""

    fixes_positions = True

    def make(self, c, options):
        self.up, self.down = nn.Linear(self.positions, 3), nn.Linear(3, self.positions)
        self.norm = norm("tokens", c, options)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x).transpose(1, 2)).relu()).transpose(1, 2)


@tokens
class SpatialGate(Block):
    """Half of the channels weigh the other half after a layer over the tokens, as in gmlp."""

    fixes_positions = True

    def make(self, c, options):
        self.enter, self.leave = nn.Linear(c, 6), nn.Linear(3, c)
        self.mix, self.norm = nn.Linear(self.positions, self.positions), norm("tokens", 3, options)

    def forward(self, x):
        u, v = self.enter(x).chunk(2, -1)
        return x + self.leave(u * self.mix(self.norm(v).transpose(1, 2)).transpose(1, 2))


@tokens
class Alongside(Block):
    """Operations along the tokens."""

    def make(self, c, options):
        self.out = options.width()
        self.layer = nn.Linear(c, self.out)
        self.way = options.pick("mean", "cumulative", "softmax", "rolled", "sorted", "largest", "first", "turned")

    def forward(self, x):
        x = self.layer(x)
        return {
            "mean": lambda: x - x.mean(1, keepdim=True),
            "cumulative": lambda: x.cumsum(1) * 0.1,
            "softmax": lambda: x * x.softmax(1),
            "rolled": lambda: x + x.roll(1, 1),
            "sorted": lambda: x.sort(1).values,
            "largest": lambda: x + x.amax(1, keepdim=True),
            "first": lambda: x + x[:, :1],
            "turned": lambda: x.flip(1),
        }[self.way]()


@tokens
class Recurrent(Block):
    def make(self, c, options):
        self.out = options.pick(3, 4)
        self.layer = options.pick(nn.GRU, nn.LSTM)(c, self.out, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


@tokens
class Reshaped(Block):
    """Channels seen as parts, by numbers in the code or in attributes."""

    def make(self, c, options):
        self.parts = options.pick(2, 3)
        self.out = self.dim = self.parts * options.pick(2, 4, 3)
        self.enter, self.leave = nn.Linear(c, self.dim), nn.Linear(self.dim, self.dim)
        self.inside = nn.Linear(self.dim // self.parts, self.dim // self.parts)
        self.over, self.table = nn.Linear(self.parts, self.parts), nn.Parameter(torch.ones(self.parts, 1))
        self.way = options.pick("parts", "attribute", "inside", "over", "table", "squeezed", "norm", "sum")
        self.norm = nn.GroupNorm(groups_of(self.dim, options), self.dim)

    def forward(self, x):
        n, t, _ = x.shape
        y = self.enter(x)
        if self.way == "attribute":
            return self.leave(y.reshape(-1, self.dim)).view(n, t, self.dim)
        if self.way == "norm":
            return self.leave(self.norm(y.reshape(n * t, -1)).view(n, t, -1))
        y = y.view(n, t, self.parts, -1)
        y = {
            "inside": lambda: self.inside(y),
            "over": lambda: self.over(y.transpose(2, 3)).transpose(2, 3),
            "table": lambda: y * self.table,
            "squeezed": lambda: y * torch.sigmoid(y.mean(2, keepdim=True)),
            "sum": lambda: y + y.sum(2, keepdim=True),
        }.get(self.way, lambda: y.flip(2))()
        return self.leave(y.reshape(n, t, -1))


@tokens
class ModulatedTokens(Block):
    """Shift, scale and gate from the network's second input, as in diffusion transformers."""

    inner = ("",)

    def make(self, c, options):
        self.layer = nn.Linear(3, 3 * c)
        self.norm = nn.LayerNorm(c, elementwise_affine=False) if options.pick(True, False) else nn.Identity()
        self.body = self.branch(0, c)
        self.close = nn.Linear(self.body.out, c)
        self.second: Tensor | None = None

    def forward(self, x):
        shift, scale, gate = self.layer(F.silu(self.second)).unsqueeze(1).chunk(3, -1)
        return x + gate * self.close(self.body(self.norm(x) * (1 + scale) + shift))


@tokens
class ClassToken(Block):
    """One token more."""

    top = True

    def make(self, c, options):
        self.token, self.way = nn.Parameter(torch.zeros(1, 1, c)), options.pick("expand", "repeat", "pool")
        self.positions += 1

    def forward(self, x):
        if self.way == "pool":
            return torch.cat([x.mean(1, keepdim=True), x], 1)
        n = x.shape[0]
        return torch.cat([self.token.expand(n, -1, -1) if self.way == "expand" else self.token.repeat(n, 1, 1), x], 1)


@tokens
class Position(Block):
    """Learned positions, one per token or as many as are needed of more."""

    def make(self, c, options):
        self.way = options.pick("cut", "fixed", "embedding")
        self.fixes_positions = self.way == "fixed"
        self.table = nn.Parameter(torch.zeros(1, self.positions if self.fixes_positions else 64, c))
        self.embedding = nn.Embedding(64, c)

    def forward(self, x):
        if self.way == "embedding":
            return x + self.embedding(torch.arange(x.shape[1]))
        return x + (self.table if self.way == "fixed" else self.table[:, : x.shape[1]])
