"""Where each received row goes, so that every expert's rows lie together.

A received row may be for several local experts; it is copied once for each. Every expert's
segment starts at a multiple of `alignment`: models/moe/paths/ has each path's, and why.

Let R be the received rows, T the experts a token is routed to, and P the permuted rows, padding
included. `expert_ids` and `rows` are `[R, T]`, with -1 for an expert that lives elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.fp8.tensor import BLOCK, ceil_div


@dataclass(frozen=True, eq=False)
class RowMap:
    """The plan that permute and unpermute follow; one per layer and batch."""

    rows: Tensor
    """int64 `[R, T]`: row of the permuted buffer, or -1."""
    counts: Tensor
    """int64 `[E]`: rows of each expert, padding left out."""
    offsets: Tensor
    """int64 `[E + 1]`: where each expert's segment starts; the last one is where they end: P, or
    less where there was room for more."""
    needed: Tensor
    """int64 `[]`: P that would have room for all rows; more than P where copies were dropped."""
    num_rows: int
    """P, on the host: buffers are allocated with it."""


def most_rows(slots: int, num_experts: int, alignment: int = BLOCK) -> int:
    """P for the worst routing: every expert has one row more than fills its segment."""
    return slots + min(slots, num_experts) * (alignment - 1)


def plan_rows(
    expert_ids: Tensor,
    num_experts: int,
    alignment: int = BLOCK,
    max_rows: int | None = None,
    step: int = 1,
) -> RowMap:
    """Groups received rows by expert; within an expert they keep the order they came in.

    `expert_ids` is int64 `[R, T]`: a local expert below `num_experts`, or -1. Segments are rounded
    up to `alignment` rows; an expert without rows takes none. P is what they take, rounded up to a
    multiple of `step`. Waits for the device, as the size of the buffer depends on the routing.
    Raises ValueError for an id out of range.

    With `max_rows`, a multiple of the alignment, P is `max_rows`, and copies beyond it are dropped:
    their row is -1, and a segment ends there at the latest. `counts` are those of all copies. Then
    `step` says nothing.
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
    needed = offsets[-1]
    if max_rows is not None:
        rows = rows.masked_fill(rows >= max_rows, -1)
        offsets = offsets.clamp(max=max_rows)
    num_rows = ceil_div(int(needed), step) * step if max_rows is None else max_rows
    return RowMap(rows.view(expert_ids.shape), counts, offsets, needed, num_rows)
