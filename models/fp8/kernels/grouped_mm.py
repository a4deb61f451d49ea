"""bfloat16 GEMM of all local experts in one launch: PyTorch's own, no kernel of ours.

`torch.nn.functional.grouped_mm` takes the end of each segment as int32 on the device, so the host
does not wait for the routing. It does not look at what is behind the last segment: rows there are
read by nobody and not written.

It wants 16-byte strides, so N and K are multiples of 8. Its weight gradient is bfloat16 and would
need a pass to become the optimizer's float32; see `grouped_mm_wgrad.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """fprop: `x [P, K]`, `w [E, N, K]` (may be a transposed view) to `[P, N]`, all bfloat16.

    Raises ValueError if shapes do not fit, TypeError for another dtype. `offsets [E + 1]` stay on
    the device and are not checked.
    """
    check_bf16(x, w)
    _check_experts(w.shape[0], offsets)
    if x.shape[1] != w.shape[2]:
        raise ValueError(f"x {list(x.shape)} and w {list(w.shape)} do not fit")
    if not x.shape[0]:
        return torch.empty(0, w.shape[1], dtype=x.dtype, device=x.device)
    return F.grouped_mm(x, w.transpose(1, 2), offs=_ends(offsets))


def grouped_mm_dgrad(dy: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """dgrad: `dy [P, N]`, `w [E, N, K]` to `[P, K]`; errors as `grouped_mm`."""
    return grouped_mm(dy, w.transpose(1, 2), offsets)


def _ends(offsets: Tensor) -> Tensor:
    return offsets[1:].to(torch.int32)


def check_bf16(a: Tensor, b: Tensor) -> None:
    """Raises TypeError unless both are bfloat16."""
    if a.dtype is not torch.bfloat16 or b.dtype is not torch.bfloat16:
        raise TypeError(f"only bfloat16 here, got {a.dtype} and {b.dtype}")


def _check_experts(experts: int, offsets: Tensor) -> None:
    if offsets.shape != (experts + 1,):
        raise ValueError(f"{experts} experts need {experts + 1} offsets, got {offsets.numel()}")
