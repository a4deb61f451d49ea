"""Which tokens arrive at this rank, and in which order, planned on the device in two launches.

Every rank's tokens are cut into chunks, and a program has one of them, twice:

    count   how many of its tokens come here; of this rank's own, how many go to each rank
    place   what earlier chunks have, which each program adds up for itself, and the position within
            the chunk: that is a token's row, and everything known of it is written there

A token that does not come gets a row too, after all that do, so that every row is written once by
the program that owns it and nothing has to be filled first. For 2 ranks of 16,384 tokens and 8
experts each, 8 MB are moved in all: the cost is the two launches.
`plan_expand.py` does more in the same two.

Nothing waits: how many arrive stays on the device, `ends[-1]`.
"""

from typing import NamedTuple

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


class Work(NamedTuple):
    """What is launched, and what both kernels take."""

    programs: int
    counts: tuple[Tensor, ...]
    """ids int64 [W, T, k]; of each sending rank's chunks the tokens that come here, int32
    [W, chunks]; of this rank's those that go to each, [W, chunks]."""
    plan: Arrivals
    """What is written."""
    sizes: tuple[int, ...]
    width: int
    """Of a table with a column for each of a token's experts: a power of 2."""


def prepare(expert_ids: Tensor, rank: int, local_experts: int) -> Work:
    """Memory for a plan, from the arguments of `plan_arrivals`."""
    check_ids(expert_ids)
    ids = expert_ids.contiguous()
    ranks, tokens, top_k = ids.shape
    chunks = max(ceil_div(tokens, CHUNK), 1)  # with no tokens, ends are still written

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=ids.device)

    plan = Arrivals(
        ids=ints(ranks * tokens, top_k, dtype=torch.int64),
        sources=ints(ranks * tokens, 2 + top_k),
        ends=ints(ranks),
        slots=ints(tokens, top_k),
        sent=ints(ranks),
    )
    return Work(
        programs=ranks * chunks,
        counts=(ids, ints(ranks, chunks), ints(ranks, chunks)),
        plan=plan,
        sizes=(rank, local_experts, ranks, tokens, chunks, top_k),
        width=triton.next_power_of_2(top_k),
    )


def plan_arrivals(expert_ids: Tensor, rank: int, local_experts: int) -> Arrivals:
    """The plan of one rank from `expert_ids` int64 `[W, T, k]`, of all ranks' tokens.

    The values of `reference.plan_arrivals`, and its ValueError.
    """
    programs, counts, plan, sizes, width = prepare(expert_ids, rank, local_experts)
    _count_arrivals_kernel[(programs,)](*counts, *sizes, CHUNK=CHUNK, WIDTH=width)
    _place_arrivals_kernel[(programs,)](
        *counts, *vars(plan).values(), *sizes, CHUNK=CHUNK, WIDTH=width, SPAN=SPAN
    )
    return plan


@triton.jit
def _count_arrivals_kernel(
    ids_ptr, coming_ptr, going_ptr, rank, local_experts, ranks, tokens, chunks, top_k,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    count_arrivals(
        ids_ptr, coming_ptr, going_ptr, rank, local_experts, ranks, tokens, chunks, top_k,
        CHUNK, WIDTH,
    )  # fmt: skip


@triton.jit
def _place_arrivals_kernel(
    ids_ptr, coming_ptr, going_ptr, out_ids_ptr, sources_ptr, ends_ptr, slots_ptr, sent_ptr,
    rank, local_experts, ranks, tokens, chunks, top_k,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    _, row, real = place_arrivals(
        ids_ptr, coming_ptr, going_ptr, out_ids_ptr, sources_ptr, ends_ptr, slots_ptr, sent_ptr,
        rank, local_experts, ranks, tokens, chunks, top_k, CHUNK, WIDTH, SPAN,
    )  # fmt: skip
    place = tl.arange(0, WIDTH)[None, :]
    copies = sources_ptr + row[:, None] * (2 + top_k) + 2 + place
    none = tl.full([CHUNK, WIDTH], -1, tl.int32)
    tl.store(copies, none, mask=real[:, None] & (place < top_k))


@triton.jit
def _chunk(
    ids_ptr, sender, chunk, rank, local_experts, tokens, top_k,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A chunk's tokens and their numbers; tables [CHUNK, WIDTH] of the ranks that their experts
    live on, and of those here."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    place = tl.arange(0, WIDTH)[None, :]
    number = (sender * tokens + token).to(tl.int64)
    real = (token < tokens)[:, None] & (place < top_k)
    ids = tl.load(ids_ptr + number[:, None] * top_k + place, mask=real, other=-1).to(tl.int32)
    target = tl.where(ids >= 0, ids // local_experts, -1)
    return token, number, target, tl.where(target == rank, ids - rank * local_experts, -1)


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
def count_arrivals(
    ids_ptr, coming_ptr, going_ptr, rank, local_experts, ranks, tokens, chunks, top_k,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program of the first kernel. Returns the chunk's table of experts here, [CHUNK, WIDTH]."""
    sender = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    _, _, target, local = _chunk(
        ids_ptr, sender, chunk, rank, local_experts, tokens, top_k, CHUNK, WIDTH
    )
    comes = tl.max((local >= 0).to(tl.int32), 1)
    tl.store(coming_ptr + tl.program_id(0), tl.sum(comes, 0))
    if sender == rank:
        for to in range(ranks):
            goes = tl.max((target == to).to(tl.int32), 1)
            tl.store(going_ptr + to * chunks + chunk, tl.sum(goes, 0))
    return local


@triton.jit
def place_arrivals(
    ids_ptr, coming_ptr, going_ptr, out_ids_ptr, sources_ptr, ends_ptr, slots_ptr, sent_ptr,
    rank, local_experts, ranks, tokens, chunks, top_k,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program of the second: everything but the rows of copies. Returns the chunk's table of
    experts here [CHUNK, WIDTH], the rows of its tokens, and which of them there are, [CHUNK]."""
    sender = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    token, number, target, local = _chunk(
        ids_ptr, sender, chunk, rank, local_experts, tokens, top_k, CHUNK, WIDTH
    )
    place = tl.arange(0, WIDTH)[None, :]
    real = token < tokens

    before, total = _sum_of_first(coming_ptr, tl.program_id(0), ranks * chunks, SPAN)
    comes = tl.max((local >= 0).to(tl.int32), 1)
    earlier = before + tl.cumsum(comes, 0) - comes  # of those that come
    row = tl.where(comes > 0, earlier, total + number.to(tl.int32) - earlier).to(tl.int64)
    last = tl.maximum(tl.max(tl.where(local >= 0, place, -1), 1), 0)
    mask = real[:, None] & (place < top_k)
    tl.store(out_ids_ptr + row[:, None] * top_k + place, local.to(tl.int64), mask=mask)
    sources = sources_ptr + row * (2 + top_k)
    tl.store(sources, number.to(tl.int32), mask=real)
    tl.store(sources + 1, sender * top_k + last, mask=real)
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
    return local, row, real
