"""Blocks of random networks on images [N, C, H, W]. Each keeps height and width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_blocks import Block, activation, groups_of, kind, norm

image = kind("image")


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:])


@image
class Conv(Block):
    """A convolution, a normalisation, an activation."""

    def make(self, c, options):
        self.out = options.width()
        way = options.pick("same", "strided", "padded", "dilated", "circular", "upsampled", "pooled")
        padding = {"padded": 0, "dilated": 2}.get(way, 1)
        mode = "circular" if way == "circular" else "zeros"
        self.layer = nn.Conv2d(
            c,
            self.out,
            3,
            stride=2 if way in ("strided", "upsampled") else 1,
            padding=padding,
            dilation=2 if way == "dilated" else 1,
            padding_mode=mode,
            bias=options.pick(True, False),
        )
        self.before = {"padded": nn.ReflectionPad2d(1), "upsampled": nn.Upsample(scale_factor=2)}.get(
            way, nn.Identity()
        )
        self.after = options.pick(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)) if way == "pooled" else nn.Identity()
        self.norm = norm("image", self.out, options)
        self.activation = activation("image", self.out, options)
        self.dropout = options.pick(nn.Identity(), nn.Dropout2d(0.1))

    def forward(self, x):
        y = self.dropout(self.activation(self.norm(self.layer(self.before(x)))))
        return self.after(y if y.shape[-2:] == x.shape[-2:] else resized(y, x))


@image
class Depthwise(Block):
    """An inverted bottleneck: expand, depthwise with a multiplier, project."""

    def make(self, c, options):
        multiplier = options.pick(1, 2)
        width = options.pick(c, 2 * c, 4)
        self.expand = nn.Conv2d(c, width, 1) if width != c or options.pick(False, True) else nn.Identity()
        self.norm1 = norm("image", width, options)
        self.layer = nn.Conv2d(width, multiplier * width, 3, padding=1, groups=width, bias=options.pick(True, False))
        self.norm2 = norm("image", multiplier * width, options)
        self.activation = activation("image", multiplier * width, options)
        project = options.pick(True, False) or multiplier * width > 12
        self.out = options.width() if project else multiplier * width
        self.project = nn.Conv2d(multiplier * width, self.out, 1) if project else nn.Identity()

    def forward(self, x):
        return self.project(self.activation(self.norm2(self.layer(self.norm1(self.expand(x))))))


@image
class Grouped(Block):
    """Convolutions in groups, as in resnext."""

    def make(self, c, options):
        groups = options.pick(2, 3, 4)
        inside, self.out = groups * options.pick(1, 2, 3), groups * options.pick(2, 1, 3)
        self.enter = nn.Conv2d(c, inside, 1)
        self.activation1 = activation("image", inside, options)
        self.layer = nn.Conv2d(inside, self.out, 3, padding=1, groups=groups)
        self.norm = norm("image", self.out, options)
        self.activation2 = activation("image", self.out, options)
        again = options.pick(False, True)
        self.again = nn.Conv2d(self.out, self.out, 1, groups=groups) if again else nn.Identity()

    def forward(self, x):
        return self.again(self.activation2(self.norm(self.layer(self.activation1(self.enter(x))))))


@image
class Transposed(Block):
    def make(self, c, options):
        way = options.pick("dense", "grouped", "depthwise", "multiplied")
        inside = 2 * options.pick(2, 3, 1) if way == "grouped" else 4
        groups = {"dense": 1, "grouped": 2}.get(way, inside)
        self.out = inside if way == "depthwise" else 2 * options.pick(2, 3, 1) if way != "multiplied" else 2 * inside
        self.enter = nn.Conv2d(c, inside, 1)
        self.layer = nn.ConvTranspose2d(inside, self.out, 2, 2, groups=groups, bias=options.pick(True, False))
        self.norm = norm("image", self.out, options)
        self.pool = options.pick(nn.MaxPool2d(2), nn.AvgPool2d(2))

    def forward(self, x):
        return self.pool(self.norm(self.layer(self.enter(x))))


@image
class Shuffle(Block):
    """Channel shuffle in its spellings."""

    def make(self, c, options):
        self.groups = options.pick(2, 3)
        self.out = self.groups * options.pick(2, 4, 3)
        self.way = options.pick("view", "minus one", "module", "function", "inner", "flatten", "baked")
        self.enter = nn.Conv2d(c, self.out, 1)
        self.module = nn.ChannelShuffle(self.groups)

    def forward(self, x):
        x, g = self.enter(x), self.groups
        n, c, h, w = x.shape
        if self.way in ("module", "function"):
            return self.module(x) if self.way == "module" else F.channel_shuffle(x, g)
        sizes = {"minus one": (g, -1), "inner": (c // g, g), "baked": (g, self.out // g)}.get(self.way, (g, c // g))
        y = x.view(n, *sizes, h, w).transpose(1, 2)
        return y.flatten(1, 2) if self.way == "flatten" else y.reshape(n, -1 if self.way == "minus one" else c, h, w)


@image
class PixelShuffled(Block):
    def make(self, c, options):
        self.out, self.way = options.width(), options.pick("shuffle", "unshuffle", "view")
        self.enter = nn.Conv2d(c, 4 * self.out if self.way != "unshuffle" else 2, 1)
        self.leave = nn.Conv2d(8 if self.way == "unshuffle" else self.out, self.out, 1)

    def forward(self, x):
        y = self.enter(x)
        if self.way == "unshuffle":
            return self.leave(F.pixel_unshuffle(F.interpolate(y, scale_factor=2), 2))
        if self.way == "shuffle":
            return self.leave(F.max_pool2d(F.pixel_shuffle(y, 2), 2))
        n, c, h, w = y.shape
        y = y.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
        return self.leave(F.avg_pool2d(y, 2))


@image
class Excite(Block):
    """Squeeze and excite."""

    inner = ("",)

    def make(self, c, options):
        self.body = self.branch(0, c)
        self.out = c = self.body.out
        hidden = options.pick(2, 3, 4)
        self.way = options.pick("convolutions", "linear", "one", "efficient", "norm")
        if self.way == "linear":
            self.down, self.up = nn.Linear(c, hidden), nn.Linear(hidden, c)
        else:
            self.down, self.up = nn.Conv2d(c, hidden, 1), nn.Conv2d(hidden, c, 1)
        self.activation = activation("image", hidden, options) if self.way != "linear" else nn.ReLU()
        self.gate = options.pick(nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh(), nn.ReLU6())
        self.mix = nn.Conv1d(1, 1, 3, padding=1)
        self.norm = nn.BatchNorm2d(hidden) if self.way == "norm" else nn.Identity()

    def forward(self, x):
        x = self.body(x)
        n, c = x.shape[:2]
        if self.way == "linear":
            return x * self.gate(self.up(self.activation(self.down(x.mean((2, 3)))))).view(n, c, 1, 1)
        pooled = F.adaptive_avg_pool2d(x, 1)
        if self.way == "efficient":  # convolves over channels
            return x * self.gate(self.mix(pooled.view(n, 1, c))).view(n, c, 1, 1)
        return x * self.gate(self.up(self.activation(self.norm(self.down(pooled)))))


@image
class Spatial(Block):
    """One map that weighs every channel, made by a layer or of the channels' mean and maximum."""

    def make(self, c, options):
        self.way = options.pick("layer", "statistics")
        self.layer = nn.Conv2d(c if self.way == "layer" else 2, 1, 3, padding=1)

    def forward(self, x):
        y = x if self.way == "layer" else torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.layer(y))


