"""bfloat16 GEMMs of all local experts, each in one launch. (Where cuBLAS is new enough, its own are
faster and are used instead: `te_grouped.py`.)

fprop is PyTorch's own: `torch.nn.functional.grouped_mm` takes the end of each segment as int32 on
the device, so the host does not wait for the routing. It ignores rows after the last segment: they
are neither read nor written. It needs 16-byte strides, so N and K are multiples of 8. dgrad is the
same with the weights transposed.

wgrad is ours, because it writes the float32 that gradients are kept in:

    dw[e] [N, K] = dy_e.T @ x_e      dy [P, N], x [P, K]: sums over the rows of expert e

A tile of dw is 128 x 256 and goes through its expert's rows 64 at a time: one step brings 16 KB of
dy and 32 KB of x for 2 * 64 * 128 * 256 operations. Both operands have the summed dimension first,
which the tensor cores take for 16-bit types, so nothing is transposed. The sum is float32 in
registers and can be stored as that. A GEMM that rounds it to bfloat16 writes half as much, but a
second pass then reads that and writes float32.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from models.fp8.kernels.grouped_gemm import OUT_DTYPES, multiprocessors
from models.fp8.kernels.quantize import values
from models.fp8.tensor import BlockScaledTensor, ceil_div

STEP = 64
"""Rows that go through the tensor cores at once; a segment is a multiple."""
TILE_N, TILE_K = 128, 256


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """fprop: `x [P, K]`, `w [E, N, K]` (may be a transposed view) to `[P, N]`, all bfloat16.

    Raises ValueError if shapes do not fit, TypeError for another dtype. `offsets [E + 1]` stay on
    the device and are not checked.
    """
    check_fprop(x, w, offsets)
    if not x.shape[0]:
        return torch.empty(0, w.shape[1], dtype=x.dtype, device=x.device)
    return F.grouped_mm(x, w.transpose(1, 2), offs=_ends(offsets))


def grouped_mm_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """wgrad: `dy [P, N]`, `x [P, K]` bfloat16 to `[E, N, K]` in `dtype`, bfloat16 or float32.

    `offsets [E + 1]` int64 on the device: multiples of 64, not checked, as that would wait for the
    device. Zeros for an expert without rows. N and K are multiples of 8, as tensor descriptors want
    it. Raises ValueError if shapes do not fit, TypeError for another dtype.
    """
    check_wgrad(dy, x, dtype)
    n, k = dy.shape[1], x.shape[1]
    if n % 8 or k % 8:
        raise ValueError(f"N and K must be multiples of 8, got {n} and {k}")
    experts = offsets.numel() - 1
    if not len(x):
        return torch.zeros(experts, n, k, dtype=dtype, device=x.device)
    dw = torch.empty(experts, n, k, dtype=dtype, device=x.device)
    tiles = experts * ceil_div(n, TILE_N) * ceil_div(k, TILE_K)
    programs = min(multiprocessors(x.device), tiles)
    _grouped_mm_wgrad_kernel[(programs,)](
        TensorDescriptor.from_tensor(dy.contiguous(), [STEP, TILE_N]),
        TensorDescriptor.from_tensor(x.contiguous(), [STEP, TILE_K]),
        # In three dimensions, so that a tile that ends beyond N does not write the next expert's.
        TensorDescriptor.from_tensor(dw, [1, TILE_N, TILE_K // 2]),
        offsets, experts, n, k, programs,
        OUT_DTYPE=OUT_DTYPES[dtype], STEP=STEP, TILE_N=TILE_N, TILE_K=TILE_K,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return dw


def grouped_wgrad(
    dy: BlockScaledTensor | Tensor,
    x: BlockScaledTensor | Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """wgrad from rows: `dy [P, N]`, `x [P, K]` to `[E, N, K]` in `dtype`.

    Either may be in FP8 blocks, with scales in either layout. The sum runs over tokens, along which
    nothing has a scale, so this is a bfloat16 GEMM, and what came in FP8 is dequantized first,
    exactly, since its scales are powers of two. (A kernel that dequantized on the way from shared
    memory to the tensor cores saved the bfloat16 copy, and was slower than these two steps.) Zeros
    for an expert without rows. Errors as `grouped_mm_wgrad`.
    """
    dy, x = (as_bf16(t, offsets) for t in (dy, x))
    return grouped_mm_wgrad(dy, x, offsets, dtype)


def as_bf16(x: BlockScaledTensor | Tensor, offsets: Tensor) -> Tensor:
    """The values of rows in FP8 that lie before the last of `offsets`; other rows as they are."""
    return values(x, torch.bfloat16, offsets) if isinstance(x, BlockScaledTensor) else x


@triton.jit
def _grouped_mm_wgrad_kernel(
    dy_desc, x_desc, dw_desc, offsets_ptr, experts, n, k, programs,
    OUT_DTYPE: tl.constexpr, STEP: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n, TILE_N)
    tiles_k = tl.cdiv(k, TILE_K)
    for tile in tl.range(tl.program_id(0), experts * tiles_n * tiles_k, programs):
        expert = tile // (tiles_n * tiles_k)
        col_n = tile // tiles_k % tiles_n * TILE_N
        col_k = tile % tiles_k * TILE_K
        start = tl.load(offsets_ptr + expert).to(tl.int32)
        stop = tl.load(offsets_ptr + expert + 1).to(tl.int32)
        total = tl.zeros([TILE_N, TILE_K], tl.float32)
        for row in range(start, stop, STEP):
            dy = dy_desc.load([row, col_n])
            x = x_desc.load([row, col_k])
            total = tl.dot(dy.T, x, total)
        # In two halves: a whole tile of float32 would need the shared memory of a stage and more.
        halves = tl.permute(tl.reshape(total, (TILE_N, 2, TILE_K // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        left = tl.reshape(left.to(OUT_DTYPE), (1, TILE_N, TILE_K // 2))
        right = tl.reshape(right.to(OUT_DTYPE), (1, TILE_N, TILE_K // 2))
        dw_desc.store([expert, col_n, col_k], left)
        dw_desc.store([expert, col_n, col_k + TILE_K // 2], right)


def _ends(offsets: Tensor) -> Tensor:
    return offsets[1:].to(torch.int32)


def check_fprop(x: Tensor, w: Tensor, offsets: Tensor) -> None:
    """Check the arguments of `grouped_mm`."""
    _check_bf16(x, w)
    if offsets.shape != (w.shape[0] + 1,):
        raise ValueError(
            f"{w.shape[0]} experts need {w.shape[0] + 1} offsets, got {offsets.numel()}"
        )
    if x.shape[1] != w.shape[2]:
        raise ValueError(f"x {list(x.shape)} and w {list(w.shape)} do not fit")


def check_wgrad(dy: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Check the arguments of `grouped_mm_wgrad`."""
    _check_bf16(dy, x)
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"dy has {dy.shape[0]} rows and x {x.shape[0]}")
    if dtype not in OUT_DTYPES:
        raise TypeError(f"the result can be bfloat16 or float32, not {dtype}")


def _check_bf16(a: Tensor, b: Tensor) -> None:
    """Raises TypeError unless both are bfloat16."""
    if a.dtype is not torch.bfloat16 or b.dtype is not torch.bfloat16:
        raise TypeError(f"only bfloat16 here, got {a.dtype} and {b.dtype}")
