"""bfloat16 or float32 to FP8 blocks, and back: each value is read once and written once.

`quantize` is memory-bound: per block of 128 it reads 256 bytes of bfloat16 and writes 128 bytes and
a scale of 4, so 16,384 x 2048 moves 102 MB. A program takes 32 blocks, 64 bytes of input for each
of its threads, which is enough in flight to keep the memory busy.

Which 32 blocks is chosen so that their scales lie together. GEMM_READY: the same block of 32
neighbouring rows; next to it run the programs with the neighbouring blocks of those rows. COMPACT:
the next 32 in memory, whatever row they are in. That needs no code of its own: a contiguous
`[M, K]` is also a `[M * K / 128, 128]`, and with one block a row both layouts are the same.

`quantize_columns` reads 128 x 64 tiles and transposes them in registers; `quantize_weights` reads
128 x 128 tiles; `dequantize` is quantize backwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.kernels.blocks import (
    WIDTH,
    check_whole_blocks,
    dtype_max,
    end_of,
    in_use,
    magnitude,
    quantize_rows,
    reciprocal,
    scale_from_amax,
    scale_strides,
    to_e4m3,
)
from models.fp8.tensor import (
    BLOCK,
    E4M3,
    BlockScaledTensor,
    BlockScaledWeights,
    Layout,
    ceil_div,
    scale_shape,
)

ROWS = 32  # blocks a program takes
COLUMNS = 64  # columns a program takes when it quantizes along them


def quantize(x: Tensor, layout: Layout) -> BlockScaledTensor:
    """Quantizes `x [M, K]` (bfloat16 or float32) in blocks of 1 x 128 along K.

    The bits of `reference.quantize`. Gradients do not pass. Raises TypeError for another dtype,
    ValueError for another rank or if K is not a multiple of 128.
    """
    _check_input(x, 2)
    rows, cols = x.shape
    check_whole_blocks(cols)
    x = x.contiguous()
    blocks = cols // BLOCK
    data = torch.empty(rows, cols, dtype=E4M3, device=x.device)
    scale_inv = torch.empty(scale_shape(rows, cols, layout), dtype=torch.float32, device=x.device)
    if layout is Layout.COMPACT:  # as a matrix with one block a row; see the top of the file
        view_rows, view_blocks, stored = rows * blocks, 1, rows * blocks
    else:
        view_rows, view_blocks, stored = rows, blocks, scale_inv.shape[1]
    if x.numel():
        _quantize_kernel[(ceil_div(stored, ROWS) * view_blocks,)](
            x, data, scale_inv, view_rows, view_blocks, stored, dtype_max(x.dtype), ROWS=ROWS,
        )  # fmt: skip
    return BlockScaledTensor(data, scale_inv, layout)


@triton.jit
def _quantize_kernel(
    x_ptr, data_ptr, scale_ptr, rows, blocks, stored, dtype_max, ROWS: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take neighbouring blocks of the same rows.
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = ((row * blocks + block) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    real = (row < rows)[:, None]
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    data, scale_inv = quantize_rows(x, dtype_max)
    tl.store(data_ptr + at, data, mask=real)
    scale_inv = tl.where(row < rows, scale_inv, 0.0)
    tl.store(scale_ptr + block.to(tl.int64) * stored + row, scale_inv, mask=row < stored)


def quantize_columns(x: Tensor, layout: Layout) -> BlockScaledTensor:
    """Quantizes `x [M, K]` in blocks of 128 x 1 along M; the result is transposed, `[K, M]`.

    The bits of `reference.quantize_columns`. Errors as `quantize`, for M.
    """
    _check_input(x, 2)
    rows, cols = x.shape
    check_whole_blocks(rows, "M")
    x = x.contiguous()
    data = torch.empty(cols, rows, dtype=E4M3, device=x.device)
    scale_inv = torch.empty(scale_shape(cols, rows, layout), dtype=torch.float32, device=x.device)
    stride_col, stride_block, stored = scale_strides(cols, rows, layout)
    tiles = ceil_div(stored, COLUMNS)
    if x.numel():
        _quantize_columns_kernel[(tiles * (rows // BLOCK),)](
            x, data, scale_inv, rows, cols, tiles, stride_col, stride_block, stored,
            dtype_max(x.dtype), COLUMNS=COLUMNS,
        )  # fmt: skip
    return BlockScaledTensor(data, scale_inv, layout)


@triton.jit
def _quantize_columns_kernel(
    x_ptr, data_ptr, scale_ptr, rows, cols, tiles, stride_col, stride_block, stored,
    dtype_max, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) // tiles).to(tl.int64)
    col = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = block * WIDTH + tl.arange(0, WIDTH)
    real = col < cols
    at = row[:, None] * cols + col[None, :]
    x = tl.load(x_ptr + at, mask=real[None, :], other=0.0).to(tl.float32)
    data, scale_inv = quantize_rows(tl.trans(x), dtype_max)
    tl.store(data_ptr + col[:, None] * rows + row[None, :], data, mask=real[:, None])
    scale_inv = tl.where(real, scale_inv, 0.0)
    tl.store(scale_ptr + col * stride_col + block * stride_block, scale_inv, mask=col < stored)


def quantize_weights(w: Tensor) -> BlockScaledWeights:
    """Quantizes `w [E, N, K]` (bfloat16 or float32) in blocks of 128 x 128.

    The bits of `reference.quantize_weights`. Gradients do not pass. Raises TypeError for another
    dtype, ValueError for another rank or if N or K is not a multiple of 128.
    """
    return _quantize_weights(w, w.dtype, both_ways=False)[0]


def quantize_weights_both_ways(
    w: Tensor, dtype: torch.dtype
) -> tuple[BlockScaledWeights, BlockScaledWeights]:
    """`w [E, N, K]` rounded to `dtype` and quantized, and the same transposed, `[E, K, N]`.

    One pass: a tile is transposed in registers. Both have the bits of
    `reference.quantize_weights_both_ways`. Errors as `quantize_weights`.
    """
    first, transposed = _quantize_weights(w, dtype, both_ways=True)
    assert transposed is not None
    return first, transposed


def _quantize_weights(
    w: Tensor, dtype: torch.dtype, both_ways: bool
) -> tuple[BlockScaledWeights, BlockScaledWeights | None]:
    _check_input(w, 3)
    experts, n, k = w.shape
    check_whole_blocks(n, "N")
    check_whole_blocks(k)
    w = w.contiguous()
    out = _empty(experts, n, k, w.device)
    turned = _empty(experts, k, n, w.device) if both_ways else None
    if w.numel():
        # E experts of N rows are E * N rows: a tile never spans two, as N is a multiple of 128.
        _quantize_weights_kernel[(out.scale_inv.numel(),)](
            w, out.data, out.scale_inv,
            turned.data if turned else None, turned.scale_inv if turned else None,
            n, k, dtype_max(dtype), BOTH_WAYS=both_ways,
            TO_BF16=dtype is torch.bfloat16, num_warps=8,
        )  # fmt: skip
    return out, turned


def empty_both_ways(w: Tensor) -> tuple[BlockScaledWeights, BlockScaledWeights]:
    """Room for `w [E, N, K]` in FP8, and for the same transposed. Errors as `quantize_weights`."""
    _check_input(w, 3)
    experts, n, k = w.shape
    check_whole_blocks(n, "N")
    check_whole_blocks(k)
    return _empty(experts, n, k, w.device), _empty(experts, k, n, w.device)


def _empty(experts: int, n: int, k: int, device: torch.device) -> BlockScaledWeights:
    return BlockScaledWeights(
        torch.empty(experts, n, k, dtype=E4M3, device=device),
        torch.empty(experts, n // BLOCK, k // BLOCK, dtype=torch.float32, device=device),
    )


@triton.jit
def _quantize_weights_kernel(
    w_ptr, data_ptr, scale_ptr, turned_ptr, turned_scale_ptr, n, k, dtype_max,
    BOTH_WAYS: tl.constexpr, TO_BF16: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    w = tl.load(w_ptr + rows_of_tile(tile, k, 0, WIDTH))
    store_quantized_tile(
        w, tile, data_ptr, scale_ptr, turned_ptr, turned_scale_ptr, n, k, dtype_max,
        BOTH_WAYS, TO_BF16,
    )  # fmt: skip


@triton.jit
def rows_of_tile(tile, k, start, ROWS: tl.constexpr):
    """Where [ROWS, 128] of tile number `tile` of [E, N, K] lie, from the tile's row `start` on."""
    row = (tile // (k // WIDTH)).to(tl.int64) * WIDTH + start + tl.arange(0, ROWS)
    col = tile % (k // WIDTH) * WIDTH + tl.arange(0, WIDTH)
    return row[:, None] * k + col[None, :]


@triton.jit
def store_quantized_tile(
    w, tile, data_ptr, scale_ptr, turned_ptr, turned_scale_ptr, n, k, dtype_max,
    BOTH_WAYS: tl.constexpr, TO_BF16: tl.constexpr,
):  # fmt: skip
    """Quantize and store tile number `tile` [128, 128] of weights [E, N, K]."""
    at = rows_of_tile(tile, k, 0, WIDTH)
    if TO_BF16:
        w = w.to(tl.bfloat16)
    w = w.to(tl.float32)
    amax = tl.max(tl.max(magnitude(w), 1, keep_dims=True), 0, keep_dims=True)  # [1, 1]
    scale = scale_from_amax(amax, dtype_max)
    data = to_e4m3(w * scale)
    scale_inv = reciprocal(scale)
    one = tl.arange(0, 1)[:, None]
    tl.store(data_ptr + at, data)
    tl.store(scale_ptr + tile + one, scale_inv)
    if BOTH_WAYS:
        blocks = k // WIDTH
        expert = (tile // blocks // (n // WIDTH)).to(tl.int64)
        row_block = tile // blocks % (n // WIDTH)
        col_block = tile % blocks
        row = row_block * WIDTH + tl.arange(0, WIDTH)
        col = col_block * WIDTH + tl.arange(0, WIDTH)
        turned = (expert * k + col[:, None]) * n + row[None, :]
        # As bytes, since not every version of Triton transposes tiles of float8.
        bits = tl.trans(data.to(tl.uint8, bitcast=True))
        tl.store(turned_ptr + turned, bits.to(tl.float8e4nv, bitcast=True))
        at = (expert * blocks + col_block) * (n // WIDTH) + row_block
        tl.store(turned_scale_ptr + at + one, scale_inv)


def dequantize(x: BlockScaledTensor, dtype: torch.dtype) -> Tensor:
    """The values of `x`, `[M, K]`, computed in float32 and rounded once to `dtype`.

    The bits of `reference.dequantize`. Raises ValueError unless the scales are COMPACT and K is a
    multiple of 128, TypeError for a dtype other than bfloat16 and float32.
    """
    if x.layout is not Layout.COMPACT:
        raise ValueError(f"needs COMPACT scales, got {x.layout.name}; call relayout first")
    return values(x, dtype)


def values(x: BlockScaledTensor, dtype: torch.dtype, offsets: Tensor | None = None) -> Tensor:
    """`dequantize` that reads scales in either layout.

    Rows from the last of `offsets`, int64 `[E + 1]`, on are not computed, and undefined.
    """
    check_whole_blocks(x.cols)
    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"can dequantize to bfloat16 and float32, not {dtype}")
    out = torch.empty(x.rows, x.cols, dtype=dtype, device=x.device)
    per_row = x.cols // BLOCK
    blocks = x.rows * per_row
    if blocks:
        _dequantize_kernel[(ceil_div(blocks, ROWS),)](
            x.data, x.scale_inv, out, *end_of(offsets), blocks, per_row, *x.row_scales.stride(),
            ROWS=ROWS,
        )  # fmt: skip
    return out


@triton.jit
def _dequantize_kernel(
    data_ptr, scale_ptr, out_ptr, offsets_ptr, experts, blocks, per_row, stride_row, stride_block,
    ROWS: tl.constexpr,
):  # fmt: skip
    blocks = in_use(blocks, per_row, offsets_ptr, experts)
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (block * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    real = block < blocks
    data = tl.load(data_ptr + at, mask=real[:, None]).to(tl.float32)
    scale_at = (block // per_row) * stride_row + (block % per_row) * stride_block
    scale_inv = tl.load(scale_ptr + scale_at, mask=real)
    out = data * scale_inv[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=real[:, None])


def _check_input(x: Tensor, dim: int) -> None:
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"can quantize bfloat16 and float32, got {x.dtype}")
    if x.dim() != dim:
        raise ValueError(f"needs {dim} dimensions, got shape {list(x.shape)}")
