"""FP8 GEMM of all local experts in one launch, which reads scales in either layout.

`fp8_direct` and `fp8_fused` multiply with it where DeepGEMM is not installed. The other FP8 paths
multiply with TransformerEngine's (`te_grouped.py`, `te.py`).

    y [P, N] = x [P, K] @ w[e].T     for the rows of expert e; w [E, N, K]

x has a scale for each row and 128 of K, w one for each 128 x 128. A tile of the result is summed
128 of K at a time: the tensor cores sum products of bytes, and the sum is multiplied by both scales
and added to a float32 total. (Hopper's tensor cores keep some 14 bits of a sum of FP8 products;
leaving them after every 128 keeps that error far below the rounding to bfloat16.)

Each step of a 64 x 128 tile reads 64 scales of x beside 24 KB of bytes. COMPACT, `[P, K / 128]`,
gives each of them a line of its own, but the next seven steps find theirs in that line;
GEMM_READY, `[K / 128, P]`, gives them side by side. Either is one load with other strides, so the
kernel takes both, and re-arranging scales for it would only cost time.

Bytes are loaded by tensor descriptors (the TMA unit copies whole tiles, so no thread computes
addresses). Programs are persistent: as many as fit on the GPU, each takes a tile, then the one that
is that many further on. Tiles are ordered in groups of a few tiles of rows by all tiles of columns,
so what runs at the same time shares rows and weights in L2. Segments start at multiples of 128, so
a tile has one expert, found by counting the segments that end before it; an empty expert has no
tile.

Bytes moved at least: P * K * 33 / 32 + E * N * K + 2 * P * N. 2 * P * N * K operations are more
than enough for that to be hidden, if tiles find most of it in L2.

    dw[e] [N, K] = dy_t[:, rows of e] @ x_t[:, rows of e].T      dy_t [N, P], x_t [K, P]

is what TransformerEngine's recipe does for a weight gradient: both operands were quantized a second
time, along the tokens, so the sum runs along their blocks. Both have a scale for each row of theirs
and 128 tokens, and the product of 128 tokens is scaled by an outer product of the two. A program
makes one tile of one expert's dw, 128 tokens at a time; `grouped_mm.py` does the same in bfloat16.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from models.fp8.kernels.blocks import WIDTH, scale_strides
from models.fp8.tensor import BLOCK, BlockScaledTensor, BlockScaledWeights, Layout, ceil_div

OUT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Tiling:
    """How the work is split into tiles; what `scripts.bench.kernels --tune` tries."""

    rows: int = 64
    """Rows of a tile: 64 or 128, as segments are multiples of 128. It has 128 columns."""
    warps: int = 4
    stages: int = 4
    """Steps along K whose bytes are in flight."""
    per_sm: int = 2
    """Programs on each of the GPU's multiprocessors: while one multiplies by scales, the other
    keeps the tensor cores busy."""
    group: int = 8
    """Tiles of rows that go together through all columns."""
    flatten: bool = True
    """Whether the bytes of a program's next tile are loaded while it still writes the last."""


TILING = Tiling()

GEMM_LAYOUT = Layout.COMPACT
"""Where a producer best puts the scales of x: both layouts are read in place, this one faster."""


def rows_step() -> int:
    """P is best a multiple of this many rows: any will do, as one kernel takes all."""
    return 1


