"""Weight gradients of all local experts from rows that may be in FP8 blocks.

    dw[e] [N, K] = dy_e.T @ x_e      dy [P, N], x [P, K]: sums over the rows of expert e

The sum runs over tokens, along which nothing has a scale, so this is a bfloat16 GEMM. An operand
that came in FP8 (what was dispatched) is dequantized first, exactly, since its scales are powers of
two. A kernel that dequantized on the way from shared memory to the tensor cores was tried: it saved
the bfloat16 copy in memory, and was slower than these two steps.
"""

import torch
from torch import Tensor

from models.fp8.tensor import BlockScaledTensor
from models.fp8.triton.grouped_mm_wgrad import grouped_mm_wgrad
from models.fp8.triton.quantize import values


def grouped_wgrad(
    dy: BlockScaledTensor | Tensor,
    x: BlockScaledTensor | Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """wgrad from rows: `dy [P, N]`, `x [P, K]` to `[E, N, K]` in `dtype`.

    Either may be in FP8 blocks, with scales in either layout. Zeros for an expert without
    rows. Errors as `grouped_mm_wgrad`.
    """
    dy, x = (values(t, torch.bfloat16) if isinstance(t, BlockScaledTensor) else t for t in (dy, x))
    return grouped_mm_wgrad(dy, x, offsets, dtype)
