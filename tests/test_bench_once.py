"""The benches of what is done once: building, coupling, cutting, ranking. What is wrong is not timed."""

import pytest
import torch

from bench import building, pruning
from bench.pairs import WrongError
from tests.wrong import corrupt, never


def test_a_build_that_is_wrong_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(building.build, "build_ahead", lambda folder: folder)
    for check in ("print(0.1)", "print(float('nan'))", "raise SystemExit('no kernels')"):
        monkeypatch.setattr(building, "CHECK", check)
        with pytest.raises(WrongError, match="nothing is timed"):
            building.measured(3, never)
    monkeypatch.setattr(building, "CHECK", "print(0.0)")
    monkeypatch.setattr(building, "WAYS", dict.fromkeys(building.WAYS, lambda: None))
    rows = building.measured(3)
    assert [row["to"] for row in rows] == [*building.WAYS][1:]
    assert all(row["checked"] == {"float64": 0.0} and building.line(row) for row in rows)


def test_a_wrong_cut_is_not_timed(monkeypatch):
    def wrong(model, *rest):
        found = right(model, *rest)
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return found

    right = pruning.cut
    monkeypatch.setattr(pruning, "cut", wrong)
    with pytest.raises(WrongError, match="nothing is timed"):
        pruning.measured("resnet18", 64, 3, never)


def test_folded_and_ranked_units_are_checked():
    rows = pruning.ranked(4100, 4, 3)
    assert rows[0]["seconds"]["taylorkern"] > 0
    assert rows[0]["checked"]["float64"] < 1e-9
    assert pruning.line(rows[0])


def test_wrong_ranks_are_not_timed(monkeypatch):
    corrupt(monkeypatch, "batch_norm_act_backward", output=4)
    with pytest.raises(WrongError, match="nothing is timed"):
        pruning.ranked(100, 4, 3, never)