def grouped_gemm(
    x: BlockScaledTensor, w: BlockScaledWeights, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """fprop: `x [P, K]` in either layout, `w [E, N, K]` to `[P, N]`, bfloat16 or float32.

    `offsets [E + 1]` int64 on the device: multiples of 128 from 0 to at most P. The caller
    guarantees that, as a check would wait for the device. Rows after the last segment are not
    written. K and N are multiples of 16, as tensor descriptors want it. Within float32 accumulation
    of `reference.grouped_gemm`, plus 2^-12 of the sum of the magnitudes, before the result is
    rounded. Raises ValueError if shapes do not fit, TypeError for another `out_dtype`.
    """
    return grouped_gemm_tiled(x, w, offsets, out_dtype, TILING)


def grouped_gemm_tiled(
    x: BlockScaledTensor,
    w: BlockScaledWeights,
    offsets: Tensor,
    out_dtype: torch.dtype,
    tiling: Tiling,
) -> Tensor:
    """`grouped_gemm`, split into other tiles."""
    experts, n, k = w.data.shape
    _check(x, w, offsets, out_dtype)
    rows = x.rows
    y = torch.empty(rows, n, dtype=out_dtype, device=x.device)
    if not y.numel():
        return y
    stride_row, stride_block, _ = scale_strides(rows, k, x.layout)
    tiles = ceil_div(rows, tiling.rows) * ceil_div(n, BLOCK)  # at most
    programs = min(multiprocessors(x.device) * tiling.per_sm, tiles)
    _grouped_gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(x.data, [tiling.rows, BLOCK]),
        TensorDescriptor.from_tensor(w.data.view(experts * n, k), [BLOCK, BLOCK]),
        TensorDescriptor.from_tensor(y, [tiling.rows, BLOCK]),
        x.scale_inv, w.scale_inv, offsets, experts, n, k, stride_row, stride_block, programs,
        OUT_DTYPE=OUT_DTYPES[out_dtype], EXPERTS=triton.next_power_of_2(experts),
        ROWS=tiling.rows, GROUP=tiling.group, FLATTEN=tiling.flatten,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return y


@triton.jit
def _grouped_gemm_kernel(
    x_desc, w_desc, y_desc, x_scale_ptr, w_scale_ptr, offsets_ptr,
    experts, n, k, stride_row, stride_block, programs,
    OUT_DTYPE: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    expert_range = tl.arange(0, EXPERTS)
    used = expert_range < experts
    ends = tl.load(offsets_ptr + 1 + expert_range, mask=used, other=0).to(tl.int32)
    tiles_m = tl.max(ends, 0) // ROWS
    tiles_n = tl.cdiv(n, WIDTH)
    blocks = tl.cdiv(k, WIDTH)

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=FLATTEN):
        first = tile // (GROUP * tiles_n) * GROUP  # of the group's tiles of rows
        height = min(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        row = (first + within % height) * ROWS
        tile_n = within // height
        col = tile_n * WIDTH
        expert = tl.sum((used & (ends <= row)).to(tl.int32), 0)

        # N may end within a tile. The rows of w beyond are the next expert's or, past the last,
        # zeros; their products lie beyond y's columns and are not stored.
        w_row = expert * n + col
        x_scales = x_scale_ptr + (row + tl.arange(0, ROWS)) * stride_row
        w_scales = w_scale_ptr + (expert * tiles_n + tile_n) * blocks
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for block in range(blocks):
            x = x_desc.load([row, block * WIDTH])
            w = w_desc.load([w_row, block * WIDTH])
            scale = tl.load(x_scales + block * stride_block) * tl.load(w_scales + block)
            total += tl.dot(x, w.T) * scale[:, None]
        y_desc.store([row, col], total.to(OUT_DTYPE))


def grouped_gemm_wgrad(
    dy_t: BlockScaledTensor, x_t: BlockScaledTensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """wgrad: `dy_t [N, P]`, `x_t [K, P]`, in blocks along P, to `[E, N, K]`, bfloat16 or float32.

    `offsets [E + 1]` int64 on the device, multiples of 128; not checked, as that would wait for the
    device. Zeros for an expert without rows. Raises ValueError if shapes do not fit, N is not a
    multiple of 128 or K not of 16, TypeError for another `out_dtype`.
    """
    n, k, rows = dy_t.rows, x_t.rows, dy_t.cols
    if x_t.cols != rows:
        raise ValueError(f"dy_t has {rows} columns and x_t {x_t.cols}")
    if n % BLOCK or k % 16:
        raise ValueError(f"N must be a multiple of {BLOCK} and K of 16, got {n} and {k}")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"the result can be bfloat16 or float32, not {out_dtype}")
    experts = offsets.numel() - 1
    if not rows:
        return torch.zeros(experts, n, k, dtype=out_dtype, device=dy_t.device)
    dw = torch.empty(experts, n, k, dtype=out_dtype, device=dy_t.device)
    dy_stride_row, dy_stride_block, _ = scale_strides(n, rows, dy_t.layout)
    x_stride_row, x_stride_block, _ = scale_strides(k, rows, x_t.layout)
    tiles_n, tiles_k = n // BLOCK, ceil_div(k, BLOCK)
    _grouped_gemm_wgrad_kernel[(experts * tiles_n * tiles_k,)](
        TensorDescriptor.from_tensor(dy_t.data, [BLOCK, BLOCK]),
        TensorDescriptor.from_tensor(x_t.data, [BLOCK, BLOCK]),
        TensorDescriptor.from_tensor(dw.view(experts * n, k), [BLOCK, BLOCK]),
        dy_t.scale_inv, x_t.scale_inv, offsets, n, k,
        dy_stride_row, dy_stride_block, x_stride_row, x_stride_block, tiles_n, tiles_k,
        OUT_DTYPE=OUT_DTYPES[out_dtype], num_warps=8, num_stages=4,
    )  # fmt: skip
    return dw


@triton.jit
def _grouped_gemm_wgrad_kernel(
    dy_desc, x_desc, dw_desc, dy_scale_ptr, x_scale_ptr, offsets_ptr, n, k,
    dy_stride_row, dy_stride_block, x_stride_row, x_stride_block, tiles_n, tiles_k,
    OUT_DTYPE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    col_n = tile % tiles_n * WIDTH
    col_k = tile // tiles_n % tiles_k * WIDTH
    expert = tile // (tiles_n * tiles_k)
    start = tl.load(offsets_ptr + expert).to(tl.int32) // WIDTH
    stop = tl.load(offsets_ptr + expert + 1).to(tl.int32) // WIDTH

    row_n, row_k = col_n + tl.arange(0, WIDTH), col_k + tl.arange(0, WIDTH)
    dy_scales = dy_scale_ptr + row_n * dy_stride_row
    x_scales = x_scale_ptr + row_k * x_stride_row
    total = tl.zeros([WIDTH, WIDTH], tl.float32)
    for block in range(start, stop):
        dy = dy_desc.load([col_n, block * WIDTH])
        x = x_desc.load([col_k, block * WIDTH])
        dy_scale = tl.load(dy_scales + block * dy_stride_block)
        x_scale = tl.load(x_scales + block * x_stride_block, mask=row_k < k, other=0.0)
        total += tl.dot(dy, x.T) * (dy_scale[:, None] * x_scale[None, :])
    dw_desc.store([expert * n + col_n, col_k], total.to(OUT_DTYPE))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; in the interpreter, a number that gives each program several tiles."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(
    x: BlockScaledTensor, w: BlockScaledWeights, offsets: Tensor, out_dtype: torch.dtype
) -> None:
    experts, n, k = w.data.shape
    if x.cols != k or offsets.shape != (experts + 1,):
        raise ValueError(
            f"x {list(x.data.shape)}, w {[experts, n, k]} and offsets {list(offsets.shape)} "
            "do not fit"
        )
    if n % 16 or k % 16:
        raise ValueError(f"N and K must be multiples of 16, got {n} and {k}")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"the result can be bfloat16 or float32, not {out_dtype}")
