"""Grouped GEMMs without FP8 products, one call for all local experts.

Rows of expert e are `offsets[e]:offsets[e + 1]` of P permuted rows; rows after the last expert's,
where there is room for more, are ignored, and their results are 0. An expert computes `y = x @ w.T`
with `w [N, K]`; in E stacked experts:

    fprop   y  [P, N]    = x  [P, K] @ w.T
    dgrad   dx [P, K]    = dy [P, N] @ w, which is fprop with the weights transposed
    wgrad   dw [E, N, K] = dy.T @ x, over the expert's own rows
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from models.fp8.tensor import BlockScaledTensor


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """fprop without FP8: `x [P, K]`, `w [E, N, K]` to `[P, N]`, a matmul in x's dtype per expert.

    Raises ValueError if shapes and offsets do not fit.
    """
    out = x.new_zeros(x.shape[0], w.shape[1])
    for expert, rows in _segments(offsets, x.shape[0], w.shape[0]):
        out[rows] = x[rows] @ w[expert].t()
    return out


def grouped_mm_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """wgrad without FP8: `dy [P, N]`, `x [P, K]` to `[E, N, K]` in `dtype`, rounded once.

    Zeros for an expert without rows. Raises ValueError if shapes and offsets do not fit.
    """
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"dy has {dy.shape[0]} rows and x {x.shape[0]}")
    experts = offsets.numel() - 1
    out = x.new_zeros(experts, dy.shape[1], x.shape[1], dtype=dtype)
    for expert, rows in _segments(offsets, x.shape[0], experts):
        out[expert] = dy[rows].to(dtype).t() @ x[rows].to(dtype)
    return out


def grouped_wgrad(
    dy: BlockScaledTensor | Tensor,
    x: BlockScaledTensor | Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """wgrad from rows: `dy [P, N]`, `x [P, K]` to `[E, N, K]` in `dtype`.

    An operand in FP8 blocks along its rows is dequantized first, to the dtype of the other; with
    power-of-two scales that is exact, in bfloat16 too. Errors as `grouped_mm_wgrad`.
    """
    high = next((t.dtype for t in (dy, x) if isinstance(t, Tensor)), dtype)
    dy, x = (t.float32().to(high) if isinstance(t, BlockScaledTensor) else t for t in (dy, x))
    return grouped_mm_wgrad(dy, x, offsets, dtype)


def _segments(offsets: Tensor, rows: int, experts: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with the slice they are in."""
    bounds = offsets.tolist()
    if len(bounds) != experts + 1 or bounds[0] != 0 or bounds[-1] > rows:
        raise ValueError(f"offsets {bounds} do not fit {experts} experts and {rows} rows")
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            yield expert, slice(start, stop)
