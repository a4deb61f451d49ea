"""Linear layers of all local experts, in the three ways that paths compute them.

A path names its class in `LINEAR`; `ops` has the class, these here or a faster one.

P rows of all local experts lie together, those of expert e from `offsets[e]` to `offsets[e + 1]`.
Weights are [E, N, K]. Each class has the same functions:

    prepare_weights   weights as the GEMMs want them, for the forward and for the backward pass:
                      once an optimizer step
    update_weights    an optimizer step of the weights, and them prepared
    forward           y [P, N] = x [P, K] @ w.T, and what to keep of x until the backward pass
    down              SwiGLU and the down-projection: h [P, 2F] to [P, H], and what to keep; None if
                      `down_backward` computes it again
    down_backward     da [P, F] to dh as `backward` takes it, what `wgrad` needs of SwiGLU's result,
                      and dprobs [P]
    backward          dx = dy @ w, and what `wgrad` needs of dy right after
    wgrad             dw [E, N, K] = dy.T @ x, in the dtype asked for, from what the others kept

`NEEDS_SEGMENTS_ON_HOST` says that the host must know `offsets`, and so waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from models.fp8.reference.adamw import AdamWStep
from models.fp8.tensor import BlockScaledTensor, BlockScaledWeights, Layout


class HighPrecisionLinear:
    """Everything in the dtype of x."""

    NEEDS_SEGMENTS_ON_HOST = False

    @staticmethod
    def prepare_weights(w: Tensor, dtype: torch.dtype, ops: Any) -> tuple[Tensor, Tensor]:
        w = w.to(dtype)
        return w, w.transpose(1, 2)

    @staticmethod
    def update_weights(
        w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep, dtype: torch.dtype,
        ops: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        w = ops.adamw_cast(w, grad, mean, square, step, dtype)
        return w, w.transpose(1, 2)

    @staticmethod
    def forward(x: Tensor, w: Tensor, offsets: Tensor, ops: Any) -> tuple[Tensor, Tensor]:
        return ops.grouped_mm(x, w, offsets), x

    @staticmethod
    def down(
        h: Tensor, probs: Tensor, w: Tensor, offsets: Tensor, ops: Any
    ) -> tuple[Tensor, Tensor]:
        return ops.HighPrecisionLinear.forward(ops.swiglu(h, probs), w, offsets, ops)

    @staticmethod
    def down_backward(
        da: Tensor, h: Tensor, probs: Tensor, kept: Any, ops: Any
    ) -> tuple[Tensor, Any, Tensor]:
        dh, dprobs = ops.swiglu_backward(da, h, probs)
        return dh, kept, dprobs

    backward = forward

    @staticmethod
    def wgrad(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype, ops: Any) -> Tensor:
        return ops.grouped_mm_wgrad(dy, x, offsets, dtype)


class Fp8Linear:
    """As TransformerEngine's GroupedLinear with its block-scaling recipe.

    Each operand is quantized twice from high precision, along the sum of either GEMM that it is
    in: rows for fprop and dgrad, columns for wgrad, which sums over tokens.
    """

    NEEDS_SEGMENTS_ON_HOST = False

    @staticmethod
    def prepare_weights(
        w: Tensor, dtype: torch.dtype, ops: Any
    ) -> tuple[BlockScaledWeights, BlockScaledWeights]:
        # FP8 tensor cores want the summed dimension last, so dgrad needs the bytes transposed.
        return ops.quantize_weights_both_ways(w, dtype)

    @staticmethod
    def update_weights(
        w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep, dtype: torch.dtype,
        ops: Any,
    ) -> tuple[BlockScaledWeights, BlockScaledWeights]:  # fmt: skip
        return ops.adamw_quantize(w, grad, mean, square, step, dtype)

    @staticmethod
    def forward(
        x: Tensor, w: BlockScaledWeights, offsets: Tensor, ops: Any
    ) -> tuple[Tensor, BlockScaledTensor]:
        rows = ops.quantize(x, Layout.GEMM_READY)
        columns = ops.quantize_columns(x, Layout.GEMM_READY)
        return ops.grouped_gemm(rows, w, offsets, x.dtype), columns

    @staticmethod
    def down(h: Tensor, probs: Tensor, w: Any, offsets: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return ops.Fp8Linear.forward(ops.swiglu(h, probs), w, offsets, ops)

    down_backward = HighPrecisionLinear.down_backward
    backward = forward

    @staticmethod
    def wgrad(
        dy: BlockScaledTensor,
        x: BlockScaledTensor,
        offsets: Tensor,
        dtype: torch.dtype,
        ops: Any,
    ) -> Tensor:
        return ops.grouped_gemm_wgrad(dy, x, offsets, dtype)


class DirectLinear:
    """Nothing is quantized twice, and for wgrad nothing is quantized at all.

    fprop and dgrad are FP8 GEMMs, and what computes their input writes it in FP8 at once, with
    scales where this machine's GEMM reads them, `ops.GEMM_LAYOUT`. wgrad sums over tokens, along
    which nothing has a scale. It is a high-precision product: of what arrived in FP8, dequantized
    for it; of the gradient, which is there when wgrad runs; and of SwiGLU's result, which its
    backward pass computes again, so that none of it is kept. There is no `forward`: a path calls
    `ops.grouped_gemm` with what it permuted.
    """

    NEEDS_SEGMENTS_ON_HOST = False

    prepare_weights = Fp8Linear.prepare_weights
    update_weights = Fp8Linear.update_weights

    @staticmethod
    def down(
        h: Tensor, probs: Tensor, w: BlockScaledWeights, offsets: Tensor, ops: Any
    ) -> tuple[Tensor, None]:
        a = ops.swiglu_quantize(h, probs, ops.GEMM_LAYOUT)
        return ops.grouped_gemm(a, w, offsets, h.dtype), None

    @staticmethod
    def down_backward(
        da: Tensor, h: Tensor, probs: Tensor, kept: None, ops: Any
    ) -> tuple[tuple[Tensor, BlockScaledTensor], Tensor, Tensor]:
        dh, quantized, dprobs, a = ops.swiglu_backward_quantize(da, h, probs, ops.GEMM_LAYOUT)
        return (dh, quantized), a, dprobs

    @staticmethod
    def backward(
        dy: tuple[Tensor, BlockScaledTensor], w: BlockScaledWeights, offsets: Tensor, ops: Any
    ) -> tuple[Tensor, Tensor]:
        high_precision, quantized = dy
        dx = ops.grouped_gemm(quantized, w, offsets, high_precision.dtype)
        return dx, high_precision

    @staticmethod
    def wgrad(
        dy: BlockScaledTensor | Tensor,
        x: BlockScaledTensor | Tensor,
        offsets: Tensor,
        dtype: torch.dtype,
        ops: Any,
    ) -> Tensor:
        return ops.grouped_wgrad(dy, x, offsets, dtype)
