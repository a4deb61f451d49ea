"""RMSNorm by TransformerEngine's kernels, for GPUs.

TransformerEngine's module runs them through an operation fuser, which takes the host longer than
the kernels take the GPU, and a layer has four norms. Here they are called directly: same kernels,
same bits, same name of the parameter.

Import it only on a machine with TransformerEngine.
"""

import torch
import transformer_engine.pytorch  # noqa: F401 - loads the libraries that the next one needs
import transformer_engine_torch as tex
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformer_engine.pytorch.constants import TE_DType

from models.moe.runtime import GPTConfig


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467)."""

    def __init__(self, config: GPTConfig, hidden_size: int, eps: float = 1e-5, **unused) -> None:
        """Called by megatron-core, as any norm."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device="cuda"))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same shape, in the dtype of the weight, computed in float32."""
        return _Function.apply(x, self.weight, self.eps)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.to(weight.dtype).reshape(-1, weight.numel()).contiguous()
        y, _, inverse_rms = tex.rmsnorm_fwd(
            rows, weight, eps, None, None, TE_DType[weight.dtype], 0, False
        )
        ctx.save_for_backward(rows, inverse_rms, weight)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        rows, inverse_rms, weight = ctx.saved_tensors
        dx, dweight = tex.rmsnorm_bwd(
            grad.reshape(rows.shape).contiguous(), rows, inverse_rms, weight, 0, False
        )
        return dx.view(grad.shape), dweight, None
