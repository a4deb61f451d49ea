"""A plan of ours as DeepEP v2's handle, and a handle of its own as our plan.

A handle says who sent what to whom. DeepEP makes one in a first dispatch; since we make it here,
every dispatch is one with a known routing. What is in it, with W ranks of T tokens, k experts a
token, E experts here, P rows of theirs, and R rows received:

    dst_buffer_slot_idx          int32 [T, k]      the sender's: places in the receivers' buffers
    psum_..._scaleup_rank        int32 [W]         where the rows of each sender end
    recv_src_metadata            int32 [R, 2 + k]  of a received row: its token; sender and place;
                                                   and the rows that it is copied to, -1 for none
    num_unaligned_..._expert     int32 [E]         rows of each expert; those up to a multiple of
                                                   the alignment are filled with zeros
    num_recv_tokens              R; W * T also says that R is on the device
    num_expanded_tokens          P: what is allocated
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.fp8.reference.plan_arrivals import Arrivals
from models.fp8.reference.plan_expand import ExpandedArrivals
from models.fp8.reference.plan_rows import RowMap

VERSION = "2.1.0"
FIELDS = {
    "do_expand", "num_experts", "expert_alignment", "num_max_tokens_per_rank", "num_sms",
    "topk_idx", "num_recv_tokens", "num_expanded_tokens", "num_recv_tokens_per_expert_list",
    "psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert", "recv_src_metadata", "dst_buffer_slot_idx",
    "token_metadata_at_forward", "channel_linked_list",
}  # fmt: skip
"""What a handle is made of in that version. With others it may mean something else."""


@dataclass(frozen=True)
class Handle:
    """The routing of one dispatch; combine and the backward pass reuse it."""

    layout: Any  # DeepEP's own, an EPHandle
    rows_per_rank: Tensor  # int32 [ranks]: rows that this rank sent to each


def as_handle(
    plan: Arrivals,
    expert_ids: Tensor,
    received: int,
    alignment: int,
    num_experts: int,
    tokens: int,
    num_sms: int,
) -> Any:
    """An EPHandle for `expert_ids` [T, k]; one that expands if the plan does.

    received: the rows that there is memory for. tokens: T of the plan, at least this rank's own.
    """
    from deep_ep import EPHandle

    if isinstance(plan, ExpandedArrivals):
        expands, rows, written = True, plan.rows.num_rows, plan.written
    else:
        # One that does not expand never looks at counts of experts, so nobody fills them.
        expands, rows, written = False, 0, plan.ends.new_empty(num_experts // len(plan.ends))
    return EPHandle(
        do_expand=expands,
        num_experts=num_experts,
        expert_alignment=alignment,
        num_max_tokens_per_rank=tokens,
        num_sms=num_sms,
        topk_idx=expert_ids,
        num_recv_tokens=received,
        num_expanded_tokens=rows,
        num_recv_tokens_per_expert_list=[],
        psum_num_recv_tokens_per_scaleup_rank=plan.ends,
        psum_num_recv_tokens_per_expert=written,  # counters of a first dispatch: not read later
        num_unaligned_recv_tokens_per_expert=written,
        recv_src_metadata=plan.sources[:received],
        dst_buffer_slot_idx=plan.slots[: len(expert_ids)],
        token_metadata_at_forward=None,
        channel_linked_list=None,
    )


def as_row_map(layout: Any, alignment: int) -> RowMap:
    """The plan of an EPHandle that DeepEP has made, after a dispatch that waited."""
    counts = layout.num_unaligned_recv_tokens_per_expert.long()
    padded = (counts + alignment - 1) // alignment * alignment
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    rows = layout.recv_src_metadata[:, 2:].long()
    return RowMap(rows, counts, offsets, offsets[-1], layout.num_expanded_tokens)
