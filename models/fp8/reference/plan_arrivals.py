"""Which tokens arrive at this rank, and in which order: every rank makes the plan itself.

Each rank knows the experts of all ranks' tokens, so all come to the same plan and no counter is
shared between them. (A kernel that takes places in the order in which its threads come gives other
places in every run.) A token that several experts here want arrives once; what arrives is ordered
by the sending rank and then by token, as `dispatch/all_to_all.py` has it.

Let W be the ranks, T the tokens of each, k the experts a token is routed to. Expert `e` lives on
rank `e // E`, where each rank holds E.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Arrivals:
    """The plan as DeepEP v2's kernels read it (`dispatch/deep_ep_v2.py`).

    W * T rows is the most that can arrive. Those that do come first, followed by the rest.
    """

    ids: Tensor
    """int64 `[W * T, k]`: of each row the experts here, counted from 0; -1 for one elsewhere, and
    where nothing arrives."""
    sources: Tensor
    """int32 `[W * T, 2 + k]`: number of the token, `rank * T + t`; `rank * k` and the last of its
    places whose expert is here; and k places for the rows of its copies, all -1."""
    ends: Tensor
    """int32 `[W]`: where the rows of each sending rank end; the last one is how many arrive."""
    slots: Tensor
    """int32 `[T, k]`, of this rank's tokens: `rank * T` and how many of its tokens go to the same
    rank before this one; at the last place with an expert of that rank, and -1 elsewhere."""
    sent: Tensor
    """int32 `[W]`: tokens that this rank sends to each."""


def plan_arrivals(expert_ids: Tensor, rank: int, local_experts: int) -> Arrivals:
    """The plan of one rank from `expert_ids` int64 `[W, T, k]`, of all ranks' tokens.

    An id of -1 belongs to no expert: a rank with fewer tokens than others pads with it. Raises
    ValueError for another shape or dtype.
    """
    check_ids(expert_ids)
    ranks, tokens, top_k = expert_ids.shape
    total = ranks * tokens
    places = torch.arange(top_k, device=expert_ids.device)
    targets = torch.where(expert_ids >= 0, expert_ids // local_experts, -1)

    ours = (targets == rank).view(total, top_k)
    arrives = ours.any(1)
    ends = arrives.view(ranks, tokens).sum(1).cumsum(0)
    order = (~arrives).int().argsort(stable=True)  # those that arrive, and then the rest
    ours, number = ours[order], order.int()
    ids = torch.where(ours, expert_ids.view(total, top_k)[order] - rank * local_experts, -1)
    last = torch.where(ours, places, -1).amax(1).clamp(min=0)
    sources = torch.full((total, 2 + top_k), -1, dtype=torch.int32, device=expert_ids.device)
    sources[:, 0] = number
    sources[:, 1] = number // tokens * top_k + last

    mine = targets[rank]
    wanted = mine[:, None, :] == torch.arange(ranks, device=expert_ids.device)[:, None]  # [T, W, k]
    goes = wanted.any(2)
    slot = (rank * tokens + goes.cumsum(0) - 1)[:, :, None]
    is_last = wanted & (places == torch.where(wanted, places, -1).amax(2, keepdim=True))
    slots = torch.where(is_last, slot, -1).amax(1)
    return Arrivals(ids, sources, ends.int(), slots.int(), goes.sum(0).int())


def check_ids(expert_ids: Tensor) -> None:
    """Raises ValueError unless they are int64 `[W, T, k]`."""
    if expert_ids.dtype is not torch.int64 or expert_ids.dim() != 3:
        raise ValueError(
            f"expert ids must be int64 [W, T, k], got {expert_ids.dtype} {list(expert_ids.shape)}"
        )
