"""Forward methods at random: chains of normalisation, addition and activation amid whatever may cut them."""

import random
import re
import textwrap

VARIABLES = "abcd"
# <name> is one of the texts of that name, $v and $w are variables; repeated texts are likelier.
GRAMMAR = {
    "expression": [
        *("$v", "$v", "$v", "<norm>(<expression>)", "<norm>(<expression>)", "<activated>", "<activated>"),
        *("<expression> + <expression>", "0.5 * (<expression>)", "self.conv(<expression>)", "(<expression>).detach()"),
        *("self.block(<expression>)", "(<expression>) * <statistic>.sum()"),
    ],
    "norm": ["self.bn", "self.bn", "self.other", "self.third", "self.tail", "self.norms[0]", "n"],
    "statistic": ["self.bn.running_mean", "n.running_mean", "self.tail[1].running_var", "self.look()"],
    "activated": [
        *("self.act(<expression>)", "F.relu(<expression>)", "relu(<expression>)", "(<expression>).relu()"),
        *("F.gelu(<expression>)", "F.relu6(<expression>)", "self.leaky(<expression>)", "F.silu(<expression>)"),
        *("F.leaky_relu(<expression>, -0.3)", "self.hardswish(<expression>)", "F.relu(<expression>, True)"),
        "self.skip(<expression>)",
    ],
    "active": ["self.act($v)", "F.relu($v)", "$v.relu()", "self.relu($v)", "F.leaky_relu($v, 0.3, True)", "F.silu($v)"],
    "overwriting": [
        *("$v.relu_()", "F.relu($v, inplace=True)", "self.relu($v)", "self.act($v)", "relu_($v)", "$v.relu()"),
        *("F.relu($v + $w, inplace=True)", "($v + $w).relu_()", "F.leaky_relu($v, 0.1, True)"),
    ],
    "condition": ["self.on", "self.off", "self.none is None", "self.skip is not None", "i == 0"],
    "maybe": ["pass", "<statement>", "<statement>\n<statement>"],
    "statement": [
        *["$v = <norm>(<expression>)\n<maybe>\n$v = <active>"] * 3,
        *["$v = <norm>(<expression>)\n<maybe>\n$v += $w\n<maybe>\n$v = <active>"] * 3,
        "$v = <norm>(<expression>)\n<maybe>\n$w = <active>",
        "$v = <norm>(<expression>)\n<maybe>\n$w = $v + <expression>\n$w = self.relu($w)",
        "$v = <norm>(<expression>)\n<overwriting>",
        *("$v = <norm>(<expression>)", "$v = <active>", "$v += <expression>", "$v = <expression>"),
        *("$v = self.skip($v)", "self.kept = $v", "$v, $w = <expression>, <expression>", "$v = $w = <expression>"),
        "self.other.momentum = 0.3",
        "$v = $v + [F.relu(q) for q in ($v, $w)][0]",
        "f = lambda q=$v: q + $w\n$v = $v + f()",
        "del $v\n$v = 1 * x",
        "if <condition>:\n<block>",
        "if <condition>:\n<block>\nelse:\n<block>",
        "if <condition>:\n    $v = <norm>(<expression>)\nelse:\n    $v = <expression>\n$v = <active>",
        "if self.off:\n    return $v",
        "for i in range(2):\n<block>",
        "for n in self.norms:\n<block>",
        "for i in range(2):\n    if self.off:\n        break\n<block>",
        "with torch.enable_grad():\n<block>",
        "try:\n<block>\nfinally:\n    pass",
    ],
    "block": ["<statement>", "<statement>\n<statement>"],
    "end": ["$v", "$v + $w", "<active>", "self.relu($v + $w)", "(F.relu($v) + $w, $w)[0]", "a + b + c + d"],
}

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import relu

relu_ = F.relu


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.other, self.third = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3)
        self.relu, self.act, self.leaky = nn.ReLU(inplace=True), nn.ReLU(), nn.LeakyReLU(0.2)
        self.hardswish, self.skip, self.none, self.on, self.off = nn.Hardswish(), nn.Identity(), None, True, False
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.norms, self.conv = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]), nn.Conv2d(3, 3, 1)

    def look(self):
        return self.bn.running_mean.mean()

    def block(self, t):
        t = self.other(t)
        return F.relu(t)

    def forward(self, x):
        a, b, c, d, i, n = 1 * x, 2 * x, x.sin(), x + 1, 0, self.bn
"""


def program(seed: int) -> str:
    """The source of a file with a class ``Net``."""
    draw = random.Random(seed)

    def expanded(name: str, depth: int) -> str:
        texts = GRAMMAR[name]
        shallow = [text for text in texts if "<" not in text] or texts
        text = draw.choice(texts if depth < 5 else shallow)
        v, w = draw.sample(VARIABLES, 2)
        # An inner text that is about "the" variable is about the same one.
        text = re.sub("<(active|overwriting)>", lambda found: draw.choice(GRAMMAR[found[1]]), text)
        text = text.replace("$v", v).replace("$w", w)
        text = re.sub("<([a-z]+)>", lambda found: expanded(found[1], depth + 1), text)
        return textwrap.indent(text, "    ") if name == "block" else text

    body = [expanded("statement", 0) for _ in range(draw.randint(2, 5))]
    return HEAD + textwrap.indent("\n".join([*body, f"return {expanded('end', 0)}\n"]), "        ")
