"""The bench of whole steps: every way and rival computes what it says, and what is wrong is not timed."""

from dataclasses import replace

import pytest
import torch

from bench import compiled, rivals, steps, ways, workload
from bench.pairs import WrongError
from tests.wrong import corrupt, never

TINY = workload.QUICK[0]


@pytest.fixture
def fresh_references():
    """What ways are compared with is kept for a whole process; not what a wrong kernel made of it."""
    steps.reference.cache_clear()
    yield
    steps.reference.cache_clear()


NEEDS = {"Torch-Pruning": "torch_pruning", "BackPACK": "backpack"}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("way", [*ways.OURS, *rivals.RIVALS], ids=lambda way: way.name)
@pytest.mark.parametrize("w", workload.QUICK, ids=str)
def test_every_way_computes_what_it_says(w, way):
    if way.name in NEEDS:
        pytest.importorskip(NEEDS[way.name], reason="not installed: pip install -c constraints.txt -e '.[bench]'")
    distances = steps.wide(w, way)
    assert bool(distances) == bool(way.quantity)
    assert way.computes
    found = steps._first(way.prepare(w.double()))
    assert {s.dim() for s in found.values()} == {"s": {2}, "G": {1}, "": set()}[way.quantity]


def test_hooks_copy_only_what_is_overwritten():
    model = rivals.out_of_place(TINY.model())
    assert rivals.overwritten(model, TINY) == {"3.bn2"}  # out += x; the ReLUs work out of place


def test_rivals_score_the_layers_that_carry_a_gate():
    assert ways.places(TINY) == ("1", "3.bn1", "3.bn2")


def test_main_ways_have_rows_of_time_and_memory(fresh_references):
    rows = steps.measured(TINY, steps.MAIN, 3, memory=True)
    names = [way.name for way in steps.MAIN]
    assert [row["way"] for row in rows if row["suite"] == "steps"] == names
    assert [row["way"] for row in rows if row["suite"] == "memory"] == names
    by_way = {row["way"]: row for row in rows if row["suite"] == "steps"}
    assert by_way["plain"]["ratio"] == {"p25": 1.0, "median": 1.0, "p75": 1.0}
    for name in ("scored", "fused, scored", "hooks", "gates [N, C]"):
        assert by_way[name]["checked"]["float64"] < 1e-12
        assert by_way[name]["checked"]["float32"] < 1e-3
    memory = {row["way"]: row["ratio"] for row in rows if row["suite"] == "memory"}
    assert memory["plain"] == memory["plain again"] == 1.0
    assert memory["gates [N, C]"] > 1.05
    assert all(map(steps.line, rows))


@pytest.mark.parametrize("name", ["scored", "fused, scored"])
def test_wrong_scores_stop_a_comparison_before_it_is_timed(monkeypatch, fresh_references, name):
    corrupt(monkeypatch, "batch_norm_act_backward", output=4)
    with pytest.raises(WrongError, match="nothing is timed"):
        steps.measured(TINY, [steps.PLAIN, steps.BY_NAME[name]], 3, never)


def test_scores_that_are_wrong_in_float32_alone_are_found(monkeypatch, fresh_references):
    corrupt(monkeypatch, "batch_norm_act_backward", output=4, dtype=torch.float32)
    with pytest.raises(WrongError, match="from float64"):
        steps.measured(TINY, [steps.PLAIN, steps.SCORED], 3, never)


def test_a_timed_model_that_is_wrong_alone_is_found(monkeypatch, fresh_references):
    def prepare(w):
        right = steps.SCORED.prepare(w)
        factor = 1.0 if w == w.small() else 1.5
        return ways.Prepared(right.step, lambda: {name: factor * s for name, s in right.scores().items()})

    larger = replace(TINY, size=40)
    way = replace(steps.SCORED, name="wrong when large", prepare=prepare)
    with pytest.raises(WrongError, match="the timed wrong when large"):
        steps.measured(larger, [steps.PLAIN, steps.EXPLICIT, way], 3, never)


def test_a_wrong_rival_is_not_timed_either(monkeypatch, fresh_references):
    monkeypatch.setattr(rivals, "overwritten", lambda model, w: set())  # what is overwritten is not copied
    with pytest.raises(WrongError, match="hooks"):
        steps.attempted(TINY, steps.BY_NAME["hooks"], 3, never)


def test_a_rival_that_refuses_leaves_its_reason(fresh_references):
    def refuse(w):
        raise NotImplementedError("no gates  here\nat all")

    rows = steps.attempted(TINY, ways.Way("rival", refuse, "", ""), 3, never)
    assert [row["failed"] for row in rows] == ["NotImplementedError: no gates here at all"]
    assert "failed" in steps.line(rows[0])


def test_a_compiled_way_is_checked_and_says_what_its_first_step_took(monkeypatch, fresh_references):
    way = compiled.compiled(steps.BY_NAME["gates [N, C]"], "aot_eager")
    (row,) = steps.attempted(TINY, way, 3)
    assert row["way"] == "compiled gates [N, C]"
    assert row["checked"]["timed"] < 1e-3
    assert row["first step"] > 1
    monkeypatch.setattr(torch, "compile", lambda model, backend: lambda x: 1.5 * model(x))
    with pytest.raises(WrongError, match="timed compiled"):
        steps.attempted(TINY, way, 3, never)
