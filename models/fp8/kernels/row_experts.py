"""Which expert each permuted row belongs to: for GEMMs that want to be told row by row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fp8.tensor import ceil_div

SIZE = 128  # rows a program writes


def row_experts(offsets: Tensor, rows: int) -> Tensor:
    """int32 `[rows]` from `offsets [E + 1]` int64; -1 after the last segment."""
    out = torch.empty(rows, dtype=torch.int32, device=offsets.device)
    experts = len(offsets) - 1
    if rows:
        _row_experts_kernel[(ceil_div(rows, SIZE),)](
            offsets, out, rows, experts, SIZE=SIZE, EXPERTS=triton.next_power_of_2(experts)
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
