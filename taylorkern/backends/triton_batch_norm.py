"""batch_norm_act in Triton: two reads of x and one write in training, one of each otherwise.

Statistics come from deviations: each program takes them from a pivot, the mean of its first tile, and what it finds is
joined by Chan's formula over all programs at once, from deviations again, so that float32 is enough however large the
mean is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_tuning
from .triton_formula import affine, apply, kernel, loaded, origin, passes, place, stored, tile_of_rows, trips, within
from .triton_tiles import REGISTERS, alignment, power, tiles

JOINED = 2048  # partial sums that a program joins at a time
BLOCK = 256


@kernel
def moments_of_tiles(
    x: tl.tensor,  # [N, C, S]
    partial: tl.tensor,  # [3, rows, C] float32, written: pivot, mean less pivot, summed squared deviation from the mean
    N: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    group: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
) -> None:
    if LAST:
        C = C // ALIGNED * ALIGNED  # itself: now the compiler knows
    else:
        S = S // ALIGNED * ALIGNED
    first, begin, c0, row = place(C, group, chunk, chunks, CHANNELS, POSITIONS)
    offsets = within(C, S, LAST, WIDE, SAMPLES, CHANNELS, POSITIONS)
    c = c0 + tl.arange(0, CHANNELS)
    local_n, local_s = tl.arange(0, SAMPLES), tl.arange(0, POSITIONS)
    samples, positions = tl.minimum(N - first, group), tl.minimum(S - begin, chunk)

    here = (first + local_n < N)[:, None, None] & (c < C)[None, :, None] & (begin + local_s < S)[None, None, :]
    start = origin(first, c0, begin, C, S, LAST)
    count = (tl.minimum(samples, SAMPLES) * tl.minimum(positions, POSITIONS)).to(tl.float32)
    pivot = tl.sum(tl.sum(loaded(x + start, offsets, here), 2), 0) / count

    sum_d = tl.zeros([SAMPLES, CHANNELS, POSITIONS], tl.float32)
    sum_dd = tl.zeros([SAMPLES, CHANNELS, POSITIONS], tl.float32)
    for i in range(trips(tl.cdiv(samples, SAMPLES))):
        whose = (first + i * SAMPLES + local_n < N)[:, None] & (c < C)[None, :]
        for j in range(trips(tl.cdiv(positions, POSITIONS))):
            s0 = begin + j * POSITIONS
            here = whose[:, :, None] & (s0 + local_s < S)[None, None, :]
            start = origin(first + i * SAMPLES, c0, s0, C, S, LAST)
            d = tl.where(here, loaded(x + start, offsets, here) - pivot[None, :, None], 0.0)
            sum_d += d
            sum_dd = tl.fma(d, d, sum_dd)
    total = tl.sum(tl.sum(sum_d, 2), 0)
    offset = total / (samples * positions).to(tl.float32)
    plane, at = rows.to(tl.int64) * C, row * C + c
    tl.store(partial + at, pivot, mask=c < C)
    tl.store(partial + plane + at, offset, mask=c < C)
    tl.store(partial + 2 * plane + at, tl.sum(tl.sum(sum_dd, 2), 0) - total * offset, mask=c < C)


@kernel
def join_moments(
    partial: tl.tensor,  # [3, rows, C] float32
    mean: tl.tensor,  # [C] float32, written
    var: tl.tensor,  # [C] float32, written
    N: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    group: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    C = C // ALIGNED * ALIGNED
    c = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    plane = rows.to(tl.int64) * C
    reference = tl.load(partial + c, mask=c < C, other=0.0)  # near to all others: small numbers are added
    count = N.to(tl.float32) * S
    sum_d = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i in range(trips(tl.cdiv(rows, ROWS))):
        row = i * ROWS + tl.arange(0, ROWS).to(tl.int64)
        weight, at, here = _row_of_moments(row, N, C, S, group, chunk, chunks, rows, c)
        d = tl.load(partial + at, mask=here, other=0.0) - reference[None, :]
        d += tl.load(partial + plane + at, mask=here, other=0.0)
        sum_d += tl.where(here, weight * d, 0.0)
    offset = tl.sum(sum_d, 0) / count
    m2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i in range(trips(tl.cdiv(rows, ROWS))):
        row = i * ROWS + tl.arange(0, ROWS).to(tl.int64)
        weight, at, here = _row_of_moments(row, N, C, S, group, chunk, chunks, rows, c)
        d = tl.load(partial + at, mask=here, other=0.0) - reference[None, :]
        d += tl.load(partial + plane + at, mask=here, other=0.0) - offset[None, :]
        m2 += tl.load(partial + 2 * plane + at, mask=here, other=0.0) + tl.where(here, weight * d * d, 0.0)
    total = tl.sum(m2, 0)
    tl.store(mean + c, reference + offset, mask=c < C)
    tl.store(var + c, tl.where(total <= 0, 0.0, total) / count, mask=c < C)


@triton.jit
def _row_of_moments(
    row: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    group: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    c: tl.tensor,
) -> tl.tensor:
    """How many values stand behind each row, where its numbers lie, and which of these there are."""
    samples = tl.minimum(N - row // chunks * group, group)
    positions = tl.minimum(S - row % chunks * chunk, chunk)
    here = (row < rows)[:, None] & (c < C)[None, :]
    return (samples * positions).to(tl.float32)[:, None], (row * C)[:, None] + c[None, :], here


@kernel
def normalise(
    x: tl.tensor,  # [N, C, S]
    residual: tl.tensor,  # [N, C, S] or None
    weight: tl.tensor,  # [C] float32 or None
    bias: tl.tensor,  # [C] float32 or None
    y: tl.tensor,  # [N, C, S], written
    mask: tl.tensor,  # [N, C, S] bytes or None, written
    mean: tl.tensor,  # [C] float32
    var: tl.tensor,  # [C] float32
    eps: tl.tensor,
    slope: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    C: tl.tensor,
    bucket: tl.tensor,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    length = length // ALIGNED * ALIGNED
    start, offsets, here, c, valid = tile_of_rows(rows, length, C, LAST, WIDE, BLOCK, RUN)
    _, _, scale, shift = affine(weight, bias, mean, var, eps, c, valid)
    z = tl.fma(loaded(x + start, offsets, here), scale, shift)
    if residual is not None:
        z += loaded(residual + start, offsets, here)
    stored(y + start, offsets, apply(z, slope, ACTIVATION), here)
    if mask is not None:
        tl.store(mask + start + offsets, passes(z, ACTIVATION).to(tl.uint8), mask=here)


normalise_tuned = triton_tuning.tuned(normalise)


@kernel
def move_running(
    running_mean: tl.tensor,  # [C] float32, read and written
    running_var: tl.tensor,  # [C] float32, read and written
    mean: tl.tensor,  # [C] float32
    var: tl.tensor,  # [C] float32
    momentum: tl.tensor,
    unbias: tl.tensor,
    C: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _move(running_mean + c, tl.load(mean + c, mask=c < C, other=0.0), momentum, c < C)
    _move(running_var + c, tl.load(var + c, mask=c < C, other=0.0) * unbias, momentum, c < C)


@triton.jit
def _move(running: tl.tensor, end: tl.tensor, share: tl.tensor, here: tl.tensor) -> None:
    start = tl.load(running, mask=here, other=0.0)
    near, far = start + share * (end - start), end - (end - start) * (1.0 - share)
    tl.store(running, tl.where(share < 0.5, near, far), mask=here)


def batch_norm_act(
    sizes: tuple[int, int, int],
    last: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
    activation: int,
    slope: float,
) -> None:
    """Writes ``y`` and ``mask`` like dense ``x``, channels innermost if ``last``; in training ``mean`` and ``var``."""
    if training:
        statistics(sizes, last, x, mean, var)
    if x.numel():
        mask = None if mask is None else mask.view(torch.uint8)
        triton_tuning.launch(
            normalise_tuned, sizes, last,
            x, residual, weight, bias, y, mask, mean, var, eps, slope, ACTIVATION=activation,
        )  # fmt: skip


def statistics(sizes: tuple[int, int, int], last: bool, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Writes the batch's ``mean`` and biased ``var``, zeros where it is empty."""
    if x.numel() == 0:
        mean.zero_()
        var.zero_()
        return
    N, C, S = sizes
    N, S = (1, N * S) if last else (N, S)  # samples don't matter here, and whole tiles are more
    cut = tiles(N, C, S, last)
    partial = torch.empty(3, cut.rows, C, dtype=torch.float32, device=x.device)
    shared = (N, C, S, cut.group, cut.chunk, cut.chunks, cut.rows)
    moments_of_tiles[(cut.programs,)](
        x, partial, *shared,
        last, alignment(C if last else S), cut.wide, cut.samples, cut.channels, cut.positions,
        num_warps=cut.warps, maxnreg=REGISTERS,
    )  # fmt: skip
    rows, channels = joining(cut.rows, C)
    join_moments[(triton.cdiv(C, channels),)](
        partial, mean, var, *shared, alignment(C), rows, channels, maxnreg=REGISTERS
    )  # fmt: skip


def joining(rows: int, C: int) -> tuple[int, int]:
    """Rows and channels of the tiles of partial sums: enough programs, and few rows too many."""
    channels = max(4, min(64, power(C) // 128))
    return min(power(rows), JOINED // channels), channels


def follow(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbias: float
) -> None:
    """Moves running statistics [C], float32 and contiguous, by ``momentum``: one launch."""
    if C := len(mean):
        grid = (triton.cdiv(C, BLOCK),)
        move_running[grid](running_mean, running_var, mean, var, float(momentum), float(unbias), C, BLOCK)
