"""Which tokens arrive at this rank, and in which order, planned on the device in two launches.

Every rank's tokens are cut into chunks, and a program has one of them, twice:

    count   how many of its tokens come here; of this rank's own, how many go to each rank
    place   what earlier chunks have, which each program adds up for itself, and the position within
            the chunk: that is a token's row, and everything known of it is written there

A token that does not come gets a row too, after all that do, so that every row is written once by
the program that owns it and nothing has to be filled first. For 2 ranks of 16,384 tokens and 8
experts each, 8 MB are moved in all: the cost is the two launches.

Nothing waits: how many arrive stays on the device, `ends[-1]`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.reference.plan_arrivals import Arrivals, check_ids
from models.fp8.tensor import ceil_div

CHUNK = 128
"""Tokens of a program."""
SPAN = 1024
"""Counts of chunks that a program adds up at once."""


def plan_arrivals(expert_ids: Tensor, rank: int, local_experts: int) -> Arrivals:
    """The plan of one rank from `expert_ids` int64 `[W, T, k]`, of all ranks' tokens.

    The values of `reference.plan_arrivals`, and its ValueError.
    """
    check_ids(expert_ids)
    ids = expert_ids.contiguous()
    ranks, tokens, top_k = ids.shape
    chunks = ceil_div(tokens, CHUNK)

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=ids.device)

    plan = Arrivals(
        ids=ints(ranks * tokens, top_k, dtype=torch.int64),
        sources=ints(ranks * tokens, 2 + top_k),
        ends=ints(ranks),
        slots=ints(tokens, top_k),
        sent=ints(ranks),
    )
    if not tokens:
        plan.ends.zero_()
        plan.sent.zero_()
        return plan
    # Of each sending rank's chunks, those that come here; of this rank's, those for each rank.
    coming, going = ints(ranks, chunks), ints(ranks, chunks)
    width = triton.next_power_of_2(top_k)
    _count_arrivals_kernel[(ranks * chunks,)](
        ids, coming, going, rank, local_experts, ranks, tokens, chunks, top_k,
        CHUNK=CHUNK, WIDTH=width,
    )  # fmt: skip
    _place_arrivals_kernel[(ranks * chunks,)](
        ids, coming, going, plan.ids, plan.sources, plan.ends, plan.slots, plan.sent,
        rank, local_experts, ranks, tokens, chunks, top_k, CHUNK=CHUNK, WIDTH=width, SPAN=SPAN,
    )  # fmt: skip
    return plan


@triton.jit
def _chunk(
    ids_ptr, sender, chunk, local_experts, tokens, top_k, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):
    """A chunk's tokens, its table of experts [CHUNK, WIDTH], and the ranks that they live on."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    place = tl.arange(0, WIDTH)[None, :]
    real = (token < tokens)[:, None] & (place < top_k)
    row = (sender * tokens + token).to(tl.int64)
    ids = tl.load(ids_ptr + row[:, None] * top_k + place, mask=real, other=-1).to(tl.int32)
    return token, row, ids, tl.where(ids >= 0, ids // local_experts, -1)


@triton.jit
def _count_arrivals_kernel(
    ids_ptr, coming_ptr, going_ptr, rank, local_experts, ranks, tokens, chunks, top_k,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sender = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    _, _, _, target = _chunk(ids_ptr, sender, chunk, local_experts, tokens, top_k, CHUNK, WIDTH)
    comes = tl.max((target == rank).to(tl.int32), 1)
    tl.store(coming_ptr + tl.program_id(0), tl.sum(comes, 0))
    if sender == rank:
        for to in range(ranks):
            goes = tl.max((target == to).to(tl.int32), 1)
            tl.store(going_ptr + to * chunks + chunk, tl.sum(goes, 0))


@triton.jit
def _sum_of_first(ptr, count, size, SPAN: tl.constexpr):
    """The sum of the first `count` of `size` numbers, and of all of them."""
    before = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.int32)
    for start in range(0, size, SPAN):
        at = start + tl.arange(0, SPAN)
        numbers = tl.load(ptr + at, mask=at < size, other=0)
        before += tl.sum(tl.where(at < count, numbers, 0), 0)
        total += tl.sum(numbers, 0)
    return before, total


@triton.jit
def _place_arrivals_kernel(
    ids_ptr, coming_ptr, going_ptr, out_ids_ptr, sources_ptr, ends_ptr, slots_ptr, sent_ptr,
    rank, local_experts, ranks, tokens, chunks, top_k,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    sender = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    token, number, ids, target = _chunk(
        ids_ptr, sender, chunk, local_experts, tokens, top_k, CHUNK, WIDTH
    )
    place = tl.arange(0, WIDTH)[None, :]
    real = token < tokens

    before, total = _sum_of_first(coming_ptr, tl.program_id(0), ranks * chunks, SPAN)
    ours = target == rank
    comes = tl.max(ours.to(tl.int32), 1)
    earlier = before + tl.cumsum(comes, 0) - comes  # of those that come
    row = tl.where(comes > 0, earlier, total + number.to(tl.int32) - earlier).to(tl.int64)
    last = tl.maximum(tl.max(tl.where(ours, place, -1), 1), 0)
    mask = real[:, None] & (place < top_k)
    local = tl.where(ours, ids - rank * local_experts, -1)
    tl.store(out_ids_ptr + row[:, None] * top_k + place, local.to(tl.int64), mask=mask)
    sources = sources_ptr + row * (2 + top_k)
    tl.store(sources, number.to(tl.int32), mask=real)
    tl.store(sources + 1, sender * top_k + last, mask=real)
    none = tl.full([CHUNK, WIDTH], -1, tl.int32)
    tl.store(sources[:, None] + 2 + place, none, mask=mask)
    if chunk == chunks - 1:
        tl.store(ends_ptr + sender, before + tl.sum(comes, 0))

    if sender == rank:
        slots = tl.full([CHUNK, WIDTH], -1, tl.int32)
        for to in range(ranks):
            earlier_there, _ = _sum_of_first(going_ptr + to * chunks, chunk, chunks, SPAN)
            wanted = target == to
            goes = tl.max(wanted.to(tl.int32), 1)
            slot = rank * tokens + earlier_there + tl.cumsum(goes, 0) - goes
            final = tl.max(tl.where(wanted, place, -1), 1)
            slots = tl.where(wanted & (place == final[:, None]), slot[:, None], slots)
            if chunk == chunks - 1:
                tl.store(sent_ptr + to, earlier_there + tl.sum(goes, 0))
        tl.store(slots_ptr + token[:, None] * top_k + place, slots, mask=mask)
