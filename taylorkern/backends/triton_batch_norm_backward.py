"""batch_norm_act_backward in Triton: a pass for the sums, which keeps them per sample, and a pass for dx.

Outside training dx needs no sums, so that the first pass writes it. It writes dresidual, which is dz, as well: where
this is exact the second pass reads that in the place of dy and of what tells act'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_tuning
from .triton_batch_norm import joining
from .triton_formula import (
    LEAKY_RELU,
    NONE,
    affine,
    gradient,
    gradient_told,
    kernel,
    loaded,
    origin,
    passes,
    place,
    stored,
    tile_of_rows,
    trips,
    within,
)
from .triton_tiles import alignment, tiles


@triton.jit
def gradient_at(
    dy: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    slope: tl.tensor,
    start: tl.tensor,
    offsets: tl.tensor,
    here: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """dz from dy as the mask tells, or relu's y, or z computed of x's ``value`` as the forward did."""
    dz = loaded(dy + start, offsets, here)
    if mask is not None:
        told = tl.load(mask + start + offsets, mask=here, other=0)
        return gradient_told(told != 0, dz, slope, ACTIVATION)
    elif y is not None:
        return gradient_told(passes(loaded(y + start, offsets, here), ACTIVATION), dz, slope, ACTIVATION)
    else:
        return gradient(tl.fma(value, scale, shift), dz, slope, ACTIVATION)


@kernel
def sums_of_tiles(
    dy: tl.tensor,  # [N, C, S]
    x: tl.tensor,  # [N, C, S]
    mask: tl.tensor,  # [N, C, S] bytes or None
    y: tl.tensor,  # [N, C, S] or None
    weight: tl.tensor,  # [C] float32 or None
    bias: tl.tensor,  # [C] float32 or None
    mean: tl.tensor,  # [C] float32
    var: tl.tensor,  # [C] float32
    dx: tl.tensor,  # [N, C, S] or None, written: outside training
    dresidual: tl.tensor,  # [N, C, S] or None, written
    partial: tl.tensor,  # [2, rows, C] float32, written: A and B; a row is a program's, or (chunk, n) if CHUNKED
    s: tl.tensor,  # [N, C] float32, written unless CHUNKED
    eps: tl.tensor,
    slope: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    group: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    ACTIVATION: tl.constexpr,
    CHUNKED: tl.constexpr,
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
    centre, inverse, scale, shift = affine(weight, bias, mean, var, eps, c, c < C)
    centres, scales, shifts = centre[None, :, None], scale[None, :, None], shift[None, :, None]
    plane = rows.to(tl.int64) * C
    all_a = tl.zeros([CHANNELS], tl.float32)
    all_b = tl.zeros([CHANNELS], tl.float32)
    for i in range(trips(tl.cdiv(tl.minimum(N - first, group), SAMPLES))):
        n = first + i * SAMPLES + tl.arange(0, SAMPLES)
        whose = (n < N)[:, None] & (c < C)[None, :]
        sum_a = tl.zeros([SAMPLES, CHANNELS, POSITIONS], tl.float32)
        sum_b = tl.zeros([SAMPLES, CHANNELS, POSITIONS], tl.float32)
        for j in range(trips(tl.cdiv(tl.minimum(S - begin, chunk), POSITIONS))):
            s0 = begin + j * POSITIONS
            here = whose[:, :, None] & (s0 + tl.arange(0, POSITIONS) < S)[None, None, :]
            start = origin(first + i * SAMPLES, c0, s0, C, S, LAST)
            value = loaded(x + start, offsets, here)
            dz = gradient_at(dy, value, mask, y, scales, shifts, slope, start, offsets, here, ACTIVATION)
            sum_a = tl.fma(value - centres, dz, sum_a)
            sum_b += dz
            if dresidual is not None:
                stored(dresidual + start, offsets, dz, here)
            if dx is not None:
                stored(dx + start, offsets, scales * dz, here)
        a, b = tl.sum(sum_a, 2) * inverse[None, :], tl.sum(sum_b, 2)
        if CHUNKED:
            at = ((row % chunks * N + n) * C)[:, None] + c[None, :]
            tl.store(partial + at, a, mask=whose)
            tl.store(partial + plane + at, b, mask=whose)
        else:
            gate = gate_gradient(weight, bias, a, b, c, c < C)
            tl.store(s + (n * C)[:, None] + c[None, :], gate, mask=whose)
            all_a += tl.sum(a, 0)
            all_b += tl.sum(b, 0)
    if not CHUNKED:
        tl.store(partial + row * C + c, all_a, mask=c < C)
        tl.store(partial + plane + row * C + c, all_b, mask=c < C)


@triton.jit
def gate_gradient(
    weight: tl.tensor, bias: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, here: tl.tensor
) -> tl.tensor:
    """weight·A + bias·B of [samples, channels]."""
    s = a
    if weight is not None:
        s = tl.load(weight + c, mask=here, other=0.0)[None, :] * a
    if bias is not None:
        s += tl.load(bias + c, mask=here, other=0.0)[None, :] * b
    return s


@kernel
def join_sums(
    partial: tl.tensor,  # [2, chunks, count, C] float32
    weight: tl.tensor,  # [C] float32 or None
    bias: tl.tensor,  # [C] float32 or None
    s: tl.tensor,  # [count, C] float32 or None, written
    dweight: tl.tensor,  # [C] float32, written
    dbias: tl.tensor,  # [C] float32, written
    count: tl.tensor,
    C: tl.tensor,
    chunks: tl.tensor,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    C = C // ALIGNED * ALIGNED
    c = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    all_a = tl.zeros([ROWS, CHANNELS], tl.float32)
    all_b = tl.zeros([ROWS, CHANNELS], tl.float32)
    plane = count.to(tl.int64) * C
    for i in range(trips(tl.cdiv(count, ROWS))):
        row = i * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at, here = (row * C)[:, None] + c[None, :], (row < count)[:, None] & (c < C)[None, :]
        a = tl.zeros([ROWS, CHANNELS], tl.float32)
        b = tl.zeros([ROWS, CHANNELS], tl.float32)
        for k in range(trips(chunks)):
            a += tl.load(partial + k * plane + at, mask=here, other=0.0)
            b += tl.load(partial + (chunks + k) * plane + at, mask=here, other=0.0)
        if s is not None:
            tl.store(s + at, gate_gradient(weight, bias, a, b, c, c < C), mask=here)
        all_a += a
        all_b += b
    tl.store(dweight + c, tl.sum(all_a, 0), mask=c < C)
    tl.store(dbias + c, tl.sum(all_b, 0), mask=c < C)


@kernel
def input_gradient(
    dy: tl.tensor,  # [N, C, S]
    x: tl.tensor,  # [N, C, S]
    mask: tl.tensor,  # [N, C, S] bytes or None
    y: tl.tensor,  # [N, C, S] or None
    weight: tl.tensor,  # [C] float32 or None
    bias: tl.tensor,  # [C] float32 or None
    mean: tl.tensor,  # [C] float32
    var: tl.tensor,  # [C] float32
    dweight: tl.tensor,  # [C] float32
    dbias: tl.tensor,  # [C] float32
    dx: tl.tensor,  # [N, C, S], written
    eps: tl.tensor,
    slope: tl.tensor,
    count: tl.tensor,  # of values behind each statistic: a float
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
    centre, inverse, scale, shift = affine(weight, bias, mean, var, eps, c, valid)
    level = tl.load(dbias + c, mask=valid, other=0.0) / count
    tilt = tl.load(dweight + c, mask=valid, other=0.0) * inverse / count
    value = loaded(x + start, offsets, here)
    dz = gradient_at(dy, value, mask, y, scale, shift, slope, start, offsets, here, ACTIVATION)
    stored(dx + start, offsets, scale * (dz - level - (value - centre) * tilt), here)


input_gradient_tuned = triton_tuning.tuned(input_gradient)


def batch_norm_act_backward(
    sizes: tuple[int, int, int],
    last: bool,
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    dx: Tensor,
    dresidual: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    s: Tensor,
    eps: float,
    training: bool,
    activation: int,
    slope: float,
) -> None:
    """Writes dx, dresidual, dweight, dbias and s from dense tensors, channels innermost if ``last``."""
    if x.numel() == 0:
        for sums in (dweight, dbias, s):
            sums.zero_()
        return
    mask = None if mask is None else mask.view(torch.uint8)
    told, statistics = (mask, y), (weight, bias, mean, var)
    written = (None if training else dx, dresidual, dweight, dbias, s)
    _sums(sizes, last, (dy, x, *told), statistics, written, eps, activation, slope)
    if not training:
        return
    if dresidual is not None and activation < LEAKY_RELU.value:  # it is dz, exactly
        dy, told, activation = dresidual, (None, None), NONE.value
    N, _, S = sizes
    triton_tuning.launch(
        input_gradient_tuned, sizes, last,
        dy, x, *told, *statistics, dweight, dbias, dx, eps, slope, float(N * S), ACTIVATION=activation,
    )  # fmt: skip


def _sums(
    sizes: tuple[int, int, int],
    last: bool,
    read: tuple[Tensor | None, ...],  # dy, x, mask, y
    statistics: tuple[Tensor | None, ...],  # weight, bias, mean, var
    written: tuple[Tensor | None, ...],  # dx, dresidual, dweight, dbias, s
    eps: float,
    activation: int,
    slope: float,
) -> None:
    N, C, S = sizes
    dx, dresidual, dweight, dbias, s = written
    assert dweight is not None
    cut = tiles(N, C, S, last)
    chunked = cut.chunks > 1
    count = N if chunked else cut.groups
    partial = torch.empty(2, cut.chunks, count, C, dtype=dweight.dtype, device=dweight.device)
    sums_of_tiles[(cut.programs,)](
        *read, *statistics, dx, dresidual, partial, s, eps, slope,
        N, C, S, cut.group, cut.chunk, cut.chunks, cut.chunks * count,
        activation, chunked, last, alignment(C if last else S), cut.wide, cut.samples, cut.channels, cut.positions,
        num_warps=cut.warps, maxnreg=_registers(read, last, S),
    )  # fmt: skip
    rows, channels = joining(count, C)
    join_sums[(triton.cdiv(C, channels),)](
        partial, *statistics[:2], s if chunked else None, dweight, dbias,
        count, C, cut.chunks, alignment(C), rows, channels,
    )  # fmt: skip


def _registers(read: tuple[Tensor | None, ...], last: bool, S: int) -> int | None:
    """How many a thread may have where the assembler, left alone, would rather spill a few than take one more."""
    if last:
        return None
    dy = read[0]
    assert dy is not None
    return 96 if dy.itemsize == 2 and S % 8 == 0 else 168
