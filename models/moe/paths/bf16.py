"""bf16: nothing is quantized. What the FP8 paths are held against."""

from typing import Any

from torch import Tensor

from models.moe.dispatch.trip import Trip

LINEAR = "HighPrecisionLinear"  # the class of ops in which the experts' GEMMs are computed
ROW_ALIGNMENT = 64  # rows of an expert: a step of wgrad, which sums over tokens


def to_experts(tokens: Tensor, w: Any, trip: Trip, ops: Any) -> tuple[Tensor, Any]:
    """Tokens [T, K] to the first GEMM of their experts, [P, N], and what wgrad needs of them."""
    # 1 quantize
    # 2 dispatch
    (x,) = trip.send(tokens)
    # 3 wrap
    # 4 permute
    x = ops.permute(x, trip.rows)
    # 5 up-projection
    return ops.HighPrecisionLinear.forward(x, w, trip.rows.offsets, ops)
