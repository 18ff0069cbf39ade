"""Launches passes that work element by element, as quickly as a few trials have found.

Only these are tuned: no choice here can change a bit of what they write, while that of a reduction's tiles would change
the order of its sums (see ``triton_tiles``). Trials are few, are made once per bucket of sizes, and are kept on disk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .triton_formula import INTERPRETED
from .triton_tiles import REACH, REGISTERS, RUN, alignment, fitting, power

# Of 8 or 16 elements a thread: with more, where they are loaded one by one, registers don't suffice.
USUAL = triton.Config({"BLOCK": 2048}, num_warps=8, maxnreg=REGISTERS)
CONFIGS = [
    USUAL, *(triton.Config({"BLOCK": b}, num_warps=w, maxnreg=REGISTERS) for b, w in ((4096, 8), (2048, 4), (1024, 4)))
]  # fmt: skip
LARGEST = 4096
COLUMNS = 256  # channels of a tile of channels_last
REPEATS = 10

_chosen: dict[tuple[Any, ...], triton.Config] = {}  # by kernel, bucket and dtypes


@dataclass(frozen=True)
class Rows:
    """Dense [N, C, S] as rows of what is contiguous: of channels if ``last``, else of a channel's positions."""

    rows: int
    length: int
    last: bool

    @classmethod
    def of(cls, sizes: tuple[int, int, int], last: bool) -> "Rows":
        N, C, S = sizes
        return cls(N * S, C, True) if last else cls(N * C, S, False)

    @property
    def run(self) -> int:
        """How much of a row a tile spans."""
        return fitting(self.length, COLUMNS, 16) if self.last else fitting(self.length, RUN, 32)

    @property
    def wide(self) -> bool:
        """Whether offsets in a tile may need 64 bits."""
        return max(1, LARGEST // self.run) * self.length + self.run > REACH

    @property
    def bucket(self) -> int:
        """Sizes within a factor of two: they share a trial."""
        return power(self.length).bit_length() * 64 + power(self.rows).bit_length()


def tuned(kernel: Any) -> Any:
    """The kernel with its choice of configurations. The interpreter has no driver to time them with."""
    configs = [USUAL] if INTERPRETED else CONFIGS
    return triton.autotune(configs, key=["bucket"], do_bench=_seconds, cache_results=True)(kernel)


def launch(kernel: Any, sizes: tuple[int, int, int], last: bool, *arguments: Any, **constants: Any) -> None:
    """Run a :func:`tuned` kernel on all tiles. While a CUDA graph is captured nothing is timed."""
    rows = Rows.of(sizes, last)
    run, C = rows.run, sizes[1]

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows.rows, max(1, chosen["BLOCK"] // run)) * triton.cdiv(rows.length, run),)

    key = (kernel, rows.bucket, *(t.dtype for t in arguments if isinstance(t, Tensor)))
    config = _chosen.get(key)
    if config is None and arguments[0].is_cuda and torch.cuda.is_current_stream_capturing():
        config = USUAL
    constants |= {"LAST": last, "ALIGNED": alignment(rows.length), "WIDE": rows.wide, "RUN": run}
    passed = (*arguments, rows.rows, rows.length, C, rows.bucket)
    if config is None:
        kernel[grid](*passed, **constants)
        _chosen[key] = kernel.best_config
    else:
        kernel.fn[grid](*passed, **constants, **config.all_kwargs())


def _seconds(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """The mean time of a few calls, once per quantile. It takes no memory, of which there may be none left."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return [start.elapsed_time(end) / REPEATS] * len(quantiles)
