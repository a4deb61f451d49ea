"""cuBLAS's GEMMs of all experts in one launch, called as TransformerEngine calls them.

What its `GroupedLinear(use_grouped_tensor=True)` calls (module/grouped_linear.py, version 2.20.2,
marked experimental there), inside our own autograd function, since that module takes no FP8 input
and has parameters of its own. `TEGroupedLinear` multiplies FP8 for `fp8_baseline` and
`fp8_compact`; `TELinear` (te.py) serves an older cuBLAS. `grouped_mm` and
`grouped_mm_wgrad` multiply bfloat16 for the other paths.

Its grouped tensors are the rows of all experts in one buffer, and where each expert's begin, in
elements, on the device: the host waits for nothing. Scales are GEMM_READY expert by expert, for
rows `[K / 128, rows]` each, since cuBLAS is given a pointer to every expert's.

Import it only on a machine with TransformerEngine.
"""

from dataclasses import dataclass

import torch
import transformer_engine.pytorch  # noqa: F401 - loads the libraries that the next one needs
import transformer_engine_torch as tex
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm_for_grouped_tensor
from transformer_engine.pytorch.tensor.storage.grouped_tensor_storage import GroupedTensorStorage

from models.fp8.kernels.grouped_mm import as_bf16, check_fprop, check_wgrad
from models.fp8.te import (
    CUBLAS_FOR_GROUPS,
    ROWS_AND_COLUMNS,
    WEIGHT_BOTH_WAYS,
    UpdatesThenQuantizes,
    cublas_version,
)
from models.fp8.tensor import BlockScaledTensor


