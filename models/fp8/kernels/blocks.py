"""What several kernels do inside: one block of 128 values to E4M3 and its scale, and SwiGLU.

Functions that run in a kernel, on tiles in registers; they touch no memory, except to note
infinities. Rules and bits are those of `models/fp8/reference/quantize.py`. Two things on a GPU
differ from the plain expression and are therefore spelled out:

- `a / b` in a kernel is a fast division, off by up to two units in the last place. A scale that is
  rounded down to a power of two must come from the correctly rounded quotient (`div_rn`), or a
  block whose quotient is a power of two loses an octave. (With Triton 3.6 on an H100 the fast one
  gave the same scale for every float32, all of them tried. Nothing promises that.)
- A maximum may or may not skip NaN, so NaN is taken out before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.tensor import BLOCK, Layout, ceil_div, scale_shape

E4M3_MAX = tl.constexpr(448.0)
EXPONENT_BITS = tl.constexpr(-0x0080_0000)  # 0xff80_0000: sign and exponent, no mantissa
WIDTH = tl.constexpr(BLOCK)


@triton.jit
def magnitude(x):
    """`|x|` for the maximum of a block: NaN counts as zero."""
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def scale_from_amax(amax, dtype_max):
    """The factor to multiply a block by, of the shape of `amax`; `reference._scale_from_amax`."""
    scale = tl.div_rn(tl.full(amax.shape, E4M3_MAX, tl.float32), amax)
    scale = tl.where(scale == float("inf"), dtype_max, scale)
    scale = (scale.to(tl.int32, bitcast=True) & EXPONENT_BITS).to(tl.float32, bitcast=True)
    return tl.where((amax == 0) | (amax == float("inf")), 1.0, scale)


@triton.jit
def reciprocal(scale):
    """`1 / scale`, correctly rounded; 2^-127 for the largest scale, which is subnormal."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def to_e4m3(x):
    """float32 to E4M3, to nearest even, saturating; NaN becomes 0x7f."""
    x = tl.clamp(x, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float8e4nv)


@triton.jit
def quantize_rows(x, dtype_max):
    """Blocks `[n, 128]` float32 to E4M3 bytes `[n, 128]` and `scale_inv` `[n]`."""
    scale = scale_from_amax(tl.max(magnitude(x), 1), dtype_max)
    return to_e4m3(x * scale[:, None]), reciprocal(scale)


@triton.jit
def note_infinities(x, note_ptr):
    """`overflow.look` at a tile: stores that all but never happen cost less than a maximum."""
    found = tl.abs(x.to(tl.float32)) == float("inf")
    tl.store(note_ptr + tl.zeros(x.shape, tl.int32), 1, mask=found)


@triton.jit
def in_use(count, per_row, offsets_ptr, experts):
    """Of `count` things, `per_row` in each row, those before the end of the last expert's segment;
    see `end_of`."""
    stop = count
    if offsets_ptr is not None:
        stop = tl.minimum(count, tl.load(offsets_ptr + experts).to(tl.int32) * per_row)
    return stop


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


def end_of(offsets: Tensor | None) -> tuple[Tensor | None, int]:
    """Arguments of a kernel that calls `in_use`: where experts' segments end, int64 `[E + 1]`, and
    the place of the last end; without them all rows are in use."""
    return offsets, 0 if offsets is None else offsets.numel() - 1


def scale_strides(rows: int, cols: int, layout: Layout) -> tuple[int, int, int]:
    """Elements from one row's scale to the next, from one block's to the next, and rows stored.

    Rows stored include those that round GEMM_READY up to four; a kernel writes zeros there.
    """
    if layout is Layout.COMPACT:
        return ceil_div(cols, BLOCK), 1, rows
    stored = scale_shape(rows, cols, layout)[1]
    return 1, stored, stored


def check_whole_blocks(cols: int, name: str = "K") -> None:
    """The kernels take whole blocks; the reference pads a partial one."""
    if cols % BLOCK:
        raise ValueError(f"{name} must be a multiple of {BLOCK} for this kernel, got {cols}")


def dtype_max(dtype: torch.dtype) -> float:
    """Stands in for a scale that overflows: the largest value of the input's dtype."""
    return torch.finfo(dtype).max
