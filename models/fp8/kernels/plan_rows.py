"""Where each received row goes, planned on the device in three launches.

A counting sort of the `R * T` expert ids. They are cut into chunks of a few dozen:

    count   each chunk:   how many ids of each expert it has            -> counts [E + 1, chunks]
    scan    each expert:  running sum of that over the chunks, in place -> totals [E + 1]
    place   each chunk:   expert's start + what earlier chunks have + position in the chunk

The last row of `counts` is for ids that belong to no expert, an error that is found here. Every id
is read twice and its row written once, 24 bytes in all and about 3 MB for 16,384 rows of 8 slots:
the cost is launches. Plain PyTorch needs about twenty, a sort among them.

`place` also writes the inverse, for each permuted row the slot that it is copied from. With it
permute is a gather, and each of its rows, padding too, is written once by the program that owns it.

**The size P depends on the routing and buffers are allocated on the host**, so the host waits here
once per layer. To avoid that, pass the most rows there may be: `plan_rows(..., max_rows=n)` with n
at least `most_rows(...)`, or a smaller capacity that the routing keeps to. Then P is n. Rows after
the last segment, from `offsets[E]` on, are undefined: nothing that is used depends on them, and
permute, SwiGLU and GEMMs leave them alone. The price is the memory.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.reference.plan_rows import RowMap, most_rows
from models.fp8.tensor import BLOCK, ceil_div

TILE = 8192  # elements of a chunk's table of ids by experts: what a program holds in registers
ROWS = 128  # rows that a program of `row_experts` writes


@dataclass(frozen=True, eq=False)
class PlannedRows(RowMap):
    """A plan with its inverse."""

    source: Tensor
    """int32 `[P]`: slot `r * T + t` of `rows` that a permuted row is copied from, -1 in padding."""


def plan_rows(
    expert_ids: Tensor,
    num_experts: int,
    alignment: int = BLOCK,
    max_rows: int | None = None,
    step: int = 1,
) -> PlannedRows:
    """Groups received rows by expert; within an expert they keep the order they came in.

    `expert_ids` is int64 `[R, T]`: a local expert below `num_experts`, or -1. Segments are rounded
    up to `alignment` rows, and P to a multiple of `step`. The values of `reference.plan_rows`, and
    its ValueError for an id out of range.

    With `max_rows` the host does not wait, see the top of the file. Then P is `max_rows`, an id out
    of range is dropped, and so are copies beyond `max_rows`: nothing is written out of bounds.
    """
    if expert_ids.dtype is not torch.int64 or expert_ids.dim() != 2:
        raise ValueError(
            f"expert ids must be int64 [R, T], got {expert_ids.dtype} {list(expert_ids.shape)}"
        )
    ids = expert_ids.contiguous()
    slots = ids.numel()
    size = max_rows
    if size is None:
        size = ceil_div(most_rows(slots, num_experts, alignment), step) * step
    width = triton.next_power_of_2(num_experts + 1)
    chunk = max(TILE // width, 16)
    chunks = max(ceil_div(slots, chunk), 1)  # with nothing to place, offsets are still written

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=ids.device)

    counts, totals = ints(num_experts + 1, chunks), ints(num_experts + 1)
    source, rows = ints(size), ints(*ids.shape, dtype=torch.int64)
    # Counts [E], offsets [E + 1], errors [1] and needed [1] together: one copy tells the host P and
    # errors.
    result = ints(2 * num_experts + 3, dtype=torch.int64)

    _count_kernel[(chunks,)](
        ids, counts, source, slots, size, num_experts, chunks, CHUNK=chunk, WIDTH=width
    )
    _scan_kernel[(num_experts + 1,)](counts, totals, chunks, SPAN=1024)
    _place_kernel[(chunks,)](
        ids, counts, totals, rows, source, result, slots, size, num_experts, chunks, alignment,
        CHUNK=chunk, WIDTH=width,
    )  # fmt: skip

    num_rows = size
    if max_rows is None:
        end, errors, _ = result[2 * num_experts :].tolist()  # waits for the device
        num_rows = ceil_div(end, step) * step
        if errors:
            raise ValueError(f"expert ids must be -1 or 0..{num_experts - 1}")
    return PlannedRows(
        rows=rows,
        counts=result[:num_experts],
        offsets=result[num_experts : 2 * num_experts + 1],
        needed=result[-1],
        num_rows=num_rows,
        source=source[:num_rows],
    )


def inverse(row_map: RowMap) -> Tensor:
    """`source` of a plan; computed if the plan is the reference's, which has none."""
    if isinstance(row_map, PlannedRows):
        return row_map.source
    rows = row_map.rows.flatten()
    source = torch.full((row_map.num_rows,), -1, dtype=torch.int32, device=rows.device)
    ours = rows >= 0
    source[rows[ours]] = ours.nonzero().flatten().int()
    return source


