"""Which tokens come to this rank and where their copies go, planned on the device in two launches.

The two of `plan_arrivals.py`, and in each of them what `plan_rows.py` does in three launches:

    count   how many copies of the chunk's tokens each expert here gets     -> counts [E, chunks]
    place   the expert's start + what earlier chunks have + position in the chunk

Tokens that arrive keep their order, so a copy's position within its expert can be told without
knowing in which row its token arrives: one plan need not wait for the other. Each program of
`place` adds up all of `counts` for itself, instead of a launch that does it once: 1 KB an expert
for 2 ranks of 16,384 tokens, out of the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.kernels.plan_arrivals import CHUNK, SPAN, count_arrivals, place_arrivals, prepare
from models.fp8.reference.plan_expand import ExpandedArrivals
from models.fp8.reference.plan_rows import RowMap, most_rows
from models.fp8.tensor import BLOCK, ceil_div

COPIES_TILE = 4096
"""Counts of copies that a program adds up at once."""
MANY_EXPERTS = 32
"""From this many on, a program's table of tokens by experts takes more warps to hold."""


def plan_expand(
    expert_ids: Tensor,
    rank: int,
    local_experts: int,
    alignment: int = BLOCK,
    max_rows: int | None = None,
    step: int = 1,
) -> ExpandedArrivals:
    """The plan of one rank from `expert_ids` int64 `[W, T, k]`, of all ranks' tokens.

    The values of `reference.plan_expand`, and its ValueError. With `max_rows` the host does not
    wait.
    """
    programs, counts, plan, sizes, width = prepare(expert_ids, rank, local_experts)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=plan.ids.device)

    copies = empty(local_experts, programs, dtype=torch.int32)
    written = empty(local_experts, dtype=torch.int32)
    rows = empty(*plan.ids.shape, dtype=torch.int64)
    # Counts [E], offsets [E + 1] and needed [1] together.
    result = empty(2 * local_experts + 2, dtype=torch.int64)
    size = max_rows
    if size is None:
        size = ceil_div(most_rows(plan.ids.numel(), local_experts, alignment), step) * step

    experts = max(triton.next_power_of_2(local_experts), 8)  # see `_place_expand_kernel`
    warps = 8 if experts >= MANY_EXPERTS else 4
    _count_expand_kernel[(programs,)](
        *counts, copies, *sizes, CHUNK=CHUNK, WIDTH=width, EXPERTS=experts, num_warps=warps
    )
    _place_expand_kernel[(programs,)](
        *counts, copies, *vars(plan).values(), rows, written, result, *sizes, alignment, size,
        CHUNK=CHUNK, WIDTH=width, EXPERTS=experts, SPAN=SPAN,
        COPIES_SPAN=max(COPIES_TILE // experts, 16), num_warps=warps,
    )  # fmt: skip

    needed = result[-1]
    num_rows = size if max_rows is not None else ceil_div(int(needed), step) * step
    row_map = RowMap(
        rows=rows,
        counts=result[:local_experts],
        offsets=result[local_experts:-1],
        needed=needed,
        num_rows=num_rows,
    )
    return ExpandedArrivals(**vars(plan), rows=row_map, written=written)


@triton.jit
def _of_place(local, place, WIDTH: tl.constexpr, EXPERTS: tl.constexpr):
    """The experts that tokens have at one place, [CHUNK], and as a table by experts."""
    its = tl.max(tl.where(tl.arange(0, WIDTH)[None, :] == place, local, -1), 1)
    return its, (its[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@triton.jit
def _copies(local, top_k, CHUNK: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr):
    """How many copies of each token each expert gets: 1 at most, by a router's choice."""
    table = tl.zeros([CHUNK, EXPERTS], tl.int32)
    for place in range(top_k):
        _, hits = _of_place(local, place, WIDTH, EXPERTS)
        table += hits
    return table


@triton.jit
def _count_expand_kernel(
    ids_ptr, coming_ptr, going_ptr, copies_ptr,
    rank, local_experts, ranks, tokens, chunks, top_k,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    local = count_arrivals(
        ids_ptr, coming_ptr, going_ptr, rank, local_experts, ranks, tokens, chunks, top_k,
        CHUNK, WIDTH,
    )  # fmt: skip
    table = _copies(local, top_k, CHUNK, WIDTH, EXPERTS)
    expert = tl.arange(0, EXPERTS)
    at = copies_ptr + expert * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, tl.sum(table, 0), mask=expert < local_experts)


@triton.jit
def _place_expand_kernel(
    ids_ptr, coming_ptr, going_ptr, copies_ptr, out_ids_ptr, sources_ptr, ends_ptr, slots_ptr,
    sent_ptr, rows_ptr, written_ptr, result_ptr,
    rank, local_experts, ranks, tokens, chunks, top_k, alignment, size,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, SPAN: tl.constexpr,
    COPIES_SPAN: tl.constexpr,
):  # fmt: skip
    local, row, real = place_arrivals(
        ids_ptr, coming_ptr, going_ptr, out_ids_ptr, sources_ptr, ends_ptr, slots_ptr, sent_ptr,
        rank, local_experts, ranks, tokens, chunks, top_k, CHUNK, WIDTH, SPAN,
    )  # fmt: skip
    # A table of fewer experts may have several threads for each element, as its layout is that of
    # the table of places. Triton 3.6 compiles a running sum over the rows of such a table wrongly.
    tl.static_assert(EXPERTS >= 8)
    program, programs = tl.program_id(0), tl.num_programs(0)
    expert = tl.arange(0, EXPERTS)
    here = expert < local_experts

    before = tl.zeros([EXPERTS], tl.int32)
    total = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, programs, COPIES_SPAN):
        at = start + tl.arange(0, COPIES_SPAN)[None, :]
        counts = tl.load(
            copies_ptr + expert[:, None] * programs + at,
            mask=here[:, None] & (at < programs), other=0,
        )  # fmt: skip
        before += tl.sum(tl.where(at < program, counts, 0), 1)
        total += tl.sum(counts, 1)
    padded = (total + alignment - 1) // alignment * alignment
    ends = tl.cumsum(padded, 0)
    starts = ends - padded

    table = _copies(local, top_k, CHUNK, WIDTH, EXPERTS)
    free = (starts + before)[None, :] + tl.cumsum(table, 0) - table  # rows, of each token's copies
    for place in range(top_k):
        its, hits = _of_place(local, place, WIDTH, EXPERTS)
        copy = tl.sum(hits * free, 1)
        copy = tl.where((its >= 0) & (copy < size), copy, -1)
        tl.store(sources_ptr + row * (2 + top_k) + 2 + place, copy, mask=real)
        tl.store(rows_ptr + row * top_k + place, copy.to(tl.int64), mask=real)
        free += hits

    if program == 0:
        first, last = tl.minimum(starts, size), tl.minimum(ends, size)
        tl.store(result_ptr + expert, total.to(tl.int64), mask=here)
        tl.store(result_ptr + local_experts, tl.zeros([], tl.int64))
        tl.store(result_ptr + local_experts + 1 + expert, last.to(tl.int64), mask=here)
        tl.store(result_ptr + 2 * local_experts + 1, tl.sum(padded, 0).to(tl.int64))
        tl.store(written_ptr + expert, tl.minimum(total, last - first), mask=here)
