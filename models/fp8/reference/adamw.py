"""AdamW of one parameter, in plain PyTorch: what the optimizer's kernels compute."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.fp8.reference.quantize import quantize_weights_both_ways
from models.fp8.tensor import BlockScaledWeights


@dataclass(frozen=True)
class AdamWStep:
    """What one step needs in addition to the parameter, its gradient and its two moments."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    number: float
    """This step's, from 1."""
    grad_scale: Tensor | None = None
    """float32 scalar on the parameter's device: gradients are divided by it."""

    @property
    def keep(self) -> float:
        """What weight decay leaves of a weight."""
        return 1 - self.lr * self.weight_decay

    @property
    def rate(self) -> float:
        """The learning rate, with the first moment's bias taken out."""
        return self.lr / (1 - self.beta1**self.number)

    @property
    def deviation(self) -> float:
        """Root of the second moment's share that is there: it starts at zero too."""
        return math.sqrt(1 - self.beta2**self.number)


@torch.no_grad()
def adamw(w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep) -> None:
    """One step in place: `w`, `mean`, `square`; float32 of one shape. `grad` and `mean` may be
    bfloat16: the arithmetic is float32, and only what stays as `mean` is rounded.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101,
    algorithm 2, with the learning rate also on the decay.
    """
    grad, average = grad.to(w.dtype), mean.to(w.dtype)  # themselves where they have it
    if step.grad_scale is not None:
        grad = grad / step.grad_scale
    average.lerp_(grad, 1 - step.beta1)
    square.mul_(step.beta2).addcmul_(grad, grad, value=1 - step.beta2)
    w.mul_(step.keep).addcdiv_(average, square.sqrt() / step.deviation + step.eps, value=-step.rate)
    mean.copy_(average)


def adamw_cast(
    w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep, dtype: torch.dtype
) -> Tensor:
    """`adamw`, and the new weights in `dtype`."""
    adamw(w, grad, mean, square, step)
    return w.to(dtype)


def adamw_quantize(
    w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep, dtype: torch.dtype
) -> tuple[BlockScaledWeights, BlockScaledWeights]:
    """`adamw` of `w [E, N, K]`, and `quantize_weights_both_ways` of the new weights."""
    adamw(w, grad, mean, square, step)
    return quantize_weights_both_ways(w, dtype)