@triton.jit
def _ids_of_chunk(ids_ptr, chunk, slots, num_experts, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """The chunk's slots, its ids (`num_experts` for a wrong one), and a table: id by expert."""
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, mask=slot < slots, other=-1)
    ids = tl.where((ids < -1) | (ids > num_experts), num_experts, ids).to(tl.int32)
    return slot, ids, (ids[:, None] == tl.arange(0, WIDTH)[None, :]).to(tl.int32)


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, source_ptr, slots, size, num_experts, chunks,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    _, _, table = _ids_of_chunk(ids_ptr, chunk, slots, num_experts, CHUNK, WIDTH)
    expert = tl.arange(0, WIDTH)
    tl.store(counts_ptr + expert * chunks + chunk, tl.sum(table, 0), mask=expert <= num_experts)
    # Done here to save a launch: `place` overwrites what is not padding.
    for start in range(chunk * CHUNK, size, chunks * CHUNK):
        at = start + tl.arange(0, CHUNK)
        tl.store(source_ptr + at, tl.full([CHUNK], -1, tl.int32), mask=at < size)


@triton.jit
def _scan_kernel(counts_ptr, totals_ptr, chunks, SPAN: tl.constexpr):
    expert = tl.program_id(0)
    before = tl.zeros([], tl.int32)
    for start in range(0, chunks, SPAN):
        at = start + tl.arange(0, SPAN)
        counts = tl.load(counts_ptr + expert * chunks + at, mask=at < chunks, other=0)
        exclusive = before + tl.cumsum(counts, 0) - counts
        tl.store(counts_ptr + expert * chunks + at, exclusive, mask=at < chunks)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, before)


@triton.jit
def _place_kernel(
    ids_ptr, counts_ptr, totals_ptr, rows_ptr, source_ptr, result_ptr,
    slots, size, num_experts, chunks, alignment, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    expert = tl.arange(0, WIDTH)
    total = tl.load(totals_ptr + expert, mask=expert < num_experts, other=0)
    padded = (total + alignment - 1) // alignment * alignment
    ends = tl.cumsum(padded, 0)

    before = tl.load(counts_ptr + expert * chunks + chunk, mask=expert < num_experts, other=0)
    slot, ids, table = _ids_of_chunk(ids_ptr, chunk, slots, num_experts, CHUNK, WIDTH)
    position = ends - padded + before  # of the chunk's first id of each expert
    row = tl.sum(table * (position[None, :] + tl.cumsum(table, 0) - 1), 1)
    ours = (ids >= 0) & (ids < num_experts) & (row < size)
    tl.store(rows_ptr + slot, tl.where(ours, row, -1).to(tl.int64), mask=slot < slots)
    tl.store(source_ptr + row, slot, mask=ours)

    if chunk == 0:
        real = expert < num_experts
        offsets_ptr = result_ptr + num_experts
        tl.store(result_ptr + expert, total.to(tl.int64), mask=real)
        tl.store(offsets_ptr, tl.zeros([], tl.int64))
        tl.store(offsets_ptr + 1 + expert, tl.minimum(ends, size).to(tl.int64), mask=real)
        tl.store(offsets_ptr + num_experts + 1, tl.load(totals_ptr + num_experts).to(tl.int64))
        tl.store(offsets_ptr + num_experts + 2, tl.sum(padded, 0).to(tl.int64))


def row_experts(offsets: Tensor, rows: int) -> Tensor:
    """The expert of each permuted row, for GEMMs that want to be told row by row.

    int32 `[rows]` from `offsets [E + 1]` int64; -1 after the last segment.
    """
    out = torch.empty(rows, dtype=torch.int32, device=offsets.device)
    experts = len(offsets) - 1
    if rows:
        _row_experts_kernel[(ceil_div(rows, ROWS),)](
            offsets, out, rows, experts, SIZE=ROWS, EXPERTS=triton.next_power_of_2(experts)
        )
    return out


@triton.jit
def _row_experts_kernel(
    offsets_ptr, out_ptr, rows, experts, SIZE: tl.constexpr, EXPERTS: tl.constexpr
):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    expert = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + 1 + expert, mask=expert < experts, other=2**62)
    before = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1)
    tl.store(out_ptr + row, tl.where(before < experts, before, -1), mask=row < rows)
