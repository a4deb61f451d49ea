"""bf16: nothing is quantized. What the FP8 paths are compared with."""

from torch import Tensor

from models.fp8.linear import HighPrecisionLinear, Kept, Linear, Weights
from models.fp8.operations import Operations
from models.moe.dispatch.trip import Trip

LINEAR = HighPrecisionLinear  # computes the experts' GEMMs
ROW_ALIGNMENT = 64  # rows of an expert: a step of wgrad, which sums over tokens


def to_experts(
    tokens: Tensor,
    w: Weights,
    trip: Trip,
    ops: Operations,
    linear: Linear[Tensor, Weights, Kept],
) -> tuple[Tensor, Kept]:
    """Tokens [T, K] to the first GEMM of their experts, [P, N], and what wgrad needs of them."""
    # 1 quantize
    # 2 dispatch, 3 wrap, 4 permute
    x = trip.expand(tokens)
    # 5 up-projection
    return linear.forward(x, w, trip.rows.offsets, tokens.dtype)
