"""The experts' activation, and variants that also quantize its result to FP8 blocks.

`swiglu` reads the 2F values of a row and writes F: 6 bytes per element of the result in bfloat16.
`swiglu_quantize` writes bytes and scales instead, so the result never goes to memory in bfloat16:
5 bytes per element, where swiglu and quantize one after the other move 6 + 3. The value is still
rounded to h's dtype in between, so that the bits are those of quantize after swiglu.

`swiglu_backward` reads da and h, 3F values a row, and writes 2F. A program owns its rows whole,
block of 128 after block, so that the sum over a row for `dprobs` needs no atomics and always has
the same bits. `swiglu_backward_quantize` adds what an FP8 backward pass needs next: the gradient in
FP8 blocks for dgrad, and the activation once more for wgrad, from the same h that is in registers
anyway, instead of another pass that reads h.

Given `offsets`, rows after the last expert's are not read, and nothing is written there but, in the
forward pass, zeros as their scales: where room for rows is set aside, a fifth of all rows may be
such.

All arithmetic is float32. Against the reference the results are off by at most one unit in the last
place of bfloat16, since the exponential and the division are the GPU's fast ones, and `dprobs` by
at most 1e-5 of the sum of the magnitudes that it adds up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.kernels.blocks import (
    WIDTH,
    check_whole_blocks,
    dtype_max,
    end_of,
    in_use,
    note_infinities,
    quantize_rows,
    scale_strides,
    sigmoid,
)
from models.fp8.overflow import note_on
from models.fp8.tensor import BLOCK, E4M3, BlockScaledTensor, Layout, ceil_div, scale_shape

ROWS = 32  # rows of a forward tile, which is 128 wide
BACKWARD_ROWS = 16  # fewer, because a backward program goes through its rows from end to end


def swiglu(h: Tensor, probs: Tensor, offsets: Tensor | None = None) -> Tensor:
    """`silu(h[:, :F]) * h[:, F:] * probs`: `h [P, 2F]`, `probs [P]` float32 to `[P, F]`.

    Rows from the last of `offsets`, int64 `[E + 1]`, on are not computed, and undefined. h is
    bfloat16 or float32, and so is the result. Raises TypeError for another dtype, ValueError for
    shapes that do not fit.
    """
    rows, cols = _check_input(h, probs)
    out = torch.empty(rows, cols, dtype=h.dtype, device=h.device)
    tiles = ceil_div(cols, BLOCK)
    if out.numel():
        _swiglu_kernel[(ceil_div(rows, ROWS) * tiles,)](
            h.contiguous(), probs, out, None, note_on(h.device), *end_of(offsets), rows, cols,
            tiles, 0, 0, rows, 0.0, QUANTIZE=False, ROWS=ROWS,
        )  # fmt: skip
    return out


def swiglu_quantize(
    h: Tensor, probs: Tensor, layout: Layout, offsets: Tensor | None = None
) -> BlockScaledTensor:
    """`quantize(swiglu(h, probs), layout)` in one pass, bit for bit; F a multiple of 128.

    `offsets` as in `swiglu`. Errors as `swiglu`, and ValueError for another F.
    """
    rows, cols = _check_input(h, probs)
    check_whole_blocks(cols, "F")
    data = torch.empty(rows, cols, dtype=E4M3, device=h.device)
    scale_inv = torch.empty(scale_shape(rows, cols, layout), dtype=torch.float32, device=h.device)
    stride_row, stride_block, stored = scale_strides(rows, cols, layout)
    tiles = cols // BLOCK
    if data.numel():
        _swiglu_kernel[(ceil_div(stored, ROWS) * tiles,)](
            h.contiguous(), probs, data, scale_inv, note_on(h.device), *end_of(offsets), rows, cols,
            tiles, stride_row, stride_block, stored, dtype_max(h.dtype), QUANTIZE=True, ROWS=ROWS,
        )  # fmt: skip
    return BlockScaledTensor(data, scale_inv, layout)


@triton.jit
def _activation(gate, up, prob):
    """The one definition: forward and the recomputation in backward must have the same bits."""
    return gate * sigmoid(gate) * up * prob


@triton.jit
def _swiglu_kernel(
    h_ptr, probs_ptr, out_ptr, scale_ptr, note_ptr, offsets_ptr, experts, rows, cols, tiles,
    stride_row, stride_block, stored, dtype_max, QUANTIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = in_use(rows, 1, offsets_ptr, experts)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tile * WIDTH + tl.arange(0, WIDTH)
    real = (row < rows)[:, None] & (col < cols)[None, :]
    at = (row * (2 * cols))[:, None] + col[None, :]
    gate = tl.load(h_ptr + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + cols + at, mask=real, other=0.0).to(tl.float32)
    prob = tl.load(probs_ptr + row, mask=row < rows, other=0.0)
    a = _activation(gate, up, prob[:, None]).to(h_ptr.dtype.element_ty)
    note_infinities(a, note_ptr)

    out = out_ptr + (row * cols)[:, None] + col[None, :]
    if QUANTIZE:
        data, scale_inv = quantize_rows(a.to(tl.float32), dtype_max)
        tl.store(out, data, mask=real)
        scale_inv = tl.where(row < rows, scale_inv, 0.0)
        at_scale = row * stride_row + tile * stride_block
        tl.store(scale_ptr + at_scale, scale_inv, mask=row < stored)
    else:
        tl.store(out, a, mask=real)


def swiglu_backward(
    da: Tensor, h: Tensor, probs: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu`: `da [P, F]` to `dh [P, 2F]` in h's dtype and `dprobs [P]` float32.

    `offsets` and errors as in `swiglu`.
    """
    rows, cols = _check_input(h, probs, da)
    dh = torch.empty(rows, 2 * cols, dtype=h.dtype, device=h.device)
    dprobs = torch.empty(rows, dtype=torch.float32, device=h.device)
    if rows:
        _swiglu_backward_kernel[(ceil_div(rows, BACKWARD_ROWS),)](
            da.contiguous(), h.contiguous(), probs, dh, dprobs, None, None, None,
            note_on(h.device), *end_of(offsets), rows, cols, 0, 0, rows, 0.0,
            QUANTIZE=False, ROWS=BACKWARD_ROWS,
        )  # fmt: skip
    return dh, dprobs


