"""What moves tokens between ranks: one interface, two implementations, and who is taken where."""

import os
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from models.config import ModelConfig, MoEConfig
from models.moe.dispatch.all_to_all import AllToAll

Handle = TypeVar("Handle")
"""The way of one dispatch, which the backward pass and combine take again."""


class Dispatcher(Protocol[Handle]):
    """Dispatch and combine, each the other's backward. Shapes are in `all_to_all.py`."""

    name: str
    ranks: int
    bytes_sent: int

    @property
    def why_it_waits(self) -> str | None:
        """Why the host waits in each first `dispatch` whatever `wait` says; None if it does not."""

    def mark(self) -> Any:
        """The count behind `bytes_sent` as it is now, without waiting for it."""

    def rewind(self, mark: Any) -> None:
        """Count on from there."""

    def dispatch(
        self, tensors: tuple[Tensor, ...], expert_ids: Tensor, weights: Tensor, wait: bool = True
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Handle]: ...

    def dispatch_again(self, tensors: tuple[Tensor, ...], handle: Handle) -> tuple[Tensor, ...]: ...

    def combine(
        self, x: Tensor, handle: Handle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]: ...

    def close(self) -> None: ...


def choose(
    model: ModelConfig, moe: MoEConfig, device: str, group: dist.ProcessGroup
) -> tuple[Dispatcher, str]:
    """DeepEP where `moe.dispatch` and this machine allow it, else all_to_all; which, for the user.

    All ranks of the group together, as DeepEP allocates its buffer with all of them.
    """
    why = ""
    if device == "cuda" and moe.dispatch != "all_to_all":
        reason = why_no_deep_ep(model, moe, group.size())
        if reason is None:
            from models.moe.dispatch.deep_ep import DeepEP

            deep_ep = DeepEP(group, moe.num_experts, model.hidden_size, moe.dispatch_sms)
            return deep_ep, "dispatch by deep_ep"
        why = f" (not deep_ep: {reason})"
    return AllToAll(group, moe.num_experts), f"dispatch by all_to_all{why}"


def why_no_deep_ep(model: ModelConfig, moe: MoEConfig, ranks: int) -> str | None:
    """Why DeepEP cannot run on this machine's GPUs, in one line; None if it can.

    `ranks` share one set of experts.
    """
    from models.moe.dispatch import deep_ep

    return deep_ep.unavailable(
        ranks,
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        model.hidden_size,
        2 if moe.path == "bf16" else 1,
        moe.top_k,
        moe.num_experts // ranks,
    )