@image
class Baked(Block):
    """Widths as numbers in the code."""

    def make(self, c, options):
        self.out, self.width = options.pick(4, 6, 8), 0
        self.way = options.pick("attribute", "literal", "split", "loop", "groups", "rows")
        if self.way == "literal":
            self.out = 8
        self.enter, self.width = nn.Conv2d(c, self.out, 1), self.out
        self.layers = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(self.out))
        self.leave = nn.Conv2d(self.out, self.out, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        x = self.enter(x)
        if self.way == "loop":
            return torch.cat([self.layers[i](x[:, i : i + 1]) for i in range(self.width)], 1)
        if self.way == "split":
            x = torch.cat(x.split([self.width // 2, self.width // 2], 1)[::-1], 1)
        elif self.way == "groups":
            x = F.group_norm(x, 2)
        elif self.way == "rows":
            x = x.reshape(n, self.width, h * w).mean(2, keepdim=True).unsqueeze(-1).expand(n, self.width, h, w)
        elif self.way == "literal":
            x = x.view(-1, 2, 4, h, w).flip(1).view(-1, 8, h, w)
        else:
            x = x.view(n, self.width, h, w)
        return self.leave(x)


@image
class Standardised(Block):
    """Weights that are computed from parameters."""

    def make(self, c, options):
        self.out = options.width()
        self.way = options.pick("scaled", "standardised", "weight norm", "masked", "added")
        self.layer = nn.Conv2d(c, self.out, 3, padding=1)
        self.other = nn.Conv2d(c, self.out, 3, padding=1, bias=False)
        self.gain = nn.Parameter(torch.ones(self.out, 1, 1, 1))
        self.register_buffer("mask", torch.ones(3, 3))
        if self.way == "weight norm":
            nn.utils.parametrizations.weight_norm(self.layer)

    def forward(self, x):
        w = self.layer.weight
        if self.way == "standardised":
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 0.1)
        w = {
            "scaled": lambda: w * self.gain,
            "masked": lambda: w * self.mask,
            "added": lambda: w + self.other.weight,
        }.get(self.way, lambda: w)()
        return F.conv2d(x, w, self.layer.bias, padding=1)


@image
class Stacked(Block):
    """Branches side by side along the positions."""

    inner = ("", "")

    def make(self, c, options):
        self.a, self.b = self.branch(0, c), self.branch(1, c)
        self.match = nn.Conv2d(self.b.out, self.a.out, 1) if self.a.out != self.b.out else nn.Identity()
        self.out = self.a.out
        self.dim = options.pick(2, 3, 0)

    def forward(self, x):
        y = torch.cat([self.a(x), self.match(self.b(x))], self.dim)
        return sum(y.chunk(2, 0)) if self.dim == 0 else resized(F.max_pool2d(y, 2), x)


@image
class AsTokens(Block):
    """Tokens inside a network of images."""

    inner = ("tokens",)

    def make(self, c, options):
        self.body = self.branch(0, c)
        self.out = self.body.out
        self.there = options.pick("flatten", "permute", "reshape", "last")
        self.back = options.pick("minus one", "shape", "unflatten", "attribute")

    def forward(self, x):
        n, c, h, w = x.shape
        if self.there == "last":
            y = self.body(x.permute(0, 2, 3, 1).reshape(n, h * w, c))
        elif self.there == "reshape":
            y = self.body(x.reshape(n, c, h * w).transpose(1, 2))
        else:
            y = self.body(x.flatten(2).transpose(1, 2) if self.there == "flatten" else x.flatten(2).permute(0, 2, 1))
        if self.back == "unflatten":
            return y.transpose(1, 2).unflatten(2, (h, w))
        width = {"minus one": -1, "shape": y.shape[-1], "attribute": self.out}[self.back]
        return y.transpose(1, 2).reshape(n, width, h, w)


@image
class LastBlock(Block):
    """Channels last for a while, as in convnext."""

    def make(self, c, options):
        hidden = options.pick(4, 6, 8)
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = options.pick(nn.LayerNorm(c), nn.Identity(), nn.RMSNorm(c))
        self.up, self.down = nn.Linear(c, hidden), nn.Linear(hidden, c)
        self.gamma = nn.Parameter(torch.ones(c))
        self.activation = options.pick(nn.GELU(), nn.ReLU())
        self.response = options.pick(False, True)  # convnext v2's normalisation over channels

    def forward(self, x):
        y = self.activation(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        if self.response:
            norms = y.norm(dim=(1, 2), keepdim=True)
            y = y * norms / (norms.mean(-1, keepdim=True) + 0.1)
        return x + (self.gamma * self.down(y)).permute(0, 3, 1, 2)


@image
class Positions(Block):
    """Attention over positions whose layers are convolutions."""

    def make(self, c, options):
        inner, value = options.pick(2, 4, 3), options.pick(4, 2, 6)
        self.query, self.key, self.value = nn.Conv2d(c, inner, 1), nn.Conv2d(c, inner, 1), nn.Conv2d(c, value, 1)
        self.leave = nn.Conv2d(value, c, 1)
        self.softmax, self.heads = options.pick(True, False), options.pick(1, 2)
        self.heads = self.heads if inner % 2 == 0 else 1
        self.back = options.pick("minus one", "attribute")
        self.width = value

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = (layer(x).view(n, self.heads, -1, h * w) for layer in (self.query, self.key, self.value))
        scores = q.transpose(-2, -1) @ k  # [N, heads, T, T]
        scores = scores.softmax(-1) if self.softmax else scores / (h * w)
        y = (v @ scores.transpose(-2, -1)).reshape(n, -1 if self.back == "minus one" else self.width, h, w)
        return x + self.leave(y)


@image
class Context(Block):
    """All positions at once in a linear layer, whose output every position receives."""

    fixes_positions = True

    def make(self, c, options):
        self.size = options.pick(2, 1, 3)
        self.layer = nn.Linear(c * self.size**2, 5)
        self.back = nn.Linear(5, c)
        self.way = options.pick("flatten", "view", "baked")
        self.width = c * self.size**2

    def forward(self, x):
        y = F.adaptive_max_pool2d(x, self.size)
        y = {
            "flatten": lambda: y.flatten(1),
            "view": lambda: y.view(len(x), -1),
            "baked": lambda: y.view(-1, self.width),
        }[self.way]()
        return x + self.back(self.layer(y).relu())[:, :, None, None]


@image
class Modulated(Block):
    """Scale and shift computed from the network's second input, a vector."""

    def make(self, c, options):
        self.hidden, self.layer = nn.Linear(3, 4), nn.Linear(4, 2 * c)
        self.way = options.pick("chunk", "view")
        self.second: Tensor | None = None  # the network puts it here

    def forward(self, x):
        y = self.layer(self.hidden(self.second).relu())
        if self.way == "chunk":
            scale, shift = y[:, :, None, None].chunk(2, 1)
        else:
            scale, shift = y.view(len(x), 2, -1, 1, 1).unbind(1)
        return x * (1 + scale) + shift


@image
class Normed(Block):
    """A depthwise convolution, or a grouped one, over a normalisation in groups of another number."""

    def make(self, c, options):
        self.out = 2 * options.pick(6, 2, 3)
        self.enter = nn.Conv2d(c, self.out, 1)
        self.norm = nn.GroupNorm(groups_of(self.out, options), self.out)
        self.layer = nn.Conv2d(self.out, self.out, 1, groups=groups_of(self.out, options))

    def forward(self, x):
        return self.layer(self.norm(self.enter(x)).relu())
