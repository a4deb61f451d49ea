"""DeepGEMM's grouped FP8 GEMM under the name and with the meaning of `reference.grouped_gemm`.

    https://github.com/deepseek-ai/DeepGEMM, installed by its own guide; it compiles at first use

It needs GEMM_READY scales, and the expert of each row. The permute and quantize kernels write such
scales directly, so nothing is transposed.
"""

import deep_gemm  # type: ignore[import-not-found]
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from models.fp8.kernels.plan_rows import row_experts
from models.fp8.tensor import BlockScaledTensor, BlockScaledWeights, Layout

GEMM_LAYOUT = Layout.GEMM_READY

# Of the offsets that are alive: each serves two GEMMs forward and two backward.
_experts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def grouped_gemm(
    x: BlockScaledTensor, w: BlockScaledWeights, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """fprop: `x [P, K]` GEMM_READY, `w [E, N, K]` to bfloat16 `[P, N]`.

    `offsets [E + 1]` int64 on the device, multiples of 128, are trusted. Rows after the last
    segment are not written. Within the bound of the Triton kernel of the same name; on Hopper the
    two gave the same bits. Raises ValueError for COMPACT scales, TypeError for another dtype.
    """
    if x.layout is not GEMM_LAYOUT:
        raise ValueError(f"DeepGEMM reads GEMM_READY scales, got {x.layout.name}")
    if out_dtype is not torch.bfloat16:
        raise TypeError(f"DeepGEMM writes bfloat16, not {out_dtype}")
    y = torch.empty(x.rows, w.data.shape[1], dtype=out_dtype, device=x.device)
    if y.numel():
        experts = _experts.get(offsets)
        if experts is None:
            experts = _experts[offsets] = row_experts(offsets, x.rows)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (x.data, x.row_scales), (w.data, w.scale_inv), y, experts
        )
    return y
