"""The arithmetic of ``csrc/formula.h`` and the places of a program's tiles, for all kernels in Triton.

Kernels compute in float32: what is loaded is converted at once, also because Triton's interpreter would compute on
bfloat16's bits. Pointers may be None, which a kernel knows when it is compiled.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # what the decorators below have looked at

if INTERPRETED and isinstance(tl.sum, triton.JITFunction):
    raise RuntimeError("TRITON_INTERPRET was set when triton had been imported; set it before, or not at all")
TRUNCATES: tl.constexpr = tl.constexpr(INTERPRETED)  # the interpreter cuts bfloat16 off, where a GPU rounds it
SIZES = ("N", "C", "S", "group", "chunk", "chunks", "rows", "length", "count", "bucket")

# The codes of ops.h
NONE: tl.constexpr = tl.constexpr(0)
RELU: tl.constexpr = tl.constexpr(1)
RELU6: tl.constexpr = tl.constexpr(2)
LEAKY_RELU: tl.constexpr = tl.constexpr(3)
SILU: tl.constexpr = tl.constexpr(4)


def kernel(function: Callable) -> Any:
    """Compiles a function whose sizes may change without another compilation: what matters of them are constants."""
    return triton.jit(function, do_not_specialize=SIZES)


def _number(count: Any) -> Any:
    return int(count.handle.data.item()) if isinstance(count, tl.tensor) else count


@triton.jit
def _itself(count: tl.tensor) -> tl.tensor:
    return count


# A number as a loop's end. The interpreter of Triton 3.6 can't make one of a NumPy array itself, from NumPy 2.4 on.
trips = _number if INTERPRETED else _itself


@triton.jit
def apply(z: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """act(z); a NaN stays one."""
    if ACTIVATION == NONE:
        return z
    elif ACTIVATION == RELU:
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == RELU6:
        low = tl.where(z <= 0, 0.0, z)
        return tl.where(low >= 6, 6.0, low)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z > 0, z, z * slope)
    elif ACTIVATION == SILU:
        return z / (1.0 + tl.exp(-z))
    else:
        low = tl.where(z + 3.0 <= 0, 0.0, z + 3.0)
        return z * tl.where(low >= 6, 6.0, low) / 6.0


@triton.jit
def passes(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Where act'(z) is 1."""
    if ACTIVATION == RELU:
        return (z <= 0) == 0
    elif ACTIVATION == RELU6:
        return ((z <= 0) | (z >= 6)) == 0
    elif ACTIVATION == LEAKY_RELU:
        return z > 0
    else:
        return z == z


@triton.jit
def gradient_told(through: tl.tensor, dy: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """dL/dz where it is known which elements pass."""
    if ACTIVATION == NONE:
        return dy
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(through, dy, dy * slope)
    else:
        return tl.where(through, dy, 0.0)


@triton.jit
def gradient(z: tl.tensor, dy: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """dL/dz from z."""
    if ACTIVATION == NONE:
        return dy
    elif ACTIVATION <= LEAKY_RELU:
        return gradient_told(passes(z, ACTIVATION), dy, slope, ACTIVATION)
    elif ACTIVATION == SILU:
        share = 1.0 / (1.0 + tl.exp(-z))
        return dy * share * (1.0 + z * (1.0 - share))
    else:
        between = tl.where(z <= -3, 0.0, dy * (z / 3.0 + 0.5))
        return tl.where(z >= 3, dy, between)


@triton.jit
def loaded(pointer: tl.tensor, offsets: tl.tensor, here: tl.tensor) -> tl.tensor:
    return tl.load(pointer + offsets, mask=here, other=0.0).to(tl.float32)


@triton.jit
def stored(pointer: tl.tensor, offsets: tl.tensor, value: tl.tensor, here: tl.tensor) -> None:
    """Rounds to nearest, ties to even."""
    if TRUNCATES and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16 << 16).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=here)


@triton.jit
def affine(
    weight: tl.tensor, bias: tl.tensor, mean: tl.tensor, var: tl.tensor, eps: tl.tensor, c: tl.tensor, here: tl.tensor
) -> tl.tensor:
    """Mean, 1 / std, scale and shift of channels: z = fma(x, scale, shift), in forward and backward alike."""
    centre = tl.load(mean + c, mask=here, other=0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + c, mask=here, other=1.0) + eps))
    scale = inverse
    if weight is not None:
        scale = tl.load(weight + c, mask=here, other=0.0) * inverse
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift = tl.load(bias + c, mask=here, other=0.0)
    return centre, inverse, scale, tl.fma(-centre, scale, shift)


@triton.jit
def place(
    C: tl.tensor,
    group: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
) -> tl.tensor:
    """Of this program: its first sample, position and channel, and the row of its partial sums; 64 bits each."""
    chunk = tl.cdiv(chunk, POSITIONS) * POSITIONS  # itself where there is another: now the compiler knows
    program = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(C, CHANNELS)
    row = program // columns
    return row // chunks * group, row % chunks * chunk, program % columns * CHANNELS, row


@triton.jit
def origin(n: tl.tensor, c: tl.tensor, s: tl.tensor, C: tl.tensor, S: tl.tensor, LAST: tl.constexpr) -> tl.tensor:
    """The offset of element (n, c, s), of 64 bits as n, c and s are."""
    if LAST:
        return n * S * C + s * C + c
    else:
        return n * C * S + c * S + s


@triton.jit
def within(
    C: tl.tensor,
    S: tl.tensor,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
) -> tl.tensor:
    """Offsets from a tile's first element, [SAMPLES, CHANNELS, POSITIONS]: of 32 bits, which are faster, or of 64."""
    n = tl.arange(0, SAMPLES)[:, None, None]
    c = tl.arange(0, CHANNELS)[None, :, None]
    s = tl.arange(0, POSITIONS)[None, None, :]
    if WIDE:
        n, c, s = n.to(tl.int64), c.to(tl.int64), s.to(tl.int64)
    return origin(n, c, s, C, S, LAST)


@triton.jit
def tile_of_rows(
    rows: tl.tensor,
    length: tl.tensor,
    C: tl.tensor,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """Of an element-wise program: its tile's offset, offsets from there and which of them are elements, [rows, RUN];
    and their channels, [1, RUN] or [rows, 1], and which of these there are.

    The first program takes the last tile, which the pass before has left in the cache.
    """
    ROWS: tl.constexpr = BLOCK // RUN if BLOCK > RUN else 1
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    columns = tl.cdiv(length, RUN)
    r0, i0 = program // columns * ROWS, program % columns * RUN
    r, i = tl.arange(0, ROWS)[:, None], tl.arange(0, RUN)[None, :]
    valid_r, valid_i = r0 + r < rows, i0 + i < length
    here = valid_r & valid_i
    offsets = (r.to(tl.int64) if WIDE else r) * length + i
    if LAST:
        return r0 * length + i0, offsets, here, i0 + i, valid_i
    else:
        return r0 * length + i0, offsets, here, (r0 + r) % C, valid_r
