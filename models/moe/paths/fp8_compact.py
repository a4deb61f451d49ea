"""fp8_compact: as fp8_baseline, with COMPACT kept in steps 1, 3 and 4 (PR #2199). 2 relayouts."""

from typing import Any

from torch import Tensor

from models.fp8.tensor import BlockScaledTensor, Layout, relayout
from models.moe.dispatch.trip import Trip

LINEAR = "Fp8Linear"  # the class of ops in which the experts' GEMMs are computed
ROW_ALIGNMENT = 128  # rows of an expert: wgrad quantizes blocks of 128 along the tokens


def to_experts(tokens: Tensor, w: Any, trip: Trip, ops: Any) -> tuple[Tensor, Any]:
    """Tokens [T, K] to the first GEMM of their experts, [P, N], and what wgrad needs of them."""
    # 1 quantize
    x = ops.quantize(tokens, Layout.COMPACT)
    # 2 dispatch
    data, scale_inv = trip.send(x.data, x.scale_inv)
    # 3 wrap
    x = BlockScaledTensor(data, scale_inv, Layout.COMPACT)
    # 4 permute
    x = ops.permute_scaled(x, trip.rows)
    x = relayout(x, Layout.GEMM_READY, trip.phase)
    # 5 up-projection
    x = relayout(x, Layout.COMPACT, trip.phase)
    x = ops.dequantize(x, tokens.dtype)
    return ops.Fp8Linear.forward(x, w, trip.rows.offsets, ops)
