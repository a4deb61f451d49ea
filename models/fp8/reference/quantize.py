"""Every FP8 operation in plain PyTorch: the definition of right, and the CPU's implementation.

A path says `ops.quantize(...)`, `ops.permute_scaled(...)`; on a CPU `ops` is this module, on a GPU
another one with the same names. This file has the number format: quantize, dequantize, transpose.
Where rows go is in `rows.py`, and the experts' arithmetic in `gemm.py`; both are re-exported here.

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

from models.adamw import AdamWStep, adamw, adamw_cast
from models.fp8.gemm import (
    GEMM_LAYOUT,
    grouped_gemm,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
    grouped_mm,
    grouped_mm_dgrad,
    grouped_mm_wgrad,
    grouped_wgrad,
    swiglu,
    swiglu_backward,
)
from models.fp8.linear import DirectLinear, Fp8Linear, HighPrecisionLinear
from models.fp8.rows import (
    RowMap,
    permute,
    permute_probs,
    permute_scaled,
    plan_rows,
    unpermute,
    unpermute_probs,
)
from models.fp8.tensor import (
    BLOCK,
    E4M3,
    BlockScaledTensor,
    BlockScaledWeights,
    Layout,
    ceil_div,
    store_scales,
)

__all__ = [
    "GEMM_LAYOUT",
    "DirectLinear",
    "Fp8Linear",
    "HighPrecisionLinear",
    "RowMap",
    "adamw",
    "adamw_cast",
    "adamw_quantize",
    "dequantize",
    "dequantize_weights",
    "grouped_gemm",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
    "grouped_mm",
    "grouped_mm_dgrad",
    "grouped_mm_wgrad",
    "grouped_wgrad",
    "permute",
    "permute_probs",
    "permute_scaled",
    "plan_rows",
    "quantize",
    "quantize_columns",
    "quantize_weights",
    "quantize_weights_both_ways",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_quantize",
    "swiglu_quantize",
    "transpose_scaled",
    "unpermute",
    "unpermute_probs",
]

E4M3_MAX = 448.0


@torch.no_grad()
def quantize(
    x: Tensor, layout: Layout, power_of_two: bool = True, epsilon: float = 0.0
) -> BlockScaledTensor:
    """Quantizes `x [M, K]` (bfloat16 or float32) in blocks of 1 x 128 along K.

    `scale = 448 / max(amax, epsilon)`, rounded down to a power of two unless `power_of_two` is
    false; `data = e4m3(x * scale)`, to nearest even, saturating; `scale_inv = 1 / scale`. The
    scales are stored in `layout` at once, as a kernel would, so this is no relayout. Gradients do
    not pass. Raises TypeError for another dtype, ValueError for another rank.

    With power-of-two scales a value is off by at most 1/16 of itself, or by 2^-10 / 224 of its
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
    scale = _scale_from_amax(_amax(blocks, -1), x.dtype, power_of_two, epsilon)
    data = _to_e4m3(blocks * scale[..., None]).flatten(1)[:, :cols].contiguous()
    return BlockScaledTensor(data, store_scales(scale.reciprocal(), cols, layout), layout)


def quantize_columns(
    x: Tensor, layout: Layout, power_of_two: bool = True, epsilon: float = 0.0
) -> BlockScaledTensor:
    """Quantizes `x [M, K]` in blocks of 128 x 1 along M; the result is transposed, `[K, M]`.

    What TransformerEngine calls columnwise, and what a weight gradient needs, whose sum runs over
    tokens. Arguments and errors as `quantize`.
    """
    return quantize(x.t(), layout, power_of_two, epsilon)


