"""The bench of operations: what is wrong is not timed, and rows hold what was measured."""

import pytest
import torch

from bench import operations
from bench.pairs import WrongError
from tests.wrong import corrupt, never

SHAPE = (4, 3, 5, 5)
OUTPUTS = {"batch_norm_act": ("y",), "batch_norm_act_backward": ("dx", "dresidual", "dweight", "dbias", "s")}
WRONG = [(op, i) for op, names in OUTPUTS.items() for i in range(len(names))]


@pytest.mark.parametrize("dtype", operations.DTYPES)
@pytest.mark.parametrize(("operation", "output"), WRONG, ids=[OUTPUTS[op][i] for op, i in WRONG])
def test_a_wrong_output_of_an_operation_is_not_timed(monkeypatch, operation, output, dtype):
    corrupt(monkeypatch, operation, output)
    with pytest.raises(WrongError, match="not timed"):
        operations.measured("BN+add+ReLU", "channels_last", dtype, SHAPE, 3, never)


@pytest.mark.parametrize("dtype", operations.DTYPES)
def test_wrong_channel_scores_are_not_timed(monkeypatch, dtype):
    corrupt(monkeypatch, "channel_scores", dtype=operations.DTYPES[dtype])
    with pytest.raises(WrongError, match="not timed"):
        operations.measured("channel_scores", "contiguous", dtype, SHAPE, 3, never)


@pytest.mark.parametrize("layout", operations.LAYOUTS)
@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_an_operation_has_a_row_for_each_part(name, layout):
    rows = operations.measured(name, layout, "float32", SHAPE, 3)
    whole = {"whole"} if name == "channel_scores" else {"whole", "forward", "backward"}
    assert {row["subject"]["part"] for row in rows} == whole
    for row in rows:
        assert row["pairs"] == 3
        assert 0 < row["ratio"]["p25"] <= row["ratio"]["median"] <= row["ratio"]["p75"]
        assert row["checked"]["distance from float64"] < 1e-5
        for whose in ("ours", "eager"):
            assert row["bytes"][whose] % (4 * 4 * 3 * 25) == 0
            assert row["of copy"][whose]["median"] > 0
            assert row["faults"][whose] >= 0
        assert operations.line(row)
    moved = {row["subject"]["part"]: row["bytes"]["ours"] for row in rows}
    assert moved["whole"] == moved.get("forward", moved["whole"]) + moved.get("backward", 0)


def test_the_share_of_a_copy_is_that_of_the_bytes_moved():
    x = torch.zeros(10)
    times = {"ours, whole": [1.0, 1.0, 1.0], "eager, whole": [2.0, 2.0, 2.0], "copy": [0.5, 0.5, 0.5]}
    found = operations._moved(operations.OPERATIONS["channel_scores"], "whole", x, times)
    assert found["bytes"] == {"ours": 80, "eager": 160}  # a and g; those, and the product written and read
    assert found["of copy"]["ours"]["median"] == 0.5  # as many bytes as the copy, in twice its time
    assert found["of copy"]["eager"]["median"] == 0.5
