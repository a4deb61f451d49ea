"""Rows to their experts and back: bytes move, and only unpermute adds.

Permuting is a gather. Each program owns a few permuted rows, looks up what they are copied from
(`plan_rows` leaves that inverse behind) and writes them whole, zeros if they are padding. So every
byte of the result is written once, by one kernel, with no pass before it that fills with zeros.
Rows after the last expert's segment are not written: nothing reads them.
FP8 rows and their scales go in the same program: K bytes and K / 32 bytes of scales are read and
written for each of P rows, 2 * P * K * 33 / 32 in all. A token for several local experts is read
once for each of them, which often costs no memory traffic: its second read finds it in L2.

Data moves as 32-bit words, four to a thread, whatever its dtype.

Unpermuting is a gather too: each program owns a few of the R rows and adds the copies of each, slot
after slot, in float32. The order is fixed, so the bits are always the same; no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.kernels.blocks import end_of, in_use
from models.fp8.kernels.plan_rows import inverse
from models.fp8.reference.plan_rows import RowMap
from models.fp8.tensor import (
    BLOCK,
    SCALE_ALIGN,
    BlockScaledTensor,
    Layout,
    ceil_div,
    row_view,
    scale_shape,
)

WORDS = 4096  # 32-bit words that a program moves: 128 bytes a thread
SUMS = 2048  # elements of the result that an unpermute program computes


def permute(x: Tensor, row_map: RowMap) -> Tensor:
    """`x [R, K]` to `[P, K]`, of any dtype, bit for bit; padding rows are zero.

    Rows after the last segment, where P is `max_rows`, are undefined. Raises ValueError if x has
    another number of rows than the plan, or if the bytes of a row are not a multiple of 4.
    """
    _check_length(x, row_map.rows.shape[0])
    out = torch.empty(row_map.num_rows, x.shape[1], dtype=x.dtype, device=x.device)
    _permute(x, out, row_map)
    return out


def permute_scaled(
    x: BlockScaledTensor, row_map: RowMap, layout: Layout = Layout.COMPACT
) -> BlockScaledTensor:
    """`permute` for data and scales, COMPACT in, `layout` out. Bytes move; no value is computed.

    Padding rows have zero data and zero scales, so they stay zero whatever multiplies them; rows
    after the last segment are undefined. Raises ValueError unless the scales are COMPACT, for
    another number of rows than the plan's, and if K is not a multiple of 4.
    """
    if x.layout is not Layout.COMPACT:
        raise ValueError(f"permute moves COMPACT scales, got {x.layout.name}; call relayout first")
    _check_length(x.data, row_map.rows.shape[0])
    rows = row_map.num_rows
    data = torch.empty(rows, x.cols, dtype=x.data.dtype, device=x.device)
    shape = scale_shape(rows, x.cols, layout)
    # GEMM_READY rounds rows up to four, with zeros; plans of whole blocks have none to round.
    new = torch.zeros if layout is Layout.GEMM_READY and rows % SCALE_ALIGN else torch.empty
    scale_inv = new(shape, dtype=torch.float32, device=x.device)
    _permute(x.data, data, row_map, x.scale_inv, row_view(scale_inv, rows, layout))
    return BlockScaledTensor(data, scale_inv, layout)


def _permute(
    x: Tensor,
    out: Tensor,
    row_map: RowMap,
    scales: Tensor | None = None,
    out_scales: Tensor | None = None,
) -> None:
    """Writes `out [P, K]`, and `out_scales [P, blocks]`, a view in any layout, if there are."""
    if x.shape[1] * x.element_size() % 4:
        raise ValueError(f"a row must be a multiple of 4 bytes, got {x.shape[1]} of {x.dtype}")
    if not out.numel():
        return
    words = out.view(torch.int32).shape[1]
    x = x.contiguous().view(torch.int32)
    # A power of two, as tiles are, that wastes no lanes if the row is a multiple of it.
    width = min(max(words & -words, BLOCK // 4), 1024)
    tiles = ceil_div(words, width)
    rows = WORDS // width
    _permute_kernel[(ceil_div(row_map.num_rows, rows) * tiles,)](
        x, out.view(torch.int32), scales, out_scales, inverse(row_map), *end_of(row_map.offsets),
        row_map.num_rows, row_map.rows.shape[1], words, tiles,
        0 if scales is None else scales.shape[1],
        *((0, 0) if out_scales is None else out_scales.stride()),
        ROWS=rows, WIDTH=width, SCALES=0 if scales is None else max(width // (BLOCK // 4), 1),
    )  # fmt: skip


@triton.jit
def _permute_kernel(
    x_ptr, out_ptr, scales_ptr, out_scales_ptr, source_ptr, offsets_ptr, experts, num_rows, slots,
    words, tiles, blocks, stride_row, stride_block,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(source_ptr + row, mask=row < num_rows, other=-1)
    source = (slot // slots).to(tl.int64)
    row = row.to(tl.int64)
    ours = (slot >= 0)[:, None]
    real = (row < in_use(num_rows, 1, offsets_ptr, experts))[:, None]

    word = (tile * WIDTH + tl.arange(0, WIDTH))[None, :]
    x = tl.load(x_ptr + source[:, None] * words + word, mask=ours & (word < words), other=0)
    tl.store(out_ptr + row[:, None] * words + word, x, mask=real & (word < words))

    if SCALES:
        block = (tile * SCALES + tl.arange(0, SCALES))[None, :]
        s = tl.load(
            scales_ptr + source[:, None] * blocks + block, mask=ours & (block < blocks), other=0.0
        )
        at = row[:, None] * stride_row + block * stride_block
        tl.store(out_scales_ptr + at, s, mask=real & (block < blocks))


def permute_probs(weights: Tensor, row_map: RowMap) -> Tensor:
    """Routing weights `[R, T]` to `[P]`: the weight of each permuted row, 0 for padding."""
    _check_length(weights, row_map.rows.shape[0])
    out = torch.empty(row_map.num_rows, dtype=weights.dtype, device=weights.device)
    _gather(weights.contiguous(), inverse(row_map), out)
    return out


def unpermute_probs(p: Tensor, row_map: RowMap) -> Tensor:
    """`p [P]` to `[R, T]`: each copy's value back in its slot, 0 where there is none."""
    _check_length(p, row_map.num_rows)
    out = torch.empty(row_map.rows.shape, dtype=p.dtype, device=p.device)
    _gather(p.contiguous(), row_map.rows, out)
    return out


