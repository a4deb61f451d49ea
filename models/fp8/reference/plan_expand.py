"""Which tokens come to this rank and where their copies go: the plan of an expanding dispatch.

`plan_arrivals` and `plan_rows`, one after the other, and what DeepEP v2's handle says of both. On a
GPU these are small kernels before every layer's dispatch, and each is one more launch to wait for;
as one operation they are two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.fp8.reference.plan_arrivals import Arrivals, plan_arrivals
from models.fp8.reference.plan_rows import RowMap, plan_rows
from models.fp8.tensor import BLOCK


@dataclass(frozen=True, eq=False)
class ExpandedArrivals(Arrivals):
    """Arrivals whose `sources` say the rows of the copies, which are those of `rows`."""

    rows: RowMap
    """The plan of the experts' rows: of `ids`, so R is W * T."""
    written: Tensor
    """int32 `[E]`: rows of each expert that a copy is written to: fewer than its `counts` where
    there was no room for all."""


def plan_expand(
    expert_ids: Tensor,
    rank: int,
    local_experts: int,
    alignment: int = BLOCK,
    max_rows: int | None = None,
    step: int = 1,
) -> ExpandedArrivals:
    """The plan of one rank from `expert_ids` int64 `[W, T, k]`, of all ranks' tokens.

    expert_ids, rank, local_experts: as for `plan_arrivals`, and its ValueError. alignment,
    max_rows, step: as for `plan_rows`; without `max_rows` it waits for the device.
    """
    plan = plan_arrivals(expert_ids, rank, local_experts)
    rows = plan_rows(plan.ids, local_experts, alignment, max_rows, step)
    plan.sources[:, 2:] = rows.rows
    written = torch.minimum(rows.counts, rows.offsets.diff()).int()
    return ExpandedArrivals(**vars(plan), rows=rows, written=written)