def is_supported() -> bool:
    """Whether the cuBLAS that is loaded has these GEMMs for this GPU, those of FP8 too."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    return hopper and tex.get_cublasLt_version() >= CUBLAS_FOR_GROUPS


@dataclass(frozen=True, eq=False)
class GroupedWeights:
    """Weights of E experts in squares of 128, kept both ways, and the way this one is used."""

    both_ways: GroupedTensorStorage
    experts: int
    out_features: int
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class GroupedColumns:
    """What wgrad needs of `[P, K]` rows: in FP8 along the tokens of each expert."""

    columns: GroupedTensorStorage
    features: int

    @property
    def nbytes(self) -> int:
        return self.columns.columnwise_data.nbytes + self.columns.columnwise_scale_inv.nbytes


class TEGroupedLinear(UpdatesThenQuantizes[GroupedWeights, GroupedColumns]):
    """As `TELinear`, with one quantize kernel and one GEMM for all experts.

    A `Linear`, see `models/fp8/linear.py`. Rows of an expert must be a multiple of 128, as a block
    of scales must not span two experts. Rows after the last expert's are neither read nor written.
    """

    NEEDS_SEGMENTS_ON_HOST = False
    DESCRIPTION = f"GEMMs by TransformerEngine, one for all experts (cuBLAS {cublas_version()})"

    def prepare_weights(
        self, w: Tensor, dtype: torch.dtype
    ) -> tuple[GroupedWeights, GroupedWeights]:
        experts, n, k = w.shape
        rows = w.to(dtype).flatten(0, 1)
        quantized = tex.group_quantize(rows, WEIGHT_BOTH_WAYS, experts, None)
        return (
            GroupedWeights(quantized, experts, n),
            GroupedWeights(quantized, experts, k, transposed=True),
        )

    def forward(
        self, x: Tensor, w: GroupedWeights, offsets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, GroupedColumns]:
        segments = _segments(offsets)
        quantized = tex.group_quantize(
            x,
            ROWS_AND_COLUMNS,
            w.experts,
            segments.rows,
            tensor_offsets=segments.starts(x.shape[1]),
        )
        out = x.new_empty(len(x), w.out_features, dtype=dtype)
        general_grouped_gemm_for_grouped_tensor(
            w.both_ways, quantized, segments.group(out), layout="NN" if w.transposed else "TN"
        )
        quantized.rowwise_data = quantized.scale_inv = None
        return out, GroupedColumns(quantized, x.shape[1])

    def wgrad(
        self, dy: GroupedColumns, x: GroupedColumns, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        shape = len(offsets) - 1, dy.features, x.features
        out = torch.empty(shape, dtype=dtype, device=offsets.device)
        general_grouped_gemm_for_grouped_tensor(x.columns, dy.columns, _matrices(out), layout="NT")
        return out


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """fprop: `x [P, K]`, `w [E, N, K]` (may be a transposed view) to `[P, N]`, all bfloat16.

    The function of `kernels/`, and its errors. Rows after the last expert's are neither read nor
    written.
    """
    check_fprop(x, w, offsets)
    y = x.new_empty(x.shape[0], w.shape[1])
    if len(x):
        segments = _segments(offsets)
        turned = not w.is_contiguous()
        matrices = _matrices((w.transpose(1, 2) if turned else w).contiguous())
        general_grouped_gemm_for_grouped_tensor(
            matrices,
            segments.group(x.contiguous()),
            segments.group(y),
            layout="NN" if turned else "TN",
        )
    return y


def grouped_mm_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """wgrad: `dy [P, N]`, `x [P, K]` bfloat16 to `[E, N, K]` in `dtype`, bfloat16 or float32.

    The function of `kernels/`, and its errors. Zeros for an expert without rows.
    """
    check_wgrad(dy, x, dtype)
    shape = len(offsets) - 1, dy.shape[1], x.shape[1]
    if not len(x):
        return torch.zeros(shape, dtype=dtype, device=x.device)
    dw = torch.empty(shape, dtype=dtype, device=x.device)
    segments = _segments(offsets)
    x, dy = x.contiguous(), dy.contiguous()
    general_grouped_gemm_for_grouped_tensor(
        segments.group(x), segments.group(dy), _matrices(dw), layout="NT"
    )
    return dw


def grouped_wgrad(
    dy: BlockScaledTensor | Tensor,
    x: BlockScaledTensor | Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """wgrad from rows, of which either may be in FP8: the function of `kernels/`."""
    dy, x = (as_bf16(t, offsets) for t in (dy, x))
    return grouped_mm_wgrad(dy, x, offsets, dtype)


def _matrices(w: Tensor) -> GroupedTensorStorage:
    """`w [E, N, K]`, contiguous and not quantized, as a grouped tensor that shares its memory."""
    experts, n, k = w.shape
    return GroupedTensorStorage(
        (experts * n, k),
        w.dtype,
        num_tensors=experts,
        shapes=[(n, k)] * experts,
        data=w.view(-1),
    )


class _Segments:
    """Experts' rows as grouped tensors describe them, on the device."""

    def __init__(self, offsets: Tensor) -> None:
        self.offsets = offsets
        self.rows = offsets.diff()
        self._starts: dict[int, Tensor] = {}

    def starts(self, width: int) -> Tensor:
        """Elements before each expert's rows of this width, int64 [E + 1]."""
        if width not in self._starts:
            self._starts[width] = self.offsets * width
        return self._starts[width]

    def group(self, x: Tensor) -> GroupedTensorStorage:
        """`x [P, N]`, not quantized, as a grouped tensor that shares its memory."""
        return GroupedTensorStorage(
            tuple(x.shape),
            x.dtype,
            num_tensors=len(self.rows),
            data=x.view(-1),
            first_dims=self.rows,
            tensor_offsets=self.starts(x.shape[1]),
        )


_SEGMENTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _segments(offsets: Tensor) -> _Segments:
    """Made once for the GEMMs of a layer's pass."""
    if offsets not in _SEGMENTS:
        _SEGMENTS[offsets] = _Segments(offsets.detach())  # a key that its value holds never goes
    return _SEGMENTS[offsets]