def swiglu_backward_quantize(
    da: Tensor, h: Tensor, probs: Tensor, layout: Layout, offsets: Tensor | None = None
) -> tuple[Tensor, BlockScaledTensor, Tensor, Tensor]:
    """`swiglu_backward`, and what dgrad and wgrad need, in one pass over da and h.

    Returns `dh [P, 2F]` in h's dtype, the same quantized in blocks of 1 x 128, `dprobs [P]` and
    `a [P, F] = swiglu(h, probs)`. These have the bits of the separate operations, except `dprobs`,
    which may be summed in another order. `offsets` and errors as in `swiglu_quantize`.
    """
    rows, cols = _check_input(h, probs, da)
    check_whole_blocks(cols, "F")
    dh = torch.empty(rows, 2 * cols, dtype=h.dtype, device=h.device)
    dprobs = torch.empty(rows, dtype=torch.float32, device=h.device)
    a = torch.empty(rows, cols, dtype=h.dtype, device=h.device)
    data = torch.empty(rows, 2 * cols, dtype=E4M3, device=h.device)
    scale_inv = torch.empty(
        scale_shape(rows, 2 * cols, layout), dtype=torch.float32, device=h.device
    )
    stride_row, stride_block, stored = scale_strides(rows, 2 * cols, layout)
    if data.numel():
        _swiglu_backward_kernel[(ceil_div(stored, BACKWARD_ROWS),)](
            da.contiguous(), h.contiguous(), probs, dh, dprobs, a, data, scale_inv,
            note_on(h.device), *end_of(offsets), rows, cols, stride_row, stride_block, stored,
            dtype_max(h.dtype), QUANTIZE=True, ROWS=BACKWARD_ROWS,
        )  # fmt: skip
    return dh, BlockScaledTensor(data, scale_inv, layout), dprobs, a


