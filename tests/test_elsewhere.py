"""The bench of what is neither layer nor kernel, on a tiny network: every part runs, and wrong sums are not timed."""

import pytest

from bench import elsewhere
from bench.operations import WrongError
from bench.workload import Workload
from taylorkern import folding

TINY = Workload("tiny", 8, 4, 5)


def test_every_part_has_its_share():
    parts = [*elsewhere.training(TINY), *elsewhere.oracle(TINY, 2)]
    times = elsewhere.timed(parts, 2)
    rows = {part.name: elsewhere.row(part, times) for part in parts}
    assert rows["plain step"]["ratio"]["median"] == rows["plain step"]["share of training"] == 1
    cut = rows["cut of 100 units, verified"]
    assert cut["share of training"] == pytest.approx(cut["ratio"]["median"] / elsewhere.EVERY)
    assert rows["oracle's forward of 2 units"]["share of training"] is None
    assert all(row["part"] in elsewhere.line(row) and row["ratio"]["median"] > 0 for row in rows.values())


def test_wrong_sums_are_not_timed(monkeypatch):
    right = folding.Folding.__call__
    monkeypatch.setattr(folding.Folding, "__call__", lambda self, *pieces: right(self, *(1.001 * s for s in pieces)))
    with pytest.raises(WrongError, match="what was folded is wrong"):
        elsewhere.training(TINY)
