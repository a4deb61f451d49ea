"""TransformerEngine 2.20's own kernels and calls under the names of `reference/`.

What stock TransformerEngine makes of the five steps, for `fp8_baseline`. It keeps scales GEMM_READY
in every tensor it makes, and the places where it, or its caller, transposes them are these
(`scale_inv.T.contiguous()`, files under transformer_engine/pytorch, version 2.20.2):

    step       forward                                   backward
    1 out      the caller, before it dispatches          the same
    3          the caller, to make the tensor class      the same
    4 in       permutation.py:341 (moe_permute)          permutation.py:701 (moe_unpermute's)
    4 out      permutation.py:404                        permutation.py:755
    5          float8_blockwise_tensor_storage.py:295    the same (dequantize)

(GroupedLinear refuses a quantized input, so the caller dequantizes for step 5.) Here the same
kernels run without those passes: the operations below say which layout they take, and a path makes
each pass itself, through `trip.relayout`, which counts it.

Import it only on a machine with TransformerEngine. `TELinear` replaces `Fp8Linear` (linear.py):
TransformerEngine does not quantize all experts at once, as `Fp8Linear` would, since each expert's
GEMM needs GEMM_READY scales of its own.
"""

from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import transformer_engine.pytorch  # noqa: F401 - loads the libraries that the next one needs
import transformer_engine_torch as tex
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.triton import permutation

from models.fp8.linear import HasBytes, SwigluApart
from models.fp8.reference.adamw import AdamWStep
from models.fp8.reference.plan_rows import RowMap
from models.fp8.tensor import E4M3, BlockScaledTensor, Layout


def _quantizer(rowwise: bool, columnwise: bool, dims: int = 1) -> Float8BlockQuantizer:
    """The recipe's quantizer: E4M3, power-of-two scales, blocks of 1 x 128 or 128 x 128."""
    quantizer = Float8BlockQuantizer(
        DType.kFloat8E4M3,
        rowwise=rowwise,
        columnwise=columnwise,
        amax_epsilon=0.0,
        force_pow_2_scales=True,
        block_scaling_dim=dims,
    )
    quantizer.internal = True  # plain storage objects: no tensor subclass, less work on the host
    return quantizer


_ROWS = _quantizer(rowwise=True, columnwise=False)
ROWS_AND_COLUMNS = _quantizer(rowwise=True, columnwise=True)
WEIGHT_BOTH_WAYS = _quantizer(rowwise=True, columnwise=True, dims=2)


def quantize(x: Tensor, layout: Layout) -> BlockScaledTensor:
    """`x [M, K]` (bfloat16 or float32) in blocks of 1 x 128, one kernel.

    The same bits as `reference.quantize`. Raises ValueError for COMPACT: since version 2.12 the
    kernel's launcher asks for GEMM_READY and nothing else, so that would be a relayout.
    """
    _check_gemm_ready(layout)
    quantized = tex.quantize(x, _ROWS)
    return _block_scaled(quantized._rowwise_data, quantized._rowwise_scale_inv)


def dequantize(x: BlockScaledTensor, dtype: torch.dtype) -> Tensor:
    """The values of `x`, `[M, K]`. The same bits as `reference.dequantize`, COMPACT like it.

    TransformerEngine's code, which is several PyTorch operations. It takes GEMM_READY scales and
    transposes them; given a transposed view of COMPACT ones it finds nothing left to do.
    """
    _check_compact(x)
    storage = Float8BlockwiseQTensorStorage(
        rowwise_data=x.data.view(torch.uint8),
        rowwise_scale_inv=x.scale_inv.t(),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=None,
        is_2D_scaled=False,
        fake_dtype=dtype,
    )
    return storage.dequantize(dtype=dtype)


