"""Fusion rewrites code: what of a class is kept, and whose source is not trusted."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from tests.cases import distance
from tests.fused import Plain, Written, X, needs_kernels, pair, same

pytestmark = needs_kernels


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


class UsedTwice(Written):
    def forward(self, x):
        y = self.bn(x)
        return F.relu(y) - y


def test_what_is_left_is_said_once():
    model = nn.Sequential(Written(), *[UsedTwice() for _ in range(3)])
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


EDITED = """
import torch.nn.functional as F
import tests.fused as t
class Net(t.Written):
    def forward(self, x):
        y = self.relu(self.bn(x))
        {}
        return y
"""
EDITS = {
    "another number": ("y = 2 * y", "y = 3 * y"),
    "into a condition": (
        """if self.on:
            y = 2 * y
        y = 3 * y
        y = 4 * y""",
        """if self.on:
            y = 2 * y
            y = 3 * y
        y = 4 * y""",
    ),
    "out of a try": (
        """try:
            y = 2 * y
            x = 3 * y
        except ValueError:
            x = 4 * x
        y = y + x""",
        """try:
            y = 2 * y
        except ValueError:
            x = 4 * x
        x = 3 * y
        y = y + x""",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_source_that_changed_since_the_import_is_left(edit, tmp_path, monkeypatch):
    file = tmp_path / "edited_network.py"
    before, after = EDITS[edit]
    file.write_text(EDITED.format(before))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_network", raising=False)
    import edited_network

    file.write_text(EDITED.format(after))
    with pytest.warns(UserWarning, match="is not the code that runs"):
        tk.convert(edited_network.Net(), fuse=True)


def test_source_that_can_not_be_read_any_more_is_left(tmp_path, monkeypatch):
    file = tmp_path / "torn_network.py"
    file.write_text(EDITED.format("y = 2 * y"))
    monkeypatch.syspath_prepend(tmp_path)
    import torn_network

    file.write_text(EDITED.format("y = (2 * (y"))
    with pytest.warns(UserWarning, match="the source of Net.forward can't be had"):
        tk.convert(torn_network.Net(), fuse=True)


def test_a_variable_with_the_helpers_name_is_the_functions():
    class Named(Written):
        def forward(self, x):
            _taylorkern = self.bn(x)
            return F.relu(_taylorkern)

    with pytest.warns(UserWarning, match="uses the name _taylorkern"):
        fused = tk.convert(Named(), fuse=True)
    assert fused(X).shape == X.shape


def test_a_graphs_code_is_left_for_it_may_be_made_anew():
    with pytest.warns(UserWarning, match="its code is made from a graph"):
        fused = tk.convert(torch.fx.symbolic_trace(Plain()), fuse=True)
    before = fused(X)
    (output,) = (node for node in fused.graph.nodes if node.op == "output")
    with fused.graph.inserting_before(output):
        output.args = (fused.graph.call_function(torch.mul, (output.args[0], 2)),)
    fused.recompile()
    assert distance(fused(X), 2 * before) < 1e-6
