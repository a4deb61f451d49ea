"""fp8_baseline: stock TransformerEngine, GEMM_READY wherever it is free to choose. 5 relayouts."""

from typing import Any

from torch import Tensor

from models.fp8.tensor import BlockScaledTensor, Layout, relayout
from models.moe.dispatch.trip import Trip

LINEAR = "Fp8Linear"  # the class of ops in which the experts' GEMMs are computed
ROW_ALIGNMENT = 128  # rows of an expert: wgrad quantizes blocks of 128 along the tokens


def to_experts(tokens: Tensor, w: Any, trip: Trip, ops: Any) -> tuple[Tensor, Any]:
    """Tokens [T, K] to the first GEMM of their experts, [P, N], and what wgrad needs of them."""
    # 1 quantize
    x = ops.quantize(tokens, Layout.GEMM_READY)
    x = relayout(x, Layout.COMPACT, trip.phase)
    # 2 dispatch
    data, scale_inv = trip.send(x.data, x.scale_inv)
    # 3 wrap
    x = BlockScaledTensor(data, scale_inv, Layout.COMPACT)
    x = relayout(x, Layout.GEMM_READY, trip.phase)
    # 4 permute
    x = relayout(x, Layout.COMPACT, trip.phase)
    x = ops.permute_scaled(x, trip.rows)
    x = relayout(x, Layout.GEMM_READY, trip.phase)
    # 5 up-projection
    x = relayout(x, Layout.COMPACT, trip.phase)
    x = ops.dequantize(x, tokens.dtype)
    return ops.Fp8Linear.forward(x, w, trip.rows.offsets, ops)
