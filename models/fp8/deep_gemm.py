"""DeepGEMM's grouped FP8 GEMM under the name and with the meaning of `reference.grouped_gemm`.

    https://github.com/deepseek-ai/DeepGEMM, installed by its own guide; it compiles at first use

It needs GEMM_READY scales. The permute and quantize kernels write such scales directly, so nothing
is transposed.

Older versions are given the expert of each row. Of the rows behind the last expert's they compute
nothing, but load their tiles, and write zeros. And they use no more multiprocessors than their
waves of tiles need, and compile a kernel for each number of them: another P, the rows of all
experts, can mean another kernel, on an H100 7 s in which the run stands still. Where layers wait
for the count of their rows, P differs from layer to layer. `rows_step` says which P one kernel
serves.

Version 2.6 is given the row at which each expert ends (`use_psum_layout`), visits no other tile,
and is told what to choose a kernel by, so that P does not count.
"""

from typing import Any

import deep_gemm  # type: ignore[import-not-found]
import torch
from packaging.version import Version
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from models.fp8.kernels.plan_rows import row_experts
from models.fp8.tensor import BLOCK, BlockScaledTensor, BlockScaledWeights, Layout

GEMM_LAYOUT = Layout.GEMM_READY

VERSION: str = getattr(deep_gemm, "__version__", "2.1.0")  # the last that does not say
# 2.3 has the argument too, and refuses it on Hopper.
TAKES_ENDS = Version(VERSION) >= Version("2.6")
SAID = f"DeepGEMM {VERSION}" + ("" if TAKES_ENDS else " (2.6 leaves out rows that nothing came in)")
"""For the user."""

# Of the offsets that are alive: each serves two GEMMs forward and two backward.
_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def rows_step() -> int:
    """P is best a multiple of this many rows: a tile of 128 for each multiprocessor.

    Then all waves are whole, with tiles of whatever width, and its heuristics (csrc/jit_kernels/
    heuristics/common.hpp, version 2.1) choose the same kernel for all such P: all multiprocessors,
    and a width that does not depend on P.

    On an H100 these are 16,896 rows. What is rounded up costs memory, so layers with fewer rows
    than that pay most. Where it takes ends, one kernel serves every P.
    """
    return 1 if TAKES_ENDS else BLOCK * deep_gemm.get_num_sms()


def grouped_gemm(
    x: BlockScaledTensor, w: BlockScaledWeights, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """fprop: `x [P, K]` GEMM_READY, `w [E, N, K]` to bfloat16 `[P, N]`.

    `offsets [E + 1]` int64 on the device, multiples of 128, are trusted. Rows after the last
    segment are anything. Within the bound of the Triton kernel of the same name; on Hopper the
    two gave the same bits. Raises ValueError for COMPACT scales, TypeError for another dtype.
    """
    if x.layout is not GEMM_LAYOUT:
        raise ValueError(f"DeepGEMM reads GEMM_READY scales, got {x.layout.name}")
    if out_dtype is not torch.bfloat16:
        raise TypeError(f"DeepGEMM writes bfloat16, not {out_dtype}")
    y = torch.empty(x.rows, w.data.shape[1], dtype=out_dtype, device=x.device)
    if y.numel():
        layout = _layouts.get(offsets)
        if layout is None:
            layout = _layouts[offsets] = (
                offsets[1:].to(torch.int32) if TAKES_ENDS else row_experts(offsets, x.rows)
            )
        ends: dict[str, Any] = {}
        if TAKES_ENDS:  # whole waves for each expert, so that the choice depends on nothing else
            waves = BLOCK * deep_gemm.get_num_sms()
            ends = {"use_psum_layout": True, "expected_m_for_psum_layout": waves}
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (x.data, x.row_scales), (w.data, w.scale_inv), y, layout, **ends
        )
    return y
