"""How a tensor is cut into tiles, and tiles are shared out among programs: host arithmetic without Triton.

The order of a sum depends on its tiles, so they are chosen by the tensor's sizes alone and never tuned: the same inputs
give the same bits on every run. Passes that work element by element are the tuned ones, for there no bit can change.
"""

from dataclasses import dataclass
from functools import lru_cache

WARPS = 8
SHARE = 8  # elements of a tile per thread, which leaves it registers enough; half where they are loaded singly
COLUMN = 64  # channels of a tile of channels_last, whole cache lines
RUN = 512  # positions of a tile of channels_first
PROGRAMS = 2112  # that fill a large device well: 16 on each of 132 multiprocessors
ENOUGH = 264  # that keep all of it busy; with fewer, tiles are made smaller
LONGEST = 64  # tiles that one program adds up, so that float32 is enough
LEAST_CHUNK = 256  # positions behind one partial sum, so that these are small beside the tensor
REGISTERS = 168  # a thread's; left alone, the assembler rather spills a few than takes more than half as many
REACH = 2**31 - 1  # what an offset of 32 bits holds


@dataclass(frozen=True)
class Tiles:
    """A tile spans ``samples`` by ``channels`` by ``positions``, powers of two.

    A program takes a column of ``channels``, ``group`` samples and ``chunk`` positions of each: there are ``columns``
    by ``groups`` by ``chunks`` of them, and none is without work. A program with more samples than a tile's has them
    whole.
    """

    samples: int
    channels: int
    positions: int
    group: int
    chunk: int
    columns: int
    groups: int
    chunks: int
    warps: int
    wide: bool  # whether offsets in a tile may need 64 bits

    @property
    def programs(self) -> int:
        return self.columns * self.groups * self.chunks

    @property
    def rows(self) -> int:
        """Programs per column: how many partial sums of a channel there are."""
        return self.groups * self.chunks


@lru_cache(maxsize=1024)
def tiles(N: int, C: int, S: int, last: bool) -> Tiles:
    """The tiles of a tensor [N, C, S] with elements, for a reduction over positions and perhaps samples."""
    share = SHARE if (C if last else S) % 4 == 0 else SHARE // 2
    samples, channels, positions = _extents(N, C, S, last, WARPS * 32 * share)
    columns, steps, runs = -(-C // channels), -(-N // samples), -(-S // positions)
    wanted = -(-max(PROGRAMS, columns * steps * runs // LONGEST) // columns)  # programs of a column
    group, chunk = samples, S
    if steps >= wanted:
        group *= -(-steps // wanted)
    else:
        parts = min(-(-wanted // steps), max(1, S // LEAST_CHUNK), runs)
        chunk = -(-runs // parts) * positions
    warps = max(1, min(WARPS, samples * channels * positions // (32 * share)))
    step_c, step_s = (1, C) if last else (S, 1)
    extent = (samples - 1) * C * S + (channels - 1) * step_c + (positions - 1) * step_s
    groups, chunks = -(-N // group), -(-S // chunk)
    return Tiles(samples, channels, positions, group, chunk, columns, groups, chunks, warps, extent > REACH)


def _extents(N: int, C: int, S: int, last: bool, size: int) -> tuple[int, int, int]:
    """Samples, channels and positions of a tile of ``size`` elements, or fewer where there aren't so many."""
    if last:
        channels = min(power(C), COLUMN)
        positions = fitting(S, size // channels, max(1, size // channels // _spare(N, C, channels)))
    else:
        positions = fitting(S, RUN, RUN // 4)
        channels = min(power(C), size // positions)
    return min(_spare(N, C, channels), size // (channels * positions)), channels, positions


def _spare(N: int, C: int, channels: int) -> int:
    """Samples in a tile that leave programs enough: a power of two."""
    columns = -(-C // channels)
    return min(power(columns * N // ENOUGH + 1) // 2 or 1, power(N))


def fitting(size: int, most: int, least: int) -> int:
    """The largest power of two, of ``least`` to ``most``, whose tiles overhang ``size`` by a sixth at most.

    Where there is none, the one that overhangs least.
    """
    top = min(power(size), most)
    candidates = [top >> i for i in range(top.bit_length()) if top >> i >= min(least, top)]
    overhang = {p: -size % p for p in candidates}
    return next((p for p in candidates if overhang[p] * 6 <= size), min(candidates, key=overhang.__getitem__))


def power(size: int) -> int:
    """The first power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def alignment(size: int) -> int:
    """The largest power of two up to 16 that divides ``size``: what loads along it may rely on."""
    return min(size & -size, 16)
