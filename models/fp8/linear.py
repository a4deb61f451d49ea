"""Linear layers of all local experts: the three variants that paths use.

P rows of all local experts lie together, those of expert e from `offsets[e]` to `offsets[e + 1]`.
Weights are [E, N, K]. A path names its class in `LINEAR`; its constructor takes the operations that
it calls. On a GPU TransformerEngine's linear layer replaces `Fp8Linear`: te_grouped.py, or te.py
where cuBLAS is older.
"""

from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from models.fp8.operations import Operations
from models.fp8.reference.adamw import AdamWStep
from models.fp8.tensor import BlockScaledTensor, BlockScaledWeights, Layout


class HasBytes(Protocol):
    """Whatever a layer keeps for its backward pass."""

    @property
    def nbytes(self) -> int: ...


Rows = TypeVar("Rows", contravariant=True)
"""What `forward` multiplies: a Tensor, or a BlockScaledTensor as it was permuted."""
Weights = TypeVar("Weights")
"""One weight as the GEMMs want it."""
Kept = TypeVar("Kept", bound=HasBytes)
"""What wgrad needs of one of its operands."""


class Linear(Protocol[Rows, Weights, Kept]):
    """GEMMs of one MLP: the first by `forward`, in either pass; the second with SwiGLU between."""

    ops: Operations
    NEEDS_SEGMENTS_ON_HOST: bool
    """Whether the host must know `offsets`, and so waits for the device."""
    DESCRIPTION: str
    """Which library runs the GEMMs, for the user, where `ops` does not."""

    def prepare_weights(self, w: Tensor, dtype: torch.dtype) -> tuple[Weights, Weights]:
        """Prepare a weight for the forward and the backward pass: once per optimizer step."""

    def update_weights(
        self, w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep,
        dtype: torch.dtype,
    ) -> tuple[Weights, Weights]:  # fmt: skip
        """An optimizer step of a weight, and the new weight prepared."""

    def forward(
        self, x: Rows, w: Weights, offsets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Kept]:
        """y [P, N] = x [P, K] @ w.T in `dtype`, and what wgrad needs of x."""

    def down(
        self, h: Tensor, probs: Tensor, w: Weights, offsets: Tensor
    ) -> tuple[Tensor, Kept | None]:
        """SwiGLU and the down-projection: h [P, 2F] to [P, H], and what wgrad needs of SwiGLU's
        result; None if `up_backward` computes that again."""

    def up_backward(
        self, da: Tensor, h: Tensor, probs: Tensor, a: Kept | None, w: Weights, offsets: Tensor
    ) -> tuple[Tensor, Tensor, Kept, Kept]:
        """SwiGLU's backward pass and the up-projection's dgrad, with what `down` kept as `a`:
        da [P, F] to dx [P, H], dprobs [P], and what wgrad needs of dh and of SwiGLU's result."""

    def wgrad(self, dy: Kept, x: Kept, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        """dw [E, N, K] = dy.T @ x in `dtype`, from what the others kept."""


AnyLinear = Linear[Any, Any, Any]
"""A `Linear` whose types do not matter outside."""


class SwigluApart(Generic[Weights, Kept]):
    """SwiGLU as an operation of its own, and `forward` for both GEMMs around it."""

    DESCRIPTION = ""

    def __init__(self, ops: Operations) -> None:
        self.ops = ops

    def forward(
        self, x: Tensor, w: Weights, offsets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Kept]:
        """See `Linear.forward`."""
        raise NotImplementedError

    def down(self, h: Tensor, probs: Tensor, w: Weights, offsets: Tensor) -> tuple[Tensor, Kept]:
        return self.forward(self.ops.swiglu(h, probs, offsets), w, offsets, h.dtype)

    def up_backward(
        self, da: Tensor, h: Tensor, probs: Tensor, a: Kept | None, w: Weights, offsets: Tensor
    ) -> tuple[Tensor, Tensor, Kept, Kept]:
        assert a is not None
        dh, dprobs = self.ops.swiglu_backward(da, h, probs, offsets)
        dx, dh_kept = self.forward(dh, w, offsets, h.dtype)
        return dx, dprobs, dh_kept, a


class HighPrecisionLinear(SwigluApart[Tensor, Tensor]):
    """Everything in the dtype of x."""

    NEEDS_SEGMENTS_ON_HOST = False

    def prepare_weights(self, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w = w.to(dtype)
        return w, w.transpose(1, 2)

    def update_weights(
        self, w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        w = self.ops.adamw_cast(w, grad, mean, square, step, dtype)
        return w, w.transpose(1, 2)

    def forward(
        self, x: Tensor, w: Tensor, offsets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self.ops.grouped_mm(x, w, offsets), x  # in x's own dtype, which is this one

    def wgrad(self, dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        return self.ops.grouped_mm_wgrad(dy, x, offsets, dtype)


class _QuantizedWeights:
    """Weights in FP8, once an optimizer step, for layers that differ in what they do with rows."""

    NEEDS_SEGMENTS_ON_HOST = False
    DESCRIPTION = ""

    def __init__(self, ops: Operations) -> None:
        self.ops = ops

    def prepare_weights(
        self, w: Tensor, dtype: torch.dtype
    ) -> tuple[BlockScaledWeights, BlockScaledWeights]:
        # FP8 tensor cores want the summed dimension last, so dgrad needs the bytes transposed.
        return self.ops.quantize_weights_both_ways(w, dtype)

    def update_weights(
        self, w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep,
        dtype: torch.dtype,
    ) -> tuple[BlockScaledWeights, BlockScaledWeights]:  # fmt: skip
        return self.ops.adamw_quantize(w, grad, mean, square, step, dtype)


class Fp8Linear(_QuantizedWeights, SwigluApart[BlockScaledWeights, BlockScaledTensor]):
    """The arithmetic of TransformerEngine's GroupedLinear with its block-scaling recipe.

    Each operand is quantized twice from high precision, along the sum of either GEMM that it is
    in: rows for fprop and dgrad, columns for wgrad, which sums over tokens.
    """

    def forward(
        self, x: Tensor, w: BlockScaledWeights, offsets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, BlockScaledTensor]:
        rows = self.ops.quantize(x, Layout.GEMM_READY)
        columns = self.ops.quantize_columns(x, Layout.GEMM_READY)
        return self.ops.grouped_gemm(rows, w, offsets, dtype), columns

    def wgrad(
        self, dy: BlockScaledTensor, x: BlockScaledTensor, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return self.ops.grouped_gemm_wgrad(dy, x, offsets, dtype)


class DirectLinear(_QuantizedWeights):
    """A linear layer that quantizes nothing twice, and nothing for wgrad.

    fprop and dgrad are FP8 GEMMs, and what computes their input writes it in FP8 at once, with
    scales where this machine's GEMM reads them, `ops.GEMM_LAYOUT`. wgrad sums over tokens, along
    which nothing has a scale. It is a high-precision product: of what arrived in FP8, dequantized
    for it; of the gradient, which is there when wgrad runs; and of SwiGLU's result, which its
    backward pass computes again, so that none of it is kept.
    """

    def forward(
        self, x: BlockScaledTensor, w: BlockScaledWeights, offsets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, BlockScaledTensor]:
        return self.ops.grouped_gemm(x, w, offsets, dtype), x

    def down(
        self, h: Tensor, probs: Tensor, w: BlockScaledWeights, offsets: Tensor
    ) -> tuple[Tensor, None]:
        a = self.ops.swiglu_quantize(h, probs, self.ops.GEMM_LAYOUT, offsets)
        return self.ops.grouped_gemm(a, w, offsets, h.dtype), None

    def up_backward(
        self,
        da: Tensor,
        h: Tensor,
        probs: Tensor,
        a: BlockScaledTensor | Tensor | None,
        w: BlockScaledWeights,
        offsets: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dh, quantized, dprobs, a = self.ops.swiglu_backward_quantize(
            da, h, probs, self.ops.GEMM_LAYOUT, offsets
        )
        return self.ops.grouped_gemm(quantized, w, offsets, h.dtype), dprobs, dh, a

    def wgrad(
        self,
        dy: BlockScaledTensor | Tensor,
        x: BlockScaledTensor | Tensor,
        offsets: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        return self.ops.grouped_wgrad(dy, x, offsets, dtype)