@torch.no_grad()
def quantize_weights(
    w: Tensor, power_of_two: bool = True, epsilon: float = 0.0
) -> BlockScaledWeights:
    """Quantizes `w [E, N, K]` (bfloat16 or float32) in blocks of 128 x 128.

    The rule for scales and special cases is that of `quantize`. Gradients do not pass. Raises
    TypeError for another dtype, ValueError for another rank.
    """
    _check_input(w, 3)
    experts, n, k = w.shape
    padded = F.pad(w.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.reshape(experts, ceil_div(n, BLOCK), BLOCK, ceil_div(k, BLOCK), BLOCK)
    scale = _scale_from_amax(_amax(blocks, (2, 4)), w.dtype, power_of_two, epsilon)
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


def adamw_quantize(
    w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep, dtype: torch.dtype
) -> tuple[BlockScaledWeights, BlockScaledWeights]:
    """`adamw` of `w [E, N, K]`, and `quantize_weights_both_ways` of the new weights."""
    adamw(w, grad, mean, square, step)
    return quantize_weights_both_ways(w, dtype)


def swiglu_quantize(h: Tensor, probs: Tensor, layout: Layout) -> BlockScaledTensor:
    """`quantize(swiglu(h, probs), layout)`: `h [P, 2F]`, `probs [P]` float32 to `[P, F]`."""
    return quantize(swiglu(h, probs), layout)


def swiglu_backward_quantize(
    da: Tensor, h: Tensor, probs: Tensor, layout: Layout
) -> tuple[Tensor, BlockScaledTensor, Tensor, Tensor]:
    """`swiglu_backward`, and what an FP8 backward pass needs next.

    Returns `dh [P, 2F]` in h's dtype, the same quantized, `dprobs [P]`, and `a [P, F]`, which is
    swiglu's result once more.
    """
    dh, dprobs = swiglu_backward(da, h, probs)
    return dh, quantize(dh, layout), dprobs, swiglu(h, probs)


def dequantize(x: BlockScaledTensor, dtype: torch.dtype) -> Tensor:
    """The values of `x`, `[M, K]`, computed in float32 and rounded once to `dtype`.

    Raises ValueError unless the scales are COMPACT: a path has to say where it re-arranges them.
    """
    _check_compact(x)
    return x.float32().to(dtype)


def dequantize_weights(w: BlockScaledWeights, dtype: torch.dtype) -> Tensor:
    """The values of `w`, `[E, N, K]`, computed in float32 and rounded once to `dtype`."""
    return w.float32().to(dtype)


def transpose_scaled(x: BlockScaledTensor) -> BlockScaledTensor:
    """`[M, K]` in row blocks to `[K, M]` in row blocks, COMPACT both, without leaving FP8.

    In each 128 x 128 tile the new scale is the largest of the tile's row scales, and a value from
    a row whose scale is 2^d smaller becomes the E4M3 number nearest to `data * 2^-d`, ties to even,
    subnormals included. As scales are powers of two, only what becomes subnormal loses bits.

    - A row block of zeros has scale 1 (quantize) or 0 (padding), which says nothing about its
      values, so it does not take part in the maximum. Neither does one with nothing but zeros and
      NaN. Otherwise a single such row would flush the whole tile.
    - A tile in which no row takes part gets scale 1, as quantizing zeros gives.
    - NaN stays NaN.

    Raises ValueError if M is not a multiple of 128, the scales are not COMPACT, or the scale of a
    row that takes part is not a power of two.

    Source: the scaling-aware transpose of FP8-Flow-MoE, arXiv:2511.02302. That kernel subtracts
    exponents, which is not right for subnormal input or results; this rounds instead.
    """
    _check_compact(x)
    if x.rows % BLOCK:
        raise ValueError(f"M must be a multiple of {BLOCK} to transpose, got {x.rows}")
    tiles = x.rows // BLOCK
    blocks = ceil_div(x.cols, BLOCK)
    padded = F.pad(x.data.float(), (0, -x.cols % BLOCK))
    values = padded.view(tiles, BLOCK, blocks, BLOCK)  # tile row, row, tile column, column
    takes_part = (values.nan_to_num(0.0) != 0).any(-1)  # tile row, row, tile column

    scales = x.scale_inv.view(tiles, BLOCK, blocks)
    # frexp also reads the exponent of 2^-127, the subnormal that inverts the largest scale.
    mantissa, exponent = torch.frexp(scales)
    if (takes_part & (mantissa != 0.5)).any():
        raise ValueError("transpose_scaled needs power-of-two scales: exact shifts exist only then")
    tile_scale = torch.where(takes_part, scales, 0.0).amax(1)  # tile row, tile column
    tile_scale = torch.where(tile_scale > 0, tile_scale, 1.0)

    # 448 * 2^-19 already rounds to zero. The bound keeps the product a normal float32, exact, so
    # that the cast is the only rounding. Rows of zeros may have a larger scale: they do not shift.
    shift = (torch.frexp(tile_scale).exponent[:, None] - exponent).clamp(0, 19)
    shifted = _to_e4m3(values * _two_to_minus(shift)[..., None]).flatten(2).flatten(0, 1)
    data = shifted[:, : x.cols].t().contiguous()
    scale_inv = tile_scale.repeat_interleave(BLOCK, 1)[:, : x.cols].t().contiguous()
    return BlockScaledTensor(data, scale_inv, Layout.COMPACT)


def _amax(blocks: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Largest magnitude; NaN does not count, because the kernels use `fmaxf`, which skips it."""
    amax = blocks.abs().amax(dims)
    if amax.isnan().any():
        amax = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax(dims)
    return amax


def _scale_from_amax(
    amax: Tensor, dtype: torch.dtype, power_of_two: bool, epsilon: float
) -> Tensor:
    """The factor to multiply a block by, float32; `amax` is float32 and not NaN."""
    amax = amax.clamp(min=epsilon)
    # Not `448.0 / amax`: PyTorch computes that as reciprocal times 448, which rounds twice and in
    # one case out of four is off by a bit from the kernels' correctly rounded division.
    scale = torch.full_like(amax, E4M3_MAX) / amax
    scale = torch.where(scale.isinf(), torch.finfo(dtype).max, scale)
    if power_of_two:
        exponent_bits = -0x0080_0000  # 0xff80_0000 as int32: sign and exponent, no mantissa
        scale = (scale.view(torch.int32) & exponent_bits).view(torch.float32)
    return torch.where(amax.isinf() | (amax == 0), 1.0, scale)


def _two_to_minus(shift: Tensor) -> Tensor:
    """`2^-shift` for int32 shifts of 0 to 126; from bits, as a device's `pow` may be inexact."""
    return ((127 - shift) << 23).view(torch.float32)


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
