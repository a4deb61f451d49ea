"""Grouped GEMMs of FP8 operands, one call for all local experts. Shapes as in `grouped_mm.py`.

Operands are dequantized to float32, which is exact for power-of-two scales, and sums are float32.
An implementation that instead sums products of bytes within each block of 128, applies the scales,
and adds the blocks in float32 computes the same sum in another order. Each of the two
is within `n * 2^-24 * sum(|x| |w|)` of the true sum of n products, to first order, and hence the
two within twice that of each other (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.1), before the result is rounded to `out_dtype`.
"""

import torch
from torch import Tensor

from models.fp8.reference.grouped_mm import grouped_mm, grouped_mm_wgrad
from models.fp8.tensor import BLOCK, BlockScaledTensor, BlockScaledWeights, Layout

GEMM_LAYOUT = Layout.COMPACT
"""Where a producer of `grouped_gemm`'s x puts its scales. Both are read in place."""


def rows_step() -> int:
    """P is best a multiple of this many rows: any will do."""
    return 1


def grouped_gemm(
    x: BlockScaledTensor, w: BlockScaledWeights, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """fprop: `x [P, K]`, `w [E, N, K]` to `[P, N]`.

    Scales of x are read in place in either layout, with the same bits as result; nothing is
    re-arranged and nothing counted. Raises ValueError if shapes and offsets do not fit.
    """
    return grouped_mm(x.float32(), w.float32(), offsets).to(out_dtype)


def grouped_gemm_wgrad(
    dy_t: BlockScaledTensor, x_t: BlockScaledTensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """wgrad: `dy_t [N, P]`, `x_t [K, P]`, both in blocks of 128 rows (along P), to `[E, N, K]`.

    Zeros for an expert without rows. Layouts as `grouped_gemm`. Raises ValueError if shapes and
    offsets do not fit, or if an offset is not a multiple of 128: a scale would span two experts.
    """
    if (offsets % BLOCK).any():
        raise ValueError(f"offsets must be multiples of {BLOCK}, got {offsets.tolist()}")
    dw = grouped_mm_wgrad(dy_t.float32().t(), x_t.float32().t(), offsets, torch.float32)
    return dw.to(out_dtype)