@triton.jit
def _store_quantized(
    x, data_ptr, scale_ptr, at, row, block, rows, stride_row, stride_block, stored, dtype_max
):
    """A tile `[ROWS, 128]` at elements `at`, block `block` of its rows."""
    data, scale_inv = quantize_rows(x.to(tl.float32), dtype_max)
    tl.store(data_ptr + at, data, mask=(row < rows)[:, None])
    scale_inv = tl.where(row < rows, scale_inv, 0.0)
    at_scale = row * stride_row + block * stride_block
    tl.store(scale_ptr + at_scale, scale_inv, mask=row < stored)


@triton.jit
def _swiglu_backward_kernel(
    da_ptr, h_ptr, probs_ptr, dh_ptr, dprobs_ptr, a_ptr, data_ptr, scale_ptr, note_ptr,
    offsets_ptr, experts, rows, cols, stride_row, stride_block, stored, dtype_max,
    QUANTIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = in_use(rows, 1, offsets_ptr, experts)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    prob = tl.load(probs_ptr + row, mask=row < rows, other=0.0)[:, None]
    dprob = tl.zeros([ROWS], tl.float32)
    is_used = tl.program_id(0) * ROWS < rows
    for block in range(tl.where(is_used, tl.cdiv(cols, WIDTH), 0)):
        col = block * WIDTH + tl.arange(0, WIDTH)
        real = (row < rows)[:, None] & (col < cols)[None, :]
        at_a = (row * cols)[:, None] + col[None, :]
        at = (row * (2 * cols))[:, None] + col[None, :]
        gate = tl.load(h_ptr + at, mask=real, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + cols + at, mask=real, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + at_a, mask=real, other=0.0).to(tl.float32)

        s = sigmoid(gate)
        silu = gate * s
        dprob += tl.sum(da * silu * up, 1)
        da *= prob
        dgate = (da * up * (s * (1 + gate * (1 - s)))).to(h_ptr.dtype.element_ty)
        dup = (da * silu).to(h_ptr.dtype.element_ty)
        note_infinities(dgate, note_ptr)
        note_infinities(dup, note_ptr)
        tl.store(dh_ptr + at, dgate, mask=real)
        tl.store(dh_ptr + cols + at, dup, mask=real)
        if QUANTIZE:
            a = _activation(gate, up, prob).to(h_ptr.dtype.element_ty)
            tl.store(a_ptr + at_a, a, mask=real)
            _store_quantized(
                dgate, data_ptr, scale_ptr, at, row, block, rows,
                stride_row, stride_block, stored, dtype_max,
            )  # fmt: skip
            _store_quantized(
                dup, data_ptr + cols, scale_ptr, at, row, block + cols // WIDTH, rows,
                stride_row, stride_block, stored, dtype_max,
            )  # fmt: skip
    tl.store(dprobs_ptr + row, dprob, mask=row < rows)


def _check_input(h: Tensor, probs: Tensor, da: Tensor | None = None) -> tuple[int, int]:
    """P and F."""
    if h.dtype not in (torch.bfloat16, torch.float32) or probs.dtype is not torch.float32:
        raise TypeError(
            f"h must be bfloat16 or float32 and probs float32, got {h.dtype} and {probs.dtype}"
        )
    if h.dim() != 2 or h.shape[1] % 2:
        raise ValueError(f"h must be [P, 2F], got {list(h.shape)}")
    rows, cols = h.shape[0], h.shape[1] // 2
    if probs.shape != (rows,) or not probs.is_contiguous():
        raise ValueError(f"probs must be [{rows}], got {list(probs.shape)}")
    if da is not None and da.shape != (rows, cols):
        raise ValueError(f"da must be {[rows, cols]}, got {list(da.shape)}")
    return rows, cols
