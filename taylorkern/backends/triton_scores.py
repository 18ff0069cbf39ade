"""channel_scores in Triton: s[n, c] = Σ_S a·g, read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_formula import kernel, loaded, origin, place, trips, within
from .triton_tiles import alignment, tiles

BLOCK = 512


@kernel
def score_tiles(
    a: tl.tensor,  # [N, C, S]
    g: tl.tensor,  # [N, C, S]
    out: tl.tensor,  # [chunks, N, C] float32, written
    N: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    group: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
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
    for i in range(trips(tl.cdiv(tl.minimum(N - first, group), SAMPLES))):
        n = first + i * SAMPLES + tl.arange(0, SAMPLES)
        whose = (n < N)[:, None] & (c < C)[None, :]
        total = tl.zeros([SAMPLES, CHANNELS, POSITIONS], tl.float32)
        for j in range(trips(tl.cdiv(tl.minimum(S - begin, chunk), POSITIONS))):
            s0 = begin + j * POSITIONS
            here = whose[:, :, None] & (s0 + tl.arange(0, POSITIONS) < S)[None, None, :]
            start = origin(first + i * SAMPLES, c0, s0, C, S, LAST)
            total = tl.fma(loaded(a + start, offsets, here), loaded(g + start, offsets, here), total)
        tl.store(out + ((row % chunks * N + n) * C)[:, None] + c[None, :], tl.sum(total, 2), mask=whose)


@kernel
def join_chunks(
    partial: tl.tensor,  # [chunks, count] float32
    s: tl.tensor,  # [count] float32, written
    count: tl.tensor,
    chunks: tl.tensor,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    count = count // ALIGNED * ALIGNED
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(trips(chunks)):
        total += tl.load(partial + k * count.to(tl.int64) + at, mask=at < count, other=0.0)
    tl.store(s + at, total, mask=at < count)


def channel_scores(sizes: tuple[int, int, int], last: bool, a: Tensor, g: Tensor, s: Tensor) -> None:
    """Writes ``s`` [N, C] from dense ``a`` and ``g``, channels innermost if ``last``."""
    N, C, S = sizes
    if a.numel() == 0:
        s.zero_()
        return
    cut = tiles(N, C, S, last)
    out = s if cut.chunks == 1 else torch.empty(cut.chunks, N, C, dtype=s.dtype, device=s.device)
    score_tiles[(cut.programs,)](
        a, g, out, N, C, S, cut.group, cut.chunk, cut.chunks,
        last, alignment(C if last else S), cut.wide, cut.samples, cut.channels, cut.positions, num_warps=cut.warps,
    )  # fmt: skip
    if cut.chunks > 1:
        join_chunks[(triton.cdiv(N * C, BLOCK),)](out, s, N * C, cut.chunks, alignment(N * C), BLOCK)
