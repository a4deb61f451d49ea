"""Token dispatch by DeepEP v2: `ElasticBuffer`, over NCCL's device API, NVLink in a node.

What its two kernels do, as their source and its head of July 2026 (version 2.1.0) have it:

- The first sends each token once to each rank that needs it, into a buffer there. The second writes
  it to its row: one row of what arrived or, **expanding**, a row for each of its experts here,
  grouped by expert, with zeros in the rows that round up, and its scales in either layout.
- With a **handle** both use the places that it gives. Without one places follow the order in which
  threads arrive, which differs from run to run, and the host has to wait for the number of rows or
  have memory for the worst case, every token of every rank for `min(top_k, experts here)` experts.
  That is 2 times an even share for 2 ranks and 8 times for 8.
- So on one node the plan is made here, and each call has a handle. All ranks learn the experts of
  all tokens (1 MB a rank for 16,384 tokens and top-8), `ops.plan_arrivals` says which rows arrive
  where, and `ops.plan_rows` where their copies go. Then the rows are those of `all_to_all.py` and
  of `permute`, in their order: the same bits in each run. Nothing waits where `max_rows` is given,
  P is `max_rows`, and copies beyond it have no place.
- Rows after the last expert's are not written, and nobody reads them.
- combine sums a token's copies on the experts' rank, in the order of its places, and then on its
  own rank: each sum in float32 and rounded to BF16 once (two in BF16 at once, which is the same).
  Those are the sums of `unpermute` and `all_to_all.py`, bit for bit, with two ranks. With more,
  ranks are summed in the order of each token's places, not in their own.
- A hidden size is a multiple of 256, for combine, and top_k 32 at most.
- A buffer holds T tokens of each rank, so it grows with T and with the ranks, see `buffer_bytes`.

Between nodes v2 keeps more in a handle than can be planned here. There it plans for itself, and the
host waits. **That has not been run.** It takes RDMA with GPU-initiated networking in NCCL, which
`EP_DISABLE_GIN=1` switches off; on one node there is nothing for that to do, and it is set.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.fp8.operations import Operations
from models.fp8.reference.plan_arrivals import Arrivals
from models.fp8.reference.plan_rows import RowMap
from models.fp8.tensor import BlockScaledTensor, Layout
from models.moe.dispatch import Rows
from models.moe.dispatch.deep_ep import CountsBytes, as_argument, as_tuple, check_bf16
from models.moe.dispatch.deep_ep_v2_handle import Handle, as_handle, as_row_map

DISABLE_GIN = "EP_DISABLE_GIN"


class DeepEPv2(CountsBytes):
    """Dispatch and combine over a process group whose ranks hold `num_experts` experts in order.

    One object, and so one buffer, serves all layers: calls are ordered by the current stream, and
    nothing stays in the buffer when a call has ended. The buffer does not come from PyTorch's
    allocator, so `memory/peak_allocated_gib` does not see it: `buffer_bytes`.

    Every call is a collective: all ranks make the same calls in the same order.
    """

    name = "deep_ep_v2"
    expands = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        ops: Operations,
        num_experts: int,
        hidden_size: int,
        top_k: int,
        tokens: int,
        num_sms: int,
        nodes: int = 1,
        device: str = "cuda",
    ) -> None:
        """Allocates a buffer, with all ranks of the group: a missing library or a rank that cannot
        reach the others shows before training.

        ops: for the plans. hidden_size: of the widest rows that will be sent. tokens: of a rank in
        one dispatch; for more, the buffer is replaced, where every rank has the same number. nodes:
        that the group lies on. num_sms: multiprocessors that the first kernel takes; all its blocks
        run at the same time, as do those of an NCCL kernel, so too many leave two ranks waiting for
        each other. Raises ImportError without DeepEP; `deep_ep_v2_needs.unavailable` says more.
        """
        super().__init__(group.size(), group.rank(), device)
        self.group = group
        self.ops = ops
        self.num_experts = num_experts
        self.local_experts = num_experts // self.ranks
        self.nodes = nodes
        self.num_sms = num_sms
        self._shape = (hidden_size, top_k)
        if nodes == 1:
            os.environ.setdefault(DISABLE_GIN, "1")
        # It takes over NCCL's communicator of the group, which the first collective makes.
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        self._buffer: Any = None
        self._allocate(tokens)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of GPU memory, outside PyTorch's allocator."""
        return self._buffer.num_bytes

    @property
    def why_it_waits(self) -> str | None:
        if self.nodes == 1:
            return None
        return "DeepEP v2 between nodes has to know how many rows arrive"

    def dispatch(
        self, tensors: tuple[Tensor, ...], expert_ids: Tensor, weights: Tensor, wait: bool = True
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Handle]:
        """Send every token to the ranks of its experts.

        tensors: (x,), BF16 [T, H], or (data, scales), FP8 [T, H] and float32 [T, H / 128].
        expert_ids: int64 [T, top_k], global. weights: float32 [T, top_k]. wait: whether the host
        waits to know R; if not, and on one node, R is the most that can arrive. Empty rows have -1
        as every expert.

        Returns the received rows of each tensor [R, n], on one node ordered by sending rank and
        then by token; the experts here that each row is for, int64 [R, top_k], counted from 0 and
        -1 where the expert is elsewhere; their weights [R, top_k], those of other experts too,
        which are never read; and the handle.
        """
        x = as_argument(tensors)
        expert_ids, weights = expert_ids.contiguous(), weights.contiguous()
        if self.nodes > 1:
            received, ids, received_weights, handle = self._plan_there(x, expert_ids, weights)
        else:
            everyones = self._gather(expert_ids)
            plan = self.ops.plan_arrivals(everyones, self.group.rank(), self.local_experts)
            rows = int(plan.ends[-1]) if wait else len(plan.ids)
            ids = plan.ids[:rows]
            handle = self._handle(plan, expert_ids, rows, 1)
            received, _, received_weights, *_ = self._buffer.dispatch(
                x, handle=handle.layout, topk_weights=weights, num_sms=self.num_sms
            )
        self._count(x, handle)
        return as_tuple(received), ids, received_weights, handle

    def dispatch_again(self, tensors: tuple[Tensor, ...], handle: Handle) -> tuple[Tensor, ...]:
        """Send other rows, such as gradients, to where the handle's tokens went.

        tensors: as `dispatch` takes them, in FP8 or BF16 whatever the first ones were. The host
        does not wait.
        """
        x = as_argument(tensors)
        received, *_ = self._buffer.dispatch(x, handle=handle.layout, num_sms=self.num_sms)
        self._count(x, handle)
        return as_tuple(received)

    def combine(
        self, x: Tensor, handle: Handle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Send rows back and sum the copies of each token: BF16 [R, H] to [T, H].

        weights: optional float32 [R, top_k], 0 where the expert is elsewhere, which are sent back
        the same way, each to the one place it came from: [T, top_k]. After `expand` the rows are
        those of its experts, [P, H], and their weights [P]. Raises TypeError unless x is BF16.
        """
        check_bf16(x)
        home, home_weights, _ = self._buffer.combine(
            x.contiguous(),
            handle.layout,
            topk_weights=None if weights is None else weights.contiguous(),
            num_sms=self.num_sms,
        )
        return home, home_weights

    def expand(
        self,
        x: Rows,
        layout: Layout,
        expert_ids: Tensor,
        weights: Tensor,
        alignment: int,
        max_rows: int | None,
    ) -> tuple[Rows, Tensor, RowMap, Handle]:
        """Send every token to the rows of its experts: dispatch, wrap and permute in one.

        x: BF16 [T, H], or a matrix in FP8 whose scales may lie in either layout; they arrive in
        `layout`. expert_ids, weights: as for `dispatch`. alignment: the rows of each expert are
        rounded up to a multiple of it. max_rows: P, a multiple of the alignment, where the host
        does not wait to know it; copies beyond it are dropped. Where it waits, P is a multiple of
        `ops.rows_step()`, but between nodes, where DeepEP allocates what it has counted.

        Returns the experts' rows [P, H], zeros where they are rounded up; the routing weight of
        each row, float32 [P], 0 where there is none; the plan, for the rows that `dispatch` would
        give; and the handle.
        """
        expert_ids, weights = expert_ids.contiguous(), weights.contiguous()
        argument = _argument(x)
        how = _how(layout)
        if self.nodes > 1:
            received, _, probs, handle = self._plan_there(
                argument, expert_ids, weights, expert_alignment=alignment, **how
            )
            rows = as_row_map(handle.layout, alignment)
        else:
            plan = self.ops.plan_expand(
                self._gather(expert_ids),
                self.group.rank(),
                self.local_experts,
                alignment,
                max_rows,
                self.ops.rows_step(),
            )
            rows = plan.rows
            handle = self._handle(plan, expert_ids, len(plan.ids), alignment)
            received, _, probs, *_ = self._buffer.dispatch(
                argument, handle=handle.layout, topk_weights=weights, num_sms=self.num_sms, **how
            )
        self._count(argument, handle)
        return _wrapped(x, received, layout), probs, rows, handle

    def expand_again(self, x: Rows, layout: Layout, handle: Handle) -> Rows:
        """Send other rows, such as gradients, to where the handle's tokens went: [T, H] to [P, H].

        As `expand` takes and gives them, in FP8 or BF16 whatever the first ones were. The host does
        not wait.
        """
        argument = _argument(x)
        received, *_ = self._buffer.dispatch(
            argument, handle=handle.layout, num_sms=self.num_sms, **_how(layout)
        )
        self._count(argument, handle)
        return _wrapped(x, received, layout)

    def close(self) -> None:
        """Release the buffer, with all ranks of the group. Afterwards nothing else may be called.

        Not after an error on one rank: the others might never call it.
        """
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None

    def _allocate(self, tokens: int) -> None:
        """Replace a smaller buffer by one for this many tokens of each rank."""
        from deep_ep import ElasticBuffer

        self.close()
        hidden_size, top_k = self._shape
        self.tokens = tokens
        self._buffer = ElasticBuffer(
            self.group,
            num_max_tokens_per_rank=tokens,
            hidden=hidden_size,
            num_topk=top_k,
            use_fp8_dispatch=False,  # the larger of the two
            allow_hybrid_mode=self.nodes > 1,
            explicitly_destroy=True,
        )

    def _gather(self, expert_ids: Tensor) -> Tensor:
        """The experts of all ranks' tokens, [W, T, k], with -1 where a rank has fewer."""
        missing = self.tokens - len(expert_ids)
        if missing < 0:
            self._allocate(len(expert_ids))
        elif missing:
            expert_ids = F.pad(expert_ids, (0, 0, 0, missing), value=-1)
        everyones = expert_ids.new_empty(self.ranks * len(expert_ids), expert_ids.shape[1])
        dist.all_gather_into_tensor(everyones, expert_ids, group=self.group)
        return everyones.view(self.ranks, *expert_ids.shape)

    def _handle(self, plan: Arrivals, ids: Tensor, received: int, alignment: int) -> Handle:
        where = (self.num_experts, self.tokens, self.num_sms)
        return Handle(as_handle(plan, ids, received, alignment, *where), plan.sent)

    def _plan_there(
        self, x: Tensor | tuple[Tensor, Tensor], expert_ids: Tensor, weights: Tensor, **how: Any
    ) -> tuple[Any, Tensor, Tensor, Handle]:
        """The first dispatch between nodes: DeepEP makes the plan, and the host waits for it.

        Not run. The order of rows changes from run to run.
        """
        if len(expert_ids) > self.tokens:
            self._allocate(len(expert_ids))
        received, ids, received_weights, layout, _ = self._buffer.dispatch(
            x,
            topk_idx=expert_ids,
            topk_weights=weights,
            num_experts=self.num_experts,
            num_sms=self.num_sms,
            do_cpu_sync=True,
            **how,
        )
        targets = expert_ids // self.local_experts
        everyone = torch.arange(self.ranks, device=expert_ids.device)
        sent = (targets.unsqueeze(-1) == everyone).any(1).sum(0).int()
        return received, ids, received_weights, Handle(layout, sent)

    def _count(self, x: Tensor | tuple[Tensor, Tensor], handle: Handle) -> None:
        row_bytes = sum(t.shape[1] * t.element_size() for t in as_tuple(x))
        self.count(row_bytes, handle.rows_per_rank)


def _argument(x: Tensor | BlockScaledTensor) -> Tensor | tuple[Tensor, Tensor]:
    return as_argument((x.data, x.row_scales) if isinstance(x, BlockScaledTensor) else (x,))


def _how(layout: Layout) -> dict[str, bool]:
    """The arguments of an expanding dispatch that are the same each time."""
    return {
        "do_expand": True,
        "do_zero_padding": True,
        "use_tma_aligned_col_major_sf": layout is Layout.GEMM_READY,
    }


def _wrapped(sent: Rows, received: Any, layout: Layout) -> Rows:
    """What arrived, in the form of what was sent. GEMM_READY scales come with the strides (1, P):
    transposed they have the right layout, and nothing moves."""
    if not isinstance(sent, BlockScaledTensor):
        return received
    data, scales = received
    return BlockScaledTensor(data, scales if layout is Layout.COMPACT else scales.t(), layout)
