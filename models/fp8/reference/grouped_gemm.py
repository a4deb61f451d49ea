"""The experts' arithmetic: grouped GEMMs and SwiGLU, one call for all local experts.

Rows of expert e are `offsets[e]:offsets[e + 1]` of P permuted rows. An expert computes
`y = x @ w.T` with `w [N, K]`; in E stacked experts:

    fprop   y  [P, N]    = x  [P, K] @ w.T
    dgrad   dx [P, K]    = dy [P, N] @ w
    wgrad   dw [E, N, K] = dy.T @ x, over the expert's own rows

The FP8 versions dequantize to float32, which is exact for power-of-two scales, and accumulate in
float32. An implementation that instead sums products of bytes within each block of 128, applies
the scales, and adds the blocks in float32 computes the same sum in another order. Each of the two
is within `n * 2^-24 * sum(|x| |w|)` of the true sum of n products, to first order, and hence the
two within twice that of each other (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.1), before the result is rounded to `out_dtype`.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fp8.tensor import BLOCK, BlockScaledTensor, BlockScaledWeights, Layout

GEMM_LAYOUT = Layout.COMPACT
"""Where a producer of `grouped_gemm`'s x puts its scales. Both are read in place."""


def grouped_gemm(
    x: BlockScaledTensor, w: BlockScaledWeights, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """fprop: `x [P, K]`, `w [E, N, K]` to `[P, N]`.

    Scales of x are read in place in either layout, with the same bits as result; nothing is
    re-arranged and nothing counted. Raises ValueError if shapes and offsets do not fit.
    """
    return grouped_mm(x.float32(), w.float32(), offsets).to(out_dtype)


def grouped_gemm_dgrad(
    dy: BlockScaledTensor, w: BlockScaledWeights, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """dgrad: `dy [P, N]`, `w [E, N, K]` to `[P, K]`. Layouts and errors as `grouped_gemm`."""
    return grouped_mm_dgrad(dy.float32(), w.float32(), offsets).to(out_dtype)


def grouped_gemm_wgrad(
    dy_t: BlockScaledTensor, x_t: BlockScaledTensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """wgrad: `dy_t [N, P]`, `x_t [K, P]`, both in blocks of 128 rows (along P), to `[E, N, K]`.

    Zeros for an expert without rows. Layouts as `grouped_gemm`. Raises ValueError if shapes and
    offsets do not fit, or if an offset is no multiple of 128: a scale would span two experts.
    """
    if (offsets % BLOCK).any():
        raise ValueError(f"offsets must be multiples of {BLOCK}, got {offsets.tolist()}")
    dw = grouped_mm_wgrad(dy_t.float32().t(), x_t.float32().t(), offsets, torch.float32)
    return dw.to(out_dtype)


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


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """fprop without FP8: `x [P, K]`, `w [E, N, K]` to `[P, N]`, a matmul in x's dtype per expert.

    Raises ValueError if shapes and offsets do not fit.
    """
    out = x.new_empty(x.shape[0], w.shape[1])
    for expert, rows in _segments(offsets, x.shape[0], w.shape[0]):
        out[rows] = x[rows] @ w[expert].t()
    return out


def grouped_mm_dgrad(dy: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """dgrad without FP8: `dy [P, N]`, `w [E, N, K]` to `[P, K]`; errors as `grouped_mm`."""
    out = dy.new_empty(dy.shape[0], w.shape[2])
    for expert, rows in _segments(offsets, dy.shape[0], w.shape[0]):
        out[rows] = dy[rows] @ w[expert]
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


def swiglu(h: Tensor, probs: Tensor) -> Tensor:
    """`silu(h[:, :F]) * h[:, F:] * probs`: `h [P, 2F]`, `probs [P]` float32 to `[P, F]`.

    Computed in float32 and rounded once, to h's dtype. The routing weight is applied here rather
    than after the down-projection, as that is linear and this saves a pass over its result.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    gate, up = h.float().chunk(2, dim=1)
    return (F.silu(gate) * up * probs[:, None]).to(h.dtype)


def swiglu_backward(da: Tensor, h: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu`: `da [P, F]` to `dh [P, 2F]` in h's dtype and `dprobs [P]` in float32.

    With s = sigmoid(gate), the derivative of silu is s * (1 + gate * (1 - s)). Computed in
    float32 from h and probs alone, so swiglu's result need not be kept.
    """
    gate, up = h.float().chunk(2, dim=1)
    da = da.float()
    s = torch.sigmoid(gate)
    silu = gate * s
    dprobs = (da * silu * up).sum(1)
    da = da * probs[:, None]
    dgate = da * up * (s * (1 + gate * (1 - s)))
    return torch.cat([dgate, da * silu], dim=1).to(h.dtype), dprobs


def _segments(offsets: Tensor, rows: int, experts: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with the slice they are in."""
    bounds = offsets.tolist()
    if len(bounds) != experts + 1 or bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"offsets {bounds} do not fit {experts} experts and {rows} rows")
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            yield expert, slice(start, stop)
