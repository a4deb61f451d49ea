"""fp8_compact: as fp8_baseline, with COMPACT kept in steps 1, 3 and 4 (PR #2199). 2 relayouts."""

from torch import Tensor

from models.fp8.linear import Fp8Linear, Kept, Linear, Weights
from models.fp8.operations import Operations
from models.fp8.tensor import BlockScaledTensor, Layout
from models.moe.dispatch.trip import Trip

LINEAR = Fp8Linear  # computes the experts' GEMMs
ROW_ALIGNMENT = 128  # rows of an expert: wgrad quantizes blocks of 128 along the tokens


def to_experts(
    tokens: Tensor,
    w: Weights,
    trip: Trip,
    ops: Operations,
    linear: Linear[Tensor, Weights, Kept],
) -> tuple[Tensor, Kept]:
    """Tokens [T, K] to the first GEMM of their experts, [P, N], and what wgrad needs of them."""
    # 1 quantize
    x = ops.quantize(tokens, Layout.COMPACT)
    # 2 dispatch
    data, scale_inv = trip.dispatch(x.data, x.scale_inv)
    # 3 wrap
    x = BlockScaledTensor(data, scale_inv, Layout.COMPACT)
    # 4 permute
    x = ops.permute_scaled(x, trip.rows)
    x = trip.relayout(x, Layout.GEMM_READY)
    # 5 up-projection
    x = trip.relayout(x, Layout.COMPACT)
    x = ops.dequantize(x, tokens.dtype)
    return linear.forward(x, w, trip.rows.offsets, tokens.dtype)
