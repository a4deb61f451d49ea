"""Rows to their experts and back, by the plan of `plan_rows.py`; R, T and P as there."""

import torch
from torch import Tensor

from models.fp8.reference.plan_rows import RowMap
from models.fp8.tensor import BlockScaledTensor, Layout, store_scales


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

    Every scale is written once anyway, so writing it in the GEMM's layout is not a relayout.
    Padding rows have zero data and zero scales, so they stay zero whatever multiplies them.
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
    # Not `torch.where`: without rows its result has a stride of 0, and no bytes to view.
    return y[rows.clamp(min=0)].masked_fill(~ours, 0.0)


def _check_length(x: Tensor, rows: int) -> None:
    if x.shape[0] != rows:
        raise ValueError(f"the row map is for {rows} rows, got {list(x.shape)}")
