"""What moves tokens between ranks: one interface, three implementations, and the choice of one."""

import os
from typing import Any, Protocol, TypeGuard, TypeVar

import torch.distributed as dist
from torch import Tensor

from models.config import DeepEPName, ModelConfig, MoEConfig, PathName
from models.fp8.operations import Operations
from models.fp8.reference.plan_rows import RowMap
from models.fp8.tensor import BlockScaledTensor, Layout, ceil_div
from models.moe.dispatch.all_to_all import AllToAll

Handle = TypeVar("Handle")
"""The routing of one dispatch, which combine and the backward pass reuse."""

Rows = TypeVar("Rows", Tensor, BlockScaledTensor)
"""Rows of tokens as they are sent: in high precision, or in FP8 with their scales."""

V2_FASTER = (2,)
"""Numbers of expert-parallel ranks on which DeepEP v2 was measured to be faster than v1: `auto` and
`deep_ep` use it there where both can run. fp8_direct was measured in training, bf16 in a layer and
from sitting to sitting (docs/performance.md, docs/kernels.md); fp8_baseline and fp8_compact, which
dispatch as fp8_direct does, were not. On 4 ranks fp8_direct took the same by both."""
V2_FIRST: frozenset[PathName] = frozenset({"fp8_fused"})
"""Paths that use v2 on any number of ranks, since only v2 does what they are made for."""


class Dispatcher(Protocol[Handle]):
    """Dispatch and combine, each the other's backward. Shapes are in `all_to_all.py`."""

    name: str
    ranks: int
    bytes_sent: int
    expands: bool
    """Whether it is an `ExpandingDispatcher`; for one that is not, a Trip permutes what arrives."""

    @property
    def why_it_waits(self) -> str | None:
        """Why the host waits in each first `dispatch` whatever `wait` says; None if it does not."""

    def mark(self) -> Any:
        """The current count behind `bytes_sent`, without waiting for it."""

    def rewind(self, mark: Any) -> None:
        """Continue counting from there."""

    def dispatch(
        self, tensors: tuple[Tensor, ...], expert_ids: Tensor, weights: Tensor, wait: bool = True
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Handle]: ...

    def dispatch_again(self, tensors: tuple[Tensor, ...], handle: Handle) -> tuple[Tensor, ...]: ...

    def combine(
        self, x: Tensor, handle: Handle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]: ...

    def close(self) -> None: ...


class ExpandingDispatcher(Dispatcher[Handle], Protocol[Handle]):
    """One whose dispatch also puts each copy among its expert's rows. Shapes: `deep_ep_v2.py`."""

    def expand(
        self,
        x: Rows,
        layout: Layout,
        expert_ids: Tensor,
        weights: Tensor,
        alignment: int,
        max_rows: int | None,
    ) -> tuple[Rows, Tensor, RowMap, Handle]: ...

    def expand_again(self, x: Rows, layout: Layout, handle: Handle) -> Rows: ...


def can_expand(dispatcher: Dispatcher) -> TypeGuard[ExpandingDispatcher]:
    return dispatcher.expands


def choose(
    model: ModelConfig, moe: MoEConfig, device: str, group: dist.ProcessGroup, ops: Operations
) -> tuple[Dispatcher, str]:
    """DeepEP where `moe.dispatch` and this machine allow it, else all_to_all; and a line for the
    user.

    All ranks of the group together, as DeepEP allocates its buffer with all of them.
    """
    chosen, why = None, ""
    if device == "cuda" and moe.dispatch != "all_to_all":
        chosen, reasons = _first_that_can(model, moe, group.size())
        if reasons:
            why = f" (not {_said(reasons, named=True)})"
    dispatcher: Dispatcher
    if chosen == "deep_ep_v1":
        from models.moe.dispatch.deep_ep_v1 import DeepEPv1

        dispatcher = DeepEPv1(group, moe.num_experts, model.hidden_size, moe.dispatch_sms)
    elif chosen == "deep_ep_v2":
        from models.moe.dispatch.deep_ep import half_of_the_multiprocessors
        from models.moe.dispatch.deep_ep_v2 import DeepEPv2

        expanding: ExpandingDispatcher = DeepEPv2(
            group,
            ops,
            moe.num_experts,
            model.hidden_size,
            moe.top_k,
            model.seq_len,
            moe.dispatch_sms or half_of_the_multiprocessors(),
            ceil_div(group.size(), _ranks_here()),
        )
        dispatcher = expanding
    else:
        dispatcher = AllToAll(group, moe.num_experts)
    if moe.path == "fp8_fused":
        fused = "does the permute too" if dispatcher.expands else "is followed by a permute"
        why = f", which {fused}{why}"
    return dispatcher, f"dispatch by {dispatcher.name}{why}"


def why_no_deep_ep(model: ModelConfig, moe: MoEConfig, ranks: int) -> str | None:
    """Why no DeepEP that `moe.dispatch` allows can run on this machine's GPUs, in one line.

    None if one can. `ranks` share one set of experts.
    """
    chosen, reasons = _first_that_can(model, moe, ranks)
    return None if chosen else _said(reasons, named=False)


def _first_that_can(
    model: ModelConfig, moe: MoEConfig, ranks: int
) -> tuple[DeepEPName | None, dict[DeepEPName, str]]:
    """The version to use, of those that `moe.dispatch` allows, and why those before it can't run
    here."""
    versions: tuple[DeepEPName, ...] = ("deep_ep_v1", "deep_ep_v2")
    if ranks in V2_FASTER or moe.path in V2_FIRST:
        versions = versions[::-1]
    if moe.dispatch == "deep_ep_v1" or moe.dispatch == "deep_ep_v2":
        versions = (moe.dispatch,)
    reasons: dict[DeepEPName, str] = {}
    for version in versions:
        reason = _why_not(version, model, moe, ranks)
        if reason is None:
            return version, reasons
        reasons[version] = reason
    return None, reasons


def _why_not(version: DeepEPName, model: ModelConfig, moe: MoEConfig, ranks: int) -> str | None:
    if version == "deep_ep_v2":
        from models.moe.dispatch import deep_ep_v2_needs

        return deep_ep_v2_needs.unavailable(ranks, _ranks_here(), model.hidden_size, moe.top_k)
    from models.moe.dispatch import deep_ep_v1

    return deep_ep_v1.unavailable(
        ranks,
        _ranks_here(),
        model.hidden_size,
        2 if moe.path == "bf16" else 1,
        moe.top_k,
        moe.num_experts // ranks,
    )


def _said(reasons: dict[DeepEPName, str], named: bool) -> str:
    """Once what is the same for all versions, which need not be `named` then."""
    if len(set(reasons.values())) > 1:
        return "; ".join(f"{version}: {reason}" for version, reason in reasons.items())
    reason = next(iter(reasons.values()))
    return f"{' or '.join(reasons)}: {reason}" if named else reason


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
