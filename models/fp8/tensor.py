"""Block-scaled FP8 matrices, and the one function that re-arranges their scales.

A matrix `[M, K]` is stored as E4M3 bytes and one FP32 `scale_inv` for each block of 1 x 128
values along K: `value = data * scale_inv`. The same scales can lie in memory in two ways, and
which one an operation wants is the subject of this repository:

    COMPACT     [M, ceil(K / 128)]                   row after row: dispatch, permute, dequantize
    GEMM_READY  [ceil(K / 128), M rounded up to 4]   block after block: cuBLAS

Going from one to the other is a pass over memory that computes nothing. `relayout` is the only
function that makes such a pass. Paths call it through their trip, which counts, so a path's claim
is checked by every run.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

BLOCK = 128
"""Values that share a scale: 1 x BLOCK in activations, BLOCK x BLOCK in weights."""

SCALE_ALIGN = 4
"""cuBLAS reads GEMM_READY scales 16 bytes at a time: a row holds a multiple of four."""

E4M3 = torch.float8_e4m3fn


class Layout(Enum):
    """Where the scale of row m and block b lies.

    The names are those of TransformerEngine's `Float8BlockScaleTensorFormat`.
    """

    COMPACT = "compact"
    GEMM_READY = "gemm_ready"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def scale_shape(rows: int, cols: int, layout: Layout) -> tuple[int, int]:
    """Shape of `scale_inv` for a `[rows, cols]` matrix."""
    blocks = ceil_div(cols, BLOCK)
    if layout is Layout.COMPACT:
        return rows, blocks
    return blocks, ceil_div(rows, SCALE_ALIGN) * SCALE_ALIGN


def row_view(scale_inv: Tensor, rows: int, layout: Layout) -> Tensor:
    """Scales in either layout as `[rows, blocks]`: a view, so nothing moves."""
    return scale_inv if layout is Layout.COMPACT else scale_inv[:, :rows].t()


@dataclass(frozen=True, eq=False)
class BlockScaledTensor:
    """A matrix `[M, K]` in E4M3 with one FP32 scale for each 1 x 128 block.

    The layout is part of the tensor and is checked, never guessed: with M = K / 128 both
    layouts have the same shape, and a wrong guess there is silent.

    Raises TypeError for a wrong dtype, ValueError for anything else that does not fit.
    """

    data: Tensor
    """float8_e4m3fn `[M, K]`, contiguous."""
    scale_inv: Tensor
    """float32 `scale_shape(M, K, layout)`, contiguous; `value = data * scale_inv`. The entries
    that round GEMM_READY rows up to four are zero."""
    layout: Layout

    def __post_init__(self) -> None:
        _check_dtypes(self.data, self.scale_inv)
        if self.data.dim() != 2:
            raise ValueError(f"data must be [M, K], got {list(self.data.shape)}")
        _check_scales(self.data, self.scale_inv, scale_shape(self.rows, self.cols, self.layout))

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def cols(self) -> int:
        return self.data.shape[1]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale_inv.nbytes

    @property
    def row_scales(self) -> Tensor:
        """Scales as `[M, ceil(K / 128)]` whatever the layout: a view, so no relayout."""
        return row_view(self.scale_inv, self.rows, self.layout)

    def float32(self) -> Tensor:
        """The values, float32 `[M, K]`; exact when the scales are powers of two.

        Scales are read in place in either layout, so both give the same bits.
        """
        return self.data.float() * _spread(self.row_scales, 1, self.cols)


@dataclass(frozen=True, eq=False)
class BlockScaledWeights:
    """The weights `[E, N, K]` of E experts in E4M3, one FP32 scale for each 128 x 128 block.

    Raises TypeError for a wrong dtype, ValueError for anything else that does not fit.
    """

    data: Tensor
    """float8_e4m3fn `[E, N, K]`, contiguous."""
    scale_inv: Tensor
    """float32 `[E, ceil(N / 128), ceil(K / 128)]`, contiguous."""

    def __post_init__(self) -> None:
        _check_dtypes(self.data, self.scale_inv)
        if self.data.dim() != 3:
            raise ValueError(f"data must be [E, N, K], got {list(self.data.shape)}")
        experts, n, k = self.data.shape
        _check_scales(self.data, self.scale_inv, (experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK)))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale_inv.nbytes

    def float32(self) -> Tensor:
        """The values, float32 `[E, N, K]`; exact when the scales are powers of two."""
        _, n, k = self.data.shape
        return self.data.float() * _spread(_spread(self.scale_inv, 1, n), 2, k)


def relayout(x: BlockScaledTensor, layout: Layout) -> BlockScaledTensor:
    """The same tensor with its scales in the other layout; data is shared, scales are copied.

    Transposes, makes contiguous, pads with zeros (to GEMM_READY) or drops the padding (to
    COMPACT). A path calls it as `trip.relayout`, which counts. Raises ValueError if the scales are
    in that layout already: such a path has a redundant step, and counting it would mean nothing.
    """
    if layout is x.layout:
        raise ValueError(f"scales are {layout.name} already: this relayout is one too many")
    scale_inv = store_scales(x.row_scales, x.cols, layout)
    return BlockScaledTensor(x.data, scale_inv, layout)


def store_scales(row_scales: Tensor, cols: int, layout: Layout) -> Tensor:
    """Writes scales `[M, blocks]` to new memory in the given layout, padding included.

    For an operation that has just computed the scales and may store them as it likes, as a
    quantize kernel may. Scales that are in memory already go through `relayout`.
    """
    rows = row_scales.shape[0]
    stored = row_scales.new_empty(scale_shape(rows, cols, layout))
    row_view(stored, rows, layout).copy_(row_scales)
    if layout is Layout.GEMM_READY and rows % SCALE_ALIGN:
        stored[:, rows:] = 0
    return stored


def _check_dtypes(data: Tensor, scale_inv: Tensor) -> None:
    if data.dtype is not E4M3:
        raise TypeError(f"data must be float8_e4m3fn, got {data.dtype}")
    if scale_inv.dtype is not torch.float32:
        raise TypeError(f"scale_inv must be float32, got {scale_inv.dtype}")


def _check_scales(data: Tensor, scale_inv: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(scale_inv.shape) != shape:
        raise ValueError(
            f"data {list(data.shape)} needs scale_inv {list(shape)}, got {list(scale_inv.shape)}"
        )
    if data.device != scale_inv.device:
        raise ValueError(f"data is on {data.device} but scale_inv on {scale_inv.device}")
    # A layout is a claim about memory. A transposed view would have the right shape, and the
    # pass would happen later, uncounted.
    if not (data.is_contiguous() and scale_inv.is_contiguous()):
        raise ValueError("data and scale_inv must be contiguous")


def _spread(scales: Tensor, dim: int, size: int) -> Tensor:
    """Repeats each scale for the values of its block; the last block may be partial."""
    # Not repeat_interleave, which gathers element by element and took most of a GEMM's time.
    repeated = scales.unsqueeze(dim + 1).expand(
        *scales.shape[: dim + 1], BLOCK, *scales.shape[dim + 1 :]
    )
    return repeated.flatten(dim, dim + 1).narrow(dim, 0, size)
