"""Random states: where the generators stand that a training draws from without naming one."""

import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blame import stacklevel


def state_dict() -> dict[str, Any]:
    """The states of Python's ``random``, NumPy's global generator and torch's, on the CPU and every CUDA device.

    CUDA's are there from its first use in this process on.

    >>> before = state_dict()
    >>> first = torch.rand(2), np.random.rand(), random.random()
    >>> load_state_dict(before)
    >>> bool((torch.rand(2) == first[0]).all()), np.random.rand() == first[1], random.random() == first[2]
    (True, True, True)
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = _as_tensors(np.random.get_state(legacy=False))
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def check(state: Mapping[str, Any]) -> None:
    """Raise ValueError where NumPy draws by another generator here; warn of CUDA devices that are no longer there."""
    theirs, ours = state["numpy"]["bit_generator"], np.random.get_state(legacy=False)["bit_generator"]
    if theirs != ours:
        raise ValueError(
            f"NumPy drew by {theirs} when this state was kept, and draws by {ours} here; set it with "
            "numpy.random.set_bit_generator as then"
        )
    here = torch.cuda.device_count()
    if len(state["cuda"]) > here:
        warnings.warn(
            f"{len(state['cuda'])} CUDA devices had random states, here are {here}: what they draw will differ",
            stacklevel=stacklevel(),
        )


def load_state_dict(state: Mapping[str, Any]) -> None:
    """Have all of them go on from a :func:`state_dict` that :func:`check` lets pass."""
    random.setstate(state["python"])
    np.random.set_state(_as_arrays(state["numpy"]))
    torch.set_rng_state(state["torch"])
    for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, device)


def _as_tensors(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _as_tensors(value) for key, value in state.items()}
    return torch.from_numpy(state.copy()) if isinstance(state, np.ndarray) else state


def _as_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _as_arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, Tensor) else state