def permute_scaled(
    x: BlockScaledTensor, row_map: RowMap, layout: Layout = Layout.COMPACT
) -> BlockScaledTensor:
    """Data and scales `[R, ...]` to `[P, ...]`, COMPACT in and out, in one kernel.

    As `reference.permute_scaled`, with zeros in padding rows. The kernel is moe_permute's, called
    with plain tensors: given the tensor class, moe_permute makes a relayout before it and one
    after it, and demands a number of rows that fits the rounding of its scales. Raises ValueError
    for another layout on either side: it has no kernel for that.
    """
    _check_compact(x)
    if layout is not Layout.COMPACT:
        raise ValueError(f"TransformerEngine permutes to COMPACT scales, asked for {layout.name}")
    if x.rows == 0:  # nothing arrived, and a launch of no blocks is an error
        room = row_map.num_rows
        values = x.data.view(torch.uint8).new_zeros(room, x.data.shape[1]).view(E4M3)
        scales = x.scale_inv.new_zeros(room, x.scale_inv.shape[1])
        return BlockScaledTensor(values, scales, Layout.COMPACT)
    data, scale_inv = _permute(x.data.view(torch.uint8), x.scale_inv, row_map)
    assert scale_inv is not None
    return BlockScaledTensor(data.view(E4M3), scale_inv, Layout.COMPACT)


def permute(x: Tensor, row_map: RowMap) -> Tensor:
    """`x [R, K]` to `[P, K]`, zeros in padding rows. As `reference.permute`."""
    if len(x) == 0:
        return x.new_zeros(row_map.num_rows, x.shape[1])
    return _permute(x, None, row_map)[0]


def unpermute(y: Tensor, row_map: RowMap) -> Tensor:
    """`y [P, K]` to `[R, K]`: the sum of each row's copies, in float32, rounded once.

    As `reference.unpermute`, except for the order of the sum: by expert and not by slot.
    """
    received, slots = row_map.rows.shape
    if received == 0:
        return y.new_zeros(0, y.shape[1])
    return permutation.unpermute_with_mask_map(
        y, _kernel_map(row_map), None, None, None, received, slots, y.shape[1]
    )[0]


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of E experts, each quantized in squares and kept both ways, and the way this one is
    used.

    `[E, N, K]`, and transposed `[E, K, N]`.
    """

    experts: list[Float8BlockwiseQTensorStorage]
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Columns:
    """What wgrad needs of `[P, K]` rows: of each expert's, `[K, rows]` in FP8 along its tokens."""

    experts: list[Float8BlockwiseQTensorStorage]

    @property
    def nbytes(self) -> int:
        return sum(t._columnwise_data.nbytes + t._columnwise_scale_inv.nbytes for t in self.experts)


CUBLAS_FOR_GROUPS = 130600
"""cuBLASLt 13.6: the first that multiplies groups of block-scaled FP8 on Hopper."""


def cublas_version() -> str:
    """The version of the cuBLASLt that is loaded, which may be newer than the one installed with
    torch."""
    number = tex.get_cublasLt_version()
    return f"{number // 10000}.{number // 100 % 100}"


NEWER_CUBLAS = (
    f"cuBLAS {cublas_version()} has no grouped one for this; 13.6 or newer has: "
    'pip install --no-deps "nvidia-cublas>=13.6"'
)
"""Said where a GEMM of all experts is missing."""


W = TypeVar("W")
K = TypeVar("K", bound=HasBytes)


class UpdatesThenQuantizes(SwigluApart[W, K]):
    """TransformerEngine quantizes what AdamW has written, in a pass of its own."""

    def prepare_weights(self, w: Tensor, dtype: torch.dtype) -> tuple[W, W]:
        """See `Linear.prepare_weights`."""
        raise NotImplementedError

    def update_weights(
        self, w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep,
        dtype: torch.dtype,
    ) -> tuple[W, W]:  # fmt: skip
        w = self.ops.adamw_cast(w, grad, mean, square, step, dtype)
        return self.prepare_weights(w, dtype)


