"""fp8_fused: as fp8_direct, and the dispatch writes the rows that the GEMM reads. 0 relayouts."""

from torch import Tensor

from models.fp8.linear import DirectLinear, Kept, Linear, Weights
from models.fp8.operations import Operations
from models.fp8.tensor import BlockScaledTensor, Layout
from models.moe.dispatch.trip import Trip

LINEAR = DirectLinear  # computes the experts' GEMMs
ROW_ALIGNMENT = 128  # rows of an expert: a tile of the GEMM


def to_experts(
    tokens: Tensor,
    w: Weights,
    trip: Trip,
    ops: Operations,
    linear: Linear[BlockScaledTensor, Weights, Kept],
) -> tuple[Tensor, Kept]:
    """Tokens [T, K] to the first GEMM of their experts, [P, N], and what wgrad needs of them."""
    # 1 quantize
    x = ops.quantize(tokens, Layout.COMPACT)
    # 2 dispatch, 3 wrap, 4 permute
    x = trip.expand(x, ops.GEMM_LAYOUT)
    # 5 up-projection
    return linear.forward(x, w, trip.rows.offsets, tokens.dtype)
