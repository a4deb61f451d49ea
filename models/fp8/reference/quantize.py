"""The number format: bfloat16 or float32 to FP8 blocks, and back.

The format is that of TransformerEngine's FP8 block-scaling recipe: E4M3, a scale for each 1 x 128
block of activations and each 128 x 128 block of weights, scales rounded down to a power of two.
Special cases follow its CUDA kernels (version 2.20, `common/recipe/recipe_common.cuh` and
`common/transpose/quantize_transpose_{vector,square}_blockwise.cu`):

    a block of zeros            scale 1, zeros
    infinity in a block         scale 1 for the block; infinities, and what exceeds 448, become ±448
    NaN in a block              stays NaN (0x7f); the scale is that of the other values
    amax below about 1.3e-36    448 / amax overflows: the largest value of x's dtype takes its place
    partial last block          as if filled up with zeros
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fp8.tensor import (
    BLOCK,
    E4M3,
    BlockScaledTensor,
    BlockScaledWeights,
    Layout,
    ceil_div,
    store_scales,
)

E4M3_MAX = 448.0


@torch.no_grad()
def quantize(x: Tensor, layout: Layout) -> BlockScaledTensor:
    """Quantizes `x [M, K]` (bfloat16 or float32) in blocks of 1 x 128 along K.

    `scale = 448 / amax`, rounded down to a power of two; `data = e4m3(x * scale)`, to nearest even,
    saturating; `scale_inv = 1 / scale`. The scales are stored in `layout` at once, as a kernel
    would, so this is not a relayout. Gradients do not pass. Raises TypeError for another dtype,
    ValueError for another rank.

    A value is off by at most 1/16 of itself, or by 2^-10 / 224 of its
    block's amax where that is more; and dequantizing (to float32 or bfloat16) and quantizing again
    changes no value. It changes bits only in a block whose largest byte came out as 224: there
    the scale doubles and the bytes with it. (The exceptions are values of magnitude below
    2^-126, which x's dtype may not hold.)

    Source: TransformerEngine's blockwise quantizer, see the top of this file; fine-grained scales
    as in DeepSeek-V3, arXiv:2412.19437, section 3.3.
    """
    _check_input(x, 2)
    rows, cols = x.shape
    blocks = F.pad(x.float(), (0, -cols % BLOCK)).reshape(rows, ceil_div(cols, BLOCK), BLOCK)
    scale = _scale_from_amax(_amax(blocks, -1), x.dtype)
    data = _to_e4m3(blocks * scale[..., None]).flatten(1)[:, :cols].contiguous()
    return BlockScaledTensor(data, store_scales(scale.reciprocal(), cols, layout), layout)


def quantize_columns(x: Tensor, layout: Layout) -> BlockScaledTensor:
    """Quantizes `x [M, K]` in blocks of 128 x 1 along M; the result is transposed, `[K, M]`.

    What TransformerEngine calls columnwise, and what a weight gradient needs, whose sum runs over
    tokens. Arguments and errors as `quantize`.
    """
    return quantize(x.t(), layout)


@torch.no_grad()
def quantize_weights(w: Tensor) -> BlockScaledWeights:
    """Quantizes `w [E, N, K]` (bfloat16 or float32) in blocks of 128 x 128.

    The rule for scales and special cases is that of `quantize`. Gradients do not pass. Raises
    TypeError for another dtype, ValueError for another rank.
    """
    _check_input(w, 3)
    experts, n, k = w.shape
    padded = F.pad(w.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.reshape(experts, ceil_div(n, BLOCK), BLOCK, ceil_div(k, BLOCK), BLOCK)
    scale = _scale_from_amax(_amax(blocks, (2, 4)), w.dtype)
    data = _to_e4m3(blocks * scale[:, :, None, :, None]).view(padded.shape)[:, :n, :k]
    return BlockScaledWeights(data.contiguous(), scale.reciprocal())


def quantize_weights_both_ways(
    w: Tensor, dtype: torch.dtype
) -> tuple[BlockScaledWeights, BlockScaledWeights]:
    """`quantize_weights` of `w [E, N, K]` rounded to `dtype`, and the same transposed, `[E, K, N]`.

    Master weights are float32; rounding first gives the bits that quantizing a copy in the dtype of
    the other GEMMs gives. Square blocks stay square, so transposing is exact.
    """
    q = quantize_weights(w.to(dtype))
    transposed = BlockScaledWeights(
        q.data.transpose(1, 2).contiguous(), q.scale_inv.transpose(1, 2).contiguous()
    )
    return q, transposed


def dequantize(x: BlockScaledTensor, dtype: torch.dtype) -> Tensor:
    """The values of `x`, `[M, K]`, computed in float32 and rounded once to `dtype`.

    Raises ValueError unless the scales are COMPACT: a path has to say where it re-arranges them.
    """
    _check_compact(x)
    return x.float32().to(dtype)


def _amax(blocks: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Largest magnitude; NaN does not count, because the kernels use `fmaxf`, which skips it."""
    amax = blocks.abs().amax(dims)
    if amax.isnan().any():
        amax = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax(dims)
    return amax


def _scale_from_amax(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor to multiply a block by, float32; `amax` is float32 and not NaN."""
    # Not `448.0 / amax`: PyTorch computes that as reciprocal times 448, which rounds twice and in
    # one case out of four is off by a bit from the kernels' correctly rounded division.
    scale = torch.full_like(amax, E4M3_MAX) / amax
    scale = torch.where(scale.isinf(), torch.finfo(dtype).max, scale)
    exponent_bits = -0x0080_0000  # 0xff80_0000 as int32: sign and exponent, no mantissa
    scale = (scale.view(torch.int32) & exponent_bits).view(torch.float32)
    return torch.where(amax.isinf() | (amax == 0), 1.0, scale)


def _to_e4m3(x: Tensor) -> Tensor:
    """float32 to E4M3, to nearest even, as CUDA's saturating conversion: ±448 for what is larger.

    PyTorch's own cast gives NaN there in some versions, and keeps the sign of a NaN.
    """
    out = x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    out.view(torch.uint8).masked_fill_(out.view(torch.uint8) == 0xFF, 0x7F)
    return out


def _check_input(x: Tensor, dim: int) -> None:
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"can quantize bfloat16 and float32, got {x.dtype}")
    if x.dim() != dim:
        raise ValueError(f"needs {dim} dimensions, got shape {list(x.shape)}")


def _check_compact(x: BlockScaledTensor) -> None:
    if x.layout is not Layout.COMPACT:
        raise ValueError(f"needs COMPACT scales, got {x.layout.name}; call relayout first")