def _gather(values: Tensor, index: Tensor, out: Tensor) -> None:
    """`out[i] = values[index[i]]`, 0 where the index is -1; all three as if they were flat."""
    if out.numel():
        _gather_kernel[(ceil_div(out.numel(), 1024),)](values, index, out, out.numel(), SIZE=1024)


@triton.jit
def _gather_kernel(values_ptr, index_ptr, out_ptr, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    index = tl.load(index_ptr + at, mask=at < size, other=-1)
    values = tl.load(values_ptr + index, mask=index >= 0, other=0.0)
    tl.store(out_ptr + at, values, mask=at < size)


def unpermute(y: Tensor, row_map: RowMap) -> Tensor:
    """`y [P, K]` (bfloat16 or float32) to `[R, K]`: the sum of each row's copies.

    Zero for a row without any. Adds in the order of the T slots, starting from zero, in float32,
    and rounds once to y's dtype: the bits of `reference.unpermute`. Raises ValueError if y has
    another number of rows than the plan.
    """
    _check_length(y, row_map.num_rows)
    received, slots = row_map.rows.shape
    cols = y.shape[1]
    out = torch.empty(received, cols, dtype=y.dtype, device=y.device)
    if out.numel():
        width = min(max(cols & -cols, BLOCK), 1024)
        tiles = ceil_div(cols, width)
        rows = SUMS // width
        _unpermute_kernel[(ceil_div(received, rows) * tiles,)](
            y.contiguous(), out, row_map.rows, received, cols, tiles,
            SLOTS=slots, ROWS=rows, WIDTH=width,
        )  # fmt: skip
    return out


@triton.jit
def _unpermute_kernel(
    y_ptr, out_ptr, rows_ptr, received, cols, tiles,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tile * WIDTH + tl.arange(0, WIDTH))[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    # Unrolled, so that the loads of all slots are in flight before the first is added.
    for slot in tl.static_range(SLOTS):
        copy = tl.load(rows_ptr + row * SLOTS + slot, mask=row < received, other=-1)[:, None]
        y = tl.load(y_ptr + copy * cols + col, mask=(copy >= 0) & (col < cols), other=0.0)
        total += y.to(tl.float32)
    real = (row < received)[:, None] & (col < cols)
    tl.store(out_ptr + row[:, None] * cols + col, total.to(out_ptr.dtype.element_ty), mask=real)


def _check_length(x: Tensor, rows: int) -> None:
    if x.shape[0] != rows:
        raise ValueError(f"the row map is for {rows} rows, got {list(x.shape)}")
