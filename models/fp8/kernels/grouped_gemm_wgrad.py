"""FP8 weight gradients of all local experts in one launch, from operands in blocks of 128 tokens.

    dw[e] [N, K] = dy_t[:, rows of e] @ x_t[:, rows of e].T      dy_t [N, P], x_t [K, P]

What TransformerEngine's recipe does for a weight gradient: both operands were quantized a second
time, along the tokens, so the sum runs along their blocks. Both have a scale for each row of theirs
and 128 tokens, and the product of 128 tokens is scaled by an outer product of the two.

A program makes one tile of one expert's dw, 128 tokens at a time; see `grouped_wgrad.py`, which
does the same in bfloat16 and explains the rest. Scales in either layout, by their strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from models.fp8.tensor import BLOCK, BlockScaledTensor, ceil_div
from models.fp8.triton.blocks import WIDTH, scale_strides
from models.fp8.triton.grouped_gemm import OUT_DTYPES


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
