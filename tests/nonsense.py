"""Arguments that the CUDA kernels' bindings must refuse."""

import pytest
import torch


def refuses_nonsense(module) -> None:
    """Every argument that could make a kernel read or write where it must not is refused, before a launch."""
    memory = torch.zeros(4096)
    at = memory.data_ptr() // 16 * 16 + 16
    shape = {"N": 1, "C": 2, "S": 3, "layout": 0, "dtype": 0}

    def scores(a=at, workspace=at, resident=0, **changed):
        module.channel_scores(a, at, at, *(shape | changed).values(), 0, workspace, resident)

    for changed, says in (
        ({"dtype": 1}, "no float64"),
        ({"dtype": 4}, "unknown dtype code 4"),
        ({"dtype": -1}, "unknown dtype"),
        ({"layout": 2}, "unknown layout code 2"),
        ({"N": -1}, "negative: -1"),
        ({"S": 1 << 62}, "overflow"),
        ({"a": 0}, "null pointer for a"),
        ({"workspace": at + 8}, "aligned to 16"),
        ({"resident": -1}, "resident_bytes is negative"),
    ):
        with pytest.raises(ValueError, match=says):
            scores(**changed)
    if module.workspace_bytes(*shape.values()):
        with pytest.raises(ValueError, match="null pointer for workspace"):
            scores(workspace=0)
    with pytest.raises(ValueError, match="no float64"):
        module.workspace_bytes(1, 2, 3, 0, 1)
    for code in (6, -1):
        with pytest.raises(ValueError, match="unknown activation"):
            module.batch_norm_act(at, 0, 0, 0, at, 0, at, at, 1e-5, True, code, 0.0, *shape.values(), 0, at, 0)
        with pytest.raises(ValueError, match="unknown activation"):
            module.batch_norm_act_backward(
                at, at, 0, 0, 0, 0, at, at, at, 0, at, at, at, 1e-5, True, code, 0.0, *shape.values(), 0, at, 0
            )
    for dtype, says in ((1, "no float64"), (2, "are float32")):
        with pytest.raises(ValueError, match=says):
            module.follow(at, at, at, at, 0.1, 1.0, 2, dtype, 0)
    with pytest.raises(ValueError, match="null pointer for running_var"):
        module.follow(at, at, at, 0, 0.1, 1.0, 2, 0, 0)
    assert not memory.any()
