"""The router's GEMM: logits in float32 from tokens and weights in bfloat16, with no cast of either.

The stock function casts the tokens to float32 for the weight's gradient, computes the tokens'
gradient in float32, and casts it: 14 bytes for each of their values in passes that do nothing else.
Tensor cores multiply bfloat16 exactly into float32. What is left is the gradient of the logits,
which is float32 and small. It is given as the sum of two bfloat16 matrices, so that both gradients
are one bfloat16 GEMM each, and nothing but their last bits is lost (2^-17 of a value; the TF32 that
the stock function multiplies in keeps 2^-11). An infinite gradient becomes NaN. (Of a few hundred
tokens cuBLAS may add up the tokens' gradient in parts that are bfloat16, unless PyTorch's
`allow_bf16_reduced_precision_reduction` is off; of a training batch's it need not.)
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]


class Gating(torch.autograd.Function):
    """`x [T, H] @ weight [E, H].T`, both bfloat16, to `[T, E]` float32."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        high = grad.bfloat16()
        both = torch.cat([high, (grad - high).bfloat16()], 1)  # [T, 2E], whose halves add up to it
        dx = both @ torch.cat([weight, weight])
        dw_high, dw_low = _product(both.t(), x).chunk(2)
        return dx, (dw_high + dw_low).to(weight.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of bfloat16 to float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
