"""AdamW, alone and together with what the next step reads of the weights.

An optimizer step is memory-bound: 28 bytes for each parameter, and 4 more where the new weights are
read again to be cast or quantized. Here the cast or quantized weights are written while the new
ones are still in registers or cache. A gradient in bfloat16 takes 2 bytes less, such a first moment
4.

A quantized tile of 128 x 128 has one scale, which needs the largest of all its new weights. With
gradient and moments they would not fit into a program's registers, so a program updates the tile in
slices and then reads its new weights again, which have not left the cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.kernels.blocks import WIDTH, dtype_max
from models.fp8.kernels.quantize import empty_both_ways, rows_of_tile, store_quantized_tile
from models.fp8.reference.adamw import AdamWStep
from models.fp8.tensor import BlockScaledWeights, ceil_div

SIZE = 2048  # elements a program takes: 32 bytes of each tensor for each of its threads
SLICE = 32  # rows of a tile that are updated at a time


def adamw(w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep) -> None:
    """`reference.adamw`, within a few units in the last place. Raises ValueError for tensors that
    are not contiguous, of one shape and float32, or bfloat16 where that may be."""
    _adamw(w, grad, mean, square, step, None)


def adamw_cast(
    w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep, dtype: torch.dtype
) -> Tensor:
    """`adamw`, and the new weights in `dtype`."""
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    _adamw(w, grad, mean, square, step, out)
    return out


def adamw_quantize(
    w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep, dtype: torch.dtype
) -> tuple[BlockScaledWeights, BlockScaledWeights]:
    """`adamw` of `w [E, N, K]`, and `quantize_weights_both_ways` of the new weights, bit for bit.

    Raises ValueError as `adamw`, and if N or K is not a multiple of 128.
    """
    _check(w, grad, mean, square)
    first, turned = empty_both_ways(w)
    if w.numel():
        _adamw_quantize_kernel[(first.scale_inv.numel(),)](
            w, grad, mean, square, *_numbers(w, step),
            first.data, first.scale_inv, turned.data, turned.scale_inv,
            w.shape[1], w.shape[2], dtype_max(dtype), HAS_SCALE=step.grad_scale is not None,
            TO_BF16=dtype is torch.bfloat16, ROWS=SLICE, num_warps=8,
        )  # fmt: skip
    return first, turned


def _adamw(
    w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep, out: Tensor | None
) -> None:
    _check(w, grad, mean, square)
    if w.numel():
        _adamw_kernel[(ceil_div(w.numel(), SIZE),)](
            w, grad, mean, square, *_numbers(w, step), out, w.numel(),
            HAS_SCALE=step.grad_scale is not None, CASTS=out is not None, SIZE=SIZE, num_warps=8,
        )  # fmt: skip


def _numbers(w: Tensor, step: AdamWStep) -> tuple[Any, ...]:
    scale = w if step.grad_scale is None else step.grad_scale  # a pointer that is not read, or is
    betas = 1 - step.beta1, step.beta2, 1 - step.beta2  # subtracted in double precision
    return scale, *betas, step.eps, step.keep, step.rate, step.deviation


def _check(w: Tensor, grad: Tensor, mean: Tensor, square: Tensor) -> None:
    for name, t in (("w", w), ("grad", grad), ("mean", mean), ("square", square)):
        narrow = name in ("grad", "mean") and t.dtype is torch.bfloat16
        fits = narrow or t.dtype is torch.float32
        if t.shape != w.shape or not fits or not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 of shape {list(w.shape)}, got {t.dtype} of "
                f"shape {list(t.shape)} and strides {list(t.stride())}"
            )


@triton.jit
def _update(
    w_ptr, grad_ptr, mean_ptr, square_ptr, at, real, scale_ptr,
    new_mean, old_square, new_square, eps, keep, rate, deviation, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Update the elements `at` that are `real`, or without it all of them; the new weights."""
    grad = tl.load(grad_ptr + at, mask=real).to(tl.float32)
    mean = tl.load(mean_ptr + at, mask=real).to(tl.float32)
    square = tl.load(square_ptr + at, mask=real)
    w = tl.load(w_ptr + at, mask=real)
    if HAS_SCALE:
        grad = grad / tl.load(scale_ptr)
    mean = mean + new_mean * (grad - mean)
    square = old_square * square + new_square * grad * grad
    w = keep * w - rate * (mean / (tl.sqrt_rn(square) / deviation + eps))
    tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), mask=real)
    tl.store(square_ptr + at, square, mask=real)
    tl.store(w_ptr + at, w, mask=real)
    return w


@triton.jit
def _adamw_kernel(
    w_ptr, grad_ptr, mean_ptr, square_ptr, scale_ptr,
    new_mean, old_square, new_square, eps, keep, rate, deviation,
    out_ptr, count, HAS_SCALE: tl.constexpr, CASTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    real = at < count
    w = _update(
        w_ptr, grad_ptr, mean_ptr, square_ptr, at, real, scale_ptr,
        new_mean, old_square, new_square, eps, keep, rate, deviation, HAS_SCALE,
    )  # fmt: skip
    if CASTS:
        tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _adamw_quantize_kernel(
    w_ptr, grad_ptr, mean_ptr, square_ptr, scale_ptr,
    new_mean, old_square, new_square, eps, keep, rate, deviation,
    data_ptr, scale_inv_ptr, turned_ptr, turned_scale_ptr, n, k, dtype_max,
    HAS_SCALE: tl.constexpr, TO_BF16: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    for start in range(0, WIDTH, ROWS):
        at = rows_of_tile(tile, k, start, ROWS)
        _update(
            w_ptr, grad_ptr, mean_ptr, square_ptr, at, None, scale_ptr,
            new_mean, old_square, new_square, eps, keep, rate, deviation, HAS_SCALE,
        )  # fmt: skip
    tl.debug_barrier()  # other threads wrote what is read now
    w = tl.load(w_ptr + rows_of_tile(tile, k, 0, WIDTH))
    store_quantized_tile(
        w, tile, data_ptr, scale_inv_ptr, turned_ptr, turned_scale_ptr, n, k, dtype_max,
        BOTH_WAYS=True, TO_BF16=TO_BF16,
    )  # fmt: skip