class TELinear(UpdatesThenQuantizes[Weights, Columns]):
    """The calls that TransformerEngine's GroupedLinear makes, with its block-scaling recipe.

    One quantize kernel an expert, which reads x once and writes rows and columns, and one GEMM an
    expert, on four streams. `TEGroupedLinear` (te_grouped.py) is used instead where cuBLAS is new
    enough. A `Linear`, see `models/fp8/linear.py`. Rows of an expert must be a multiple of 8, and
    of 128 where a block of scales must not span two experts. Its `ops` are for SwiGLU and AdamW.
    """

    NEEDS_SEGMENTS_ON_HOST = True
    DESCRIPTION = "GEMMs by TransformerEngine, one an expert" + (
        f" ({NEWER_CUBLAS})" if tex.get_cublasLt_version() < CUBLAS_FOR_GROUPS else ""
    )

    def prepare_weights(self, w: Tensor, dtype: torch.dtype) -> tuple[Weights, Weights]:
        experts, n, _ = w.shape
        # One kernel an expert writes its bytes both ways.
        quantized = tex.split_quantize(
            w.to(dtype).flatten(0, 1), [n] * experts, [WEIGHT_BOTH_WAYS] * experts
        )
        return Weights(quantized), Weights(quantized, transposed=True)

    def forward(
        self, x: Tensor, w: Weights, offsets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Columns]:
        splits = _splits(offsets)
        quantized = tex.split_quantize(x, splits, [ROWS_AND_COLUMNS] * len(splits))
        n, k = w.experts[0].size()
        out = x.new_empty(len(x), k if w.transposed else n, dtype=dtype)
        layout = "NN" if w.transposed else "TN"
        _grouped_gemm(layout, w.experts, quantized, [out], splits, single_output=True)
        for part in quantized:
            part.update_usage(rowwise_usage=False, columnwise_usage=True)
        return out, Columns(quantized)

    def wgrad(self, dy: Columns, x: Columns, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        shape = len(dy.experts), dy.experts[0].size(1), x.experts[0].size(1)
        out = torch.empty(shape, dtype=dtype, device=offsets.device)
        _grouped_gemm("NT", x.experts, dy.experts, list(out), _splits(offsets))
        return out


def _grouped_gemm(
    layout: str,
    a: list[Float8BlockwiseQTensorStorage],
    b: list[Float8BlockwiseQTensorStorage],
    out: list[Tensor],
    splits: list[int],
    single_output: bool = False,
) -> None:
    """One GEMM an expert; zeros where an expert has no rows to sum over.

    layout is cuBLAS's: matrices are column-major, so the weights come first.
    """
    general_grouped_gemm(
        a,
        b,
        out,
        [None] * len(a),
        out[0].dtype,
        layout=layout,
        m_splits=splits,
        single_output=single_output,
        use_split_accumulator=True,  # FP32 sums after each 128 products, as block scales require
    )


_SPLITS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _splits(offsets: Tensor) -> list[int]:
    """Rows of each expert, on the host: read once, as that waits for the GPU."""
    if offsets not in _SPLITS:
        _SPLITS[offsets] = offsets.diff().tolist()
    return _SPLITS[offsets]


_KERNEL_MAPS: WeakKeyDictionary[RowMap, Tensor] = WeakKeyDictionary()


def _kernel_map(row_map: RowMap) -> Tensor:
    """The plan as TransformerEngine's kernels read it, int32 `[R, 2T + 1]`.

    Of each row: where its copies go, in ascending order; an index for each of them into offsets
    that the kernel adds, here always 0; and in the last column, how many copies there are.
    """
    if row_map not in _KERNEL_MAPS:
        rows = row_map.rows
        received, slots = rows.shape
        ours = rows >= 0
        table = torch.zeros(received, 2 * slots + 1, dtype=torch.int32, device=rows.device)
        table[:, :slots] = rows.where(ours, row_map.num_rows).sort(1).values
        table[:, -1] = ours.sum(1)
        _KERNEL_MAPS[row_map] = table
    return _KERNEL_MAPS[row_map]


def _permute(x: Tensor, scales: Tensor | None, row_map: RowMap) -> tuple[Tensor, Tensor | None]:
    received, slots = row_map.rows.shape
    table = _kernel_map(row_map)
    data, permuted_scales, _ = permutation.permute_with_mask_map(
        x,
        table,
        None,
        scales,
        # Our rows count the padding already. Offsets are passed anyway, because only then is the
        # padding cleared.
        table.new_zeros(1),
        received,
        slots,
        row_map.num_rows,
        x.shape[1],
        None if scales is None else scales.shape[1],
    )
    return data, permuted_scales


def _block_scaled(data: Tensor, scale_inv: Tensor) -> BlockScaledTensor:
    # The kernel leaves the entries that round rows up to four as they were.
    scale_inv[:, data.shape[0] :].zero_()
    return BlockScaledTensor(data.view(E4M3), scale_inv, Layout.GEMM_READY)


def _check_gemm_ready(layout: Layout) -> None:
    if layout is not Layout.GEMM_READY:
        raise ValueError(
            f"TransformerEngine writes GEMM_READY scales only, asked for {layout.name}"
        )


def _check_compact(x: BlockScaledTensor) -> None:
    if x.layout is not Layout.COMPACT:
        raise ValueError(f"needs COMPACT scales, got {x.layout.name}; call relayout first")
