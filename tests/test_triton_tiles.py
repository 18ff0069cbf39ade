"""How reductions are cut into tiles, and that places in large tensors are computed in 64 bits."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from taylorkern.backends import triton_tiles
from taylorkern.backends.triton_formula import kernel, origin, place, tile_of_rows, within
from taylorkern.backends.triton_tiles import alignment, fitting, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 1, 1), (7, 5, 1), (3, 9, 11), (256, 64, 12544), (256, 2048, 49), (256, 30, 3135), (65536, 1000, 1)]
SIZES += [(1, 1, 70001), (2, 3, 1 << 24), (100_000, 3, 5), (31, 1, 1 << 20), (1, 70_000, 2), (128, 24, 196)]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_programs_cover_each_element_once_and_none_is_idle(sizes, last):
    N, C, S = sizes
    cut = tiles(N, C, S, last)
    for size, block in ((C, cut.channels), (N, cut.samples), (S, cut.positions)):
        assert block & (block - 1) == 0
        assert block < 2 * size
    # what a program takes are [i * share, (i + 1) * share) of each size: they cover it, and none begins behind its end
    for size, share, count in ((C, cut.channels, cut.columns), (N, cut.group, cut.groups), (S, cut.chunk, cut.chunks)):
        assert (count - 1) * share < size <= count * share
    assert cut.group % cut.samples == 0 and (cut.chunks == 1 or cut.chunk % cut.positions == 0)
    assert cut.group == cut.samples or cut.chunks == 1
    assert cut.programs < 2**31
    assert 32 <= cut.warps * 32 <= 256 and cut.samples * cut.channels * cut.positions <= 2048


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    ("C", "S"), [(64, 12544), (64, 3136), (256, 3136), (128, 784), (512, 784), (1024, 196), (2048, 49)]
)
def test_a_large_device_is_filled_and_partial_sums_are_small(C, S, last):
    """Of ResNet-50's batch normalisations at batch 256."""
    cut = tiles(256, C, S, last)
    assert cut.programs >= 2 * 132
    rows = cut.chunks * 256 if cut.chunks > 1 else cut.groups
    assert 2 * 4 * rows * C * 2 < 0.04 * 5 * 2 * 256 * C * S  # A and B, written and read; five passes of bfloat16
    steps = -(-cut.group // cut.samples) * -(-min(cut.chunk, S) // cut.positions)
    assert steps <= 2 * triton_tiles.LONGEST


def test_the_longest_sum_of_one_program_is_bounded():
    for sizes, last in itertools.product(SIZES, (True, False)):
        cut = tiles(*sizes, last)
        steps = -(-cut.group // cut.samples) * -(-min(cut.chunk, sizes[2]) // cut.positions)
        assert steps <= 3 * triton_tiles.LONGEST, (sizes, last)


def test_fitting_and_alignment():
    assert [fitting(size, 64, 1) for size in (1, 3, 49, 64, 65, 196, 3136)] == [1, 1, 8, 64, 8, 32, 64]
    assert [fitting(size, 64, 16) for size in (1, 3, 49, 64, 65, 196)] == [1, 4, 64, 64, 16, 32]
    assert [alignment(size) for size in (1, 6, 24, 48, 64)] == [1, 2, 8, 16, 16]


def test_places_in_large_tensors_take_64_bits():
    @kernel
    def places(
        out, C, S, group, chunk, chunks,
        LAST: tl.constexpr, WIDE: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    ):  # fmt: skip
        n, s, c, _ = place(C, group, chunk, chunks, CHANNELS, POSITIONS)
        start = origin(n, c, s, C, S, LAST)
        offsets = start + within(C, S, LAST, WIDE, SAMPLES, CHANNELS, POSITIONS)
        at = tl.arange(0, SAMPLES)[:, None, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :, None]
        at = at * POSITIONS + tl.arange(0, POSITIONS)[None, None, :]
        tl.store(out + tl.program_id(0) * SAMPLES * CHANNELS * POSITIONS + at, offsets)

    columns, groups, chunks = 2, 3, 2
    # sizes of 32 bits whose products have more, and a tile that spans more than 32 bits hold
    for (C, S, group, chunk, wide), last in itertools.product(
        [(4, (1 << 30) + 8, 2, 1 << 29, True), (3, (1 << 29) + 5, 1, 1 << 28, False)], (True, False)
    ):
        SAMPLES, CHANNELS, POSITIONS = (2 if wide else 1), 2, 4
        out = torch.zeros(columns * groups * chunks, SAMPLES, CHANNELS, POSITIONS, dtype=torch.int64, device=DEVICE)
        places[(len(out),)](out, C, S, group, chunk, chunks, last, wide, SAMPLES, CHANNELS, POSITIONS)
        for program, n, c, s in itertools.product(range(len(out)), range(SAMPLES), range(CHANNELS), range(POSITIONS)):
            row, column = divmod(program, columns)
            i, j, k = row // chunks * group + n, column * CHANNELS + c, row % chunks * chunk + s
            want = (i * S + k) * C + j if last else (i * C + j) * S + k
            assert int(out[program, n, c, s]) == want


def test_rows_of_large_tensors_take_64_bits():
    @kernel
    def places(out, rows, length, C, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr):
        start, offsets, _, _, _ = tile_of_rows(rows, length, C, LAST, WIDE, BLOCK, RUN)
        ROWS: tl.constexpr = BLOCK // RUN
        at = tl.arange(0, ROWS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
        tl.store(out + tl.program_id(0) * BLOCK + at, start + offsets)

    length, run = (1 << 30) + 16, 1 << 29
    for last in (True, False):
        columns = triton.cdiv(length, run)
        # of every program only the first elements of its rows: RUN itself would be too long
        out = torch.zeros(4 * columns, 4, 2, dtype=torch.int64, device=DEVICE)
        places[(len(out),)](out, 16, 2 * len(out) // 4, 7, last, True, 8, 2)
        short = 2 * len(out) // 4
        for program, r, i in itertools.product(range(len(out)), range(4), range(2)):
            row, column = divmod(len(out) - 1 - program, triton.cdiv(short, 2))
            assert int(out[program, r, i]) == (row * 4 + r) * short + column * 2 + i


@pytest.mark.parametrize("last", [True, False])
def test_tiles_that_reach_far_are_known(last):
    assert not tiles(256, 64, 3136, last).wide
    assert not tiles(3, 64, 1 << 26, last).wide  # far apart, but each tile is near itself
    assert tiles(1 << 10, 1 << 27, 1, last).wide == last
