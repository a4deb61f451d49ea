"""Where each received row goes, so that every expert's rows lie together.

A received row may be for several local experts; it is copied once for each. Every expert's
segment starts at a multiple of 128, because a weight gradient is quantized in blocks of 128 rows
and a block must not mix experts.

Let R be the received rows, T the experts a token is routed to, and P the permuted rows, padding
included. `expert_ids` and `rows` are `[R, T]`, with -1 for an expert that lives elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.fp8.tensor import BLOCK, BlockScaledTensor, Layout, store_scales


@dataclass(frozen=True, eq=False)
class RowMap:
    """The plan that permute and unpermute follow; one per layer and batch."""

    rows: Tensor
    """int64 `[R, T]`: row of the permuted buffer, or -1."""
    counts: Tensor
    """int64 `[E]`: rows of each expert, padding left out."""
    offsets: Tensor
    """int64 `[E + 1]`: where each expert's segment starts; the last one is P."""
    num_rows: int
    """P, on the host: buffers are allocated with it."""


def plan_rows(expert_ids: Tensor, num_experts: int, alignment: int = BLOCK) -> RowMap:
    """Groups received rows by expert; within an expert they keep the order they came in.

    `expert_ids` is int64 `[R, T]`: a local expert below `num_experts`, or -1. Segments are rounded
    up to `alignment` rows; an expert without rows takes none. Waits for the device, as the size of
    the buffer depends on the routing. Raises ValueError for an id out of range.
    """
    flat = expert_ids.flatten()
    if ((flat < -1) | (flat >= num_experts)).any():
        raise ValueError(f"expert ids must be -1 or 0..{num_experts - 1}")
    bucket = flat + 1  # bucket 0 takes what is not for us
    sizes = torch.bincount(bucket, minlength=num_experts + 1)
    counts = sizes[1:]

    padded = (counts + alignment - 1) // alignment * alignment
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])

    order = bucket.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    rank -= (sizes.cumsum(0) - sizes)[bucket]  # position within its bucket
    rows = torch.where(flat >= 0, offsets[bucket - 1] + rank, -1)
    return RowMap(rows.view(expert_ids.shape), counts, offsets, int(offsets[-1]))


def permute(x: Tensor, row_map: RowMap) -> Tensor:
    """`x [R, K]` to `[P, K]`, of any dtype, bit for bit; padding rows are zero."""
    _check_length(x, row_map.rows.shape[0])
    source, slot = (row_map.rows >= 0).nonzero(as_tuple=True)
    out = x.new_zeros(row_map.num_rows, x.shape[1])
    out[row_map.rows[source, slot]] = x[source]
    return out


def permute_scaled(
    x: BlockScaledTensor, row_map: RowMap, layout: Layout = Layout.COMPACT
) -> BlockScaledTensor:
    """`permute` for data and scales, COMPACT in, `layout` out. Bytes move; no value is computed.

    Every scale is written once anyhow, so writing it where a GEMM wants it is no relayout. Padding
    rows have zero data and zero scales, so they stay zero whatever multiplies them.
    Raises ValueError unless the scales are COMPACT.
    """
    if x.layout is not Layout.COMPACT:
        raise ValueError(f"permute moves COMPACT scales, got {x.layout.name}; call relayout first")
    # As bytes, because not every PyTorch version can index float8 on every device.
    data = permute(x.data.view(torch.uint8), row_map).view(x.data.dtype)
    scale_inv = store_scales(permute(x.scale_inv, row_map), x.cols, layout)
    return BlockScaledTensor(data, scale_inv, layout)


def permute_probs(weights: Tensor, row_map: RowMap) -> Tensor:
    """Routing weights `[R, T]` to `[P]`: the weight of each permuted row, 0 for padding."""
    _check_length(weights, row_map.rows.shape[0])
    ours = row_map.rows >= 0
    out = weights.new_zeros(row_map.num_rows)
    out[row_map.rows[ours]] = weights[ours]
    return out


def unpermute(y: Tensor, row_map: RowMap) -> Tensor:
    """`y [P, K]` to `[R, K]`: the sum of each row's copies; zero for a row without any.

    Adds in the order of the T slots, starting from zero, in float32, and rounds once to y's dtype.
    A gather, not a scatter with atomics, so the order and hence the bits are always the same.
    """
    _check_length(y, row_map.num_rows)
    total = torch.zeros(row_map.rows.shape[0], y.shape[1], dtype=torch.float32, device=y.device)
    for rows in row_map.rows.unbind(1):
        total += _gather(y, rows).float()
    return total.to(y.dtype)


def unpermute_probs(p: Tensor, row_map: RowMap) -> Tensor:
    """`p [P]` to `[R, T]`: each copy's value back in its slot, 0 where there is none."""
    _check_length(p, row_map.num_rows)
    return _gather(p[:, None], row_map.rows.flatten()).view(row_map.rows.shape)


def _gather(y: Tensor, rows: Tensor) -> Tensor:
    """`y[rows]`, and zeros (also where y has NaN) for row -1."""
    ours = (rows >= 0)[:, None]
    if y.shape[0] == 0:  # nothing was for us, and -1 has no row to stand in for it
        return y.new_zeros(rows.shape[0], y.shape[1])
    return torch.where(ours, y[rows.clamp(min=0)], 0.0)


def _check_length(x: Tensor, rows: int) -> None:
    if x.shape[0] != rows:
        raise ValueError(f"the row map is for {rows} rows, got {list(x.shape)}")
