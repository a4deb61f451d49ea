"""Token dispatch by DeepEP v1, release v1.2.1: its high-throughput kernels, NVLink in a node and
RDMA between.

On one node the results are those of `all_to_all.py`, bit for bit, so the two are exchangeable.
(Only the weights of experts elsewhere, which are never read, are 0 here.) What its kernels take:

- dispatch moves bytes. One tensor of any dtype (BF16 here), or FP8 data with float32 scales, one
  for each 128 values. The scales may have any strides, transposed ones included. What arrives is
  always `[R, H / 128]`, contiguous: COMPACT.
- combine sums in float32, in the order of the ranks, and rounds once. It takes BF16 alone, so
  gradients and outputs return in 2 bytes a value, whatever they came in.
- A dispatch with a handle (`dispatch_again`) takes either form, and sends no ids and no weights.
- combine reads a row with 32 lanes, 16 bytes each, and all lanes must stay together: the hidden
  size must be a multiple of 256. With 128 half of them leave the loop early, and sums are wrong
  or the kernel hangs.
- dispatch copies a row in two halves through 8 KiB of shared memory: a row may have up to 16,352
  bytes, which is a hidden size up to 7936 in BF16 and 16,128 in FP8. Beyond that, or with a top_k
  over 32, the kernel traps, hence the checks here. A rank holds 128 experts at most.
- It writes fresh tensors on a stream of its own. Whatever else writes them on the current stream,
  such as PyTorch's filling of uninitialized memory in deterministic mode, races with it.
- Every first dispatch writes its number of rows where the host would read it, whether the host
  waits or not: see `_wait_for_unwaited`.
- `expert_alignment` rounds the counts per expert that it returns, and pads nothing. It is not
  used: `plan_rows` counts for itself. On one node `num_worst_tokens` saves the host's wait for the
  number of rows by padding to the worst case; with top-8 routing that is hardly more than what
  arrives anyway.
- Between nodes, sums are rounded to BF16 once per node on the way, so the last bits differ there.
  This is from reading the code; several nodes have not been tried.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.moe.dispatch.deep_ep import (
    GUIDE,
    CountsBytes,
    as_argument,
    as_tuple,
    check_bf16,
    half_of_the_multiprocessors,
    no_groups,
    no_machine,
    no_package,
    no_peers,
)

NODE = 8
"""GPUs of a node, wherever there are several nodes: DeepEP computes the node from the rank."""

RANKS_ON_ONE_NODE = (2, 4, 8)
RANKS_ON_SEVERAL_NODES = (16, 32, 64, 128, 144, 160)
"""Those that have both a kernel and a default configuration in v1.2.1."""

HIDDEN_STEP = 256
MAX_ROW_BYTES = 16_352
MAX_TOP_K = 32
MAX_LOCAL_EXPERTS = 128


def unavailable(
    world_size: int,
    local_world_size: int,
    hidden_size: int = HIDDEN_STEP,
    bytes_per_value: int = 2,
    top_k: int = 1,
    local_experts: int = 1,
) -> str | None:
    """Why DeepEP can't run here, in one line; None if it can.

    world_size: ranks of an expert-parallel group. local_world_size: ranks on this node.
    bytes_per_value: of a token as it is dispatched, 1 in FP8 and 2 in BF16.

    Asks the driver about GPUs without making a context on any.
    """
    if (problem := no_machine(world_size)) is not None:
        return problem
    across_nodes = world_size > local_world_size
    if across_nodes and (local_world_size != NODE or world_size not in RANKS_ON_SEVERAL_NODES):
        return (
            f"{world_size} expert-parallel ranks over nodes of {local_world_size}: it needs nodes "
            f"of {NODE}, and {_either(RANKS_ON_SEVERAL_NODES)} ranks"
        )
    if not across_nodes and world_size not in RANKS_ON_ONE_NODE:
        return f"{world_size} expert-parallel ranks a node: it takes {_either(RANKS_ON_ONE_NODE)}"
    if (problem := no_groups(world_size, local_world_size)) is not None:
        return problem
    if (problem := _unfit(hidden_size, bytes_per_value, top_k)) is not None:
        return problem
    if local_experts > MAX_LOCAL_EXPERTS:
        return f"{local_experts} experts on a rank: it takes up to {MAX_LOCAL_EXPERTS}"
    if (problem := no_package("Buffer")) is not None:
        return problem
    if across_nodes:
        import deep_ep

        try:
            deep_ep.Buffer.get_dispatch_config(world_size).get_rdma_buffer_size_hint(1, world_size)
        except RuntimeError:
            return f"the package deep_ep was built without NVSHMEM, so for one node; {GUIDE}"
    return no_peers(local_world_size)


@dataclass(frozen=True)
class Handle:
    """The routing of one dispatch; combine and the backward pass reuse it."""

    layout: tuple[Any, ...]  # DeepEP's own handle
    rows_per_rank: Tensor  # int32 [ranks], on the GPU: rows that this rank sent to each


class DeepEPv1(CountsBytes):
    """Dispatch and combine over a process group whose ranks hold `num_experts` experts in order.

    One object, and so one buffer, serves all layers: calls are ordered by the current stream, and
    nothing stays in the buffer when a call has ended. The buffer does not come from PyTorch's
    allocator, so `memory/peak_allocated_gib` does not see it: `buffer_bytes`, some 150 MiB for 8
    ranks and a hidden size of 2048.

    Every call is a collective: all ranks make the same calls in the same order. All of them wait
    for the communication on the GPU, and the first `dispatch` of a batch on the host too, unless
    told not to: it has to learn how many rows arrive. The host waits with Python's global lock
    held.
    """

    name = "deep_ep_v1"
    expands = False

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        hidden_size: int,
        num_sms: int | None = None,
    ) -> None:
        """Allocates the buffer, with all ranks of the group: a problem shows before training.

        hidden_size: of the widest rows that will be sent. num_sms: multiprocessors that
        communication takes while it runs, an even number, by default half of the GPU's; half of
        them send and half receive. All its blocks run at the same time, as do those of an NCCL
        kernel, so too many leave two ranks waiting for each other, each in the kernel that the
        other cannot start. Raises ImportError without DeepEP; `unavailable` says more.
        """
        from deep_ep import Buffer

        if num_sms is None:
            num_sms = half_of_the_multiprocessors()
        ranks = group.size()
        super().__init__(ranks, group.rank(), "cuda")
        self.num_experts = num_experts
        # A class attribute of DeepEP's, from which configurations are made. These two belong
        # together: a handle is only good for as many SMs as it was made with.
        Buffer.set_num_sms(num_sms)
        self._dispatch_config = Buffer.get_dispatch_config(ranks)
        self._combine_config = Buffer.get_combine_config(ranks)
        row_bytes = hidden_size * torch.bfloat16.itemsize  # combine's, which are the largest
        nvlink_bytes, rdma_bytes = 0, 0
        for config in (self._dispatch_config, self._combine_config):
            nvlink_bytes = max(nvlink_bytes, config.get_nvl_buffer_size_hint(row_bytes, ranks))
            if ranks > NODE:  # a build for one node does not even answer
                rdma_bytes = max(rdma_bytes, config.get_rdma_buffer_size_hint(row_bytes, ranks))
        self.buffer_bytes = nvlink_bytes + rdma_bytes
        # After the last dispatch that did not wait, until one does.
        self._unwaited: torch.cuda.Event | None = None
        # Left to Python's garbage collector, its destructor can hang at exit.
        self._buffer: Any = Buffer(group, nvlink_bytes, rdma_bytes, explicitly_destroy=True)

    @property
    def why_it_waits(self) -> str | None:
        if self.ranks <= NODE:
            return None
        return "DeepEP between nodes has to know how many rows arrive"

    def dispatch(
        self, tensors: tuple[Tensor, ...], expert_ids: Tensor, weights: Tensor, wait: bool = True
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Handle]:
        """Send every token to the ranks of its experts.

        tensors: (x,), BF16 [T, H], or (data, scales), FP8 [T, H] and float32 [T, H / 128].
        expert_ids: int64 [T, top_k], global. weights: float32 [T, top_k]. wait: whether the host
        waits to know R; if not, and on one node, R is the most that can arrive, T for each rank,
        where every rank must have the same T. Empty rows have -1 as every expert.

        Returns the received rows of each tensor [R, n], ordered by sending rank and then by token;
        the experts here that each row is for, int64 [R, top_k], counted from 0 and -1 where the
        expert is elsewhere; their weights [R, top_k], 0 there; and the handle. Raises ValueError
        for rows, or a top_k, that the kernels don't take.
        """
        argument = _as_argument(tensors, expert_ids.shape[1])
        most = 0 if wait or self.why_it_waits else self.ranks * len(expert_ids)
        if most == 0:
            self._wait_for_unwaited()
        expert_ids = expert_ids.contiguous()
        per_rank, per_node, per_expert, wanted, _ = self._buffer.get_dispatch_layout(
            expert_ids, self.num_experts
        )
        received, ids, received_weights, _, layout, _ = self._buffer.dispatch(
            argument,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=wanted,
            topk_idx=expert_ids,
            topk_weights=weights.contiguous(),
            num_worst_tokens=most,
            config=self._dispatch_config,
        )
        if most > 0:
            self._unwaited = torch.cuda.current_stream().record_event(self._unwaited)
        handle = Handle(layout, per_rank)
        self._count(tensors, handle)
        return as_tuple(received), ids, received_weights, handle

    def dispatch_again(self, tensors: tuple[Tensor, ...], handle: Handle) -> tuple[Tensor, ...]:
        """Send other rows, such as gradients, to where the handle's tokens went.

        tensors: as `dispatch` takes them, in FP8 or BF16 whatever the first ones were. The host
        does not wait, as it knows the number of rows.
        """
        received, *_ = self._buffer.dispatch(
            _as_argument(tensors), handle=handle.layout, config=self._dispatch_config
        )
        self._count(tensors, handle)
        return as_tuple(received)

    def combine(
        self, x: Tensor, handle: Handle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Send rows back and sum the copies of each token: BF16 [R, H] to [T, H].

        weights: optional float32 [R, top_k], 0 where the expert is elsewhere, which are sent back
        the same way, each to the one place it came from: [T, top_k]. Raises TypeError unless x is
        BF16.
        """
        check_bf16(x)
        home, home_weights, _ = self._buffer.combine(
            x.contiguous(),
            handle.layout,
            topk_weights=None if weights is None else weights.contiguous(),
            config=self._combine_config,
        )
        return home, home_weights

    def close(self) -> None:
        """Release the buffer, with all ranks of the group. Afterwards nothing else may be called.

        Not after an error on one rank: the others might never call it.
        """
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None

    def _wait_for_unwaited(self) -> None:
        """Let every dispatch that did not wait run, before one does.

        The host learns the number of rows from one place in its memory, which every first dispatch
        writes, also one that nobody waits for. One that is still queued, as those of a step with
        `moe.recompute` are that is about to be repeated, would answer in place of the new one.
        """
        if self._unwaited is not None:
            self._unwaited.synchronize()
            self._unwaited = None

    def _count(self, tensors: tuple[Tensor, ...], handle: Handle) -> None:
        self.count(sum(t.shape[1] * t.element_size() for t in tensors), handle.rows_per_rank)


def _as_argument(tensors: tuple[Tensor, ...], top_k: int = 1) -> Tensor | tuple[Tensor, Tensor]:
    """As `as_argument`; raises ValueError also for what v1's kernels don't take."""
    argument = as_argument(tensors)
    data = tensors[0]
    if (problem := _unfit(data.shape[1], data.element_size(), top_k)) is not None:
        raise ValueError(f"DeepEP can't send this: {problem}")
    return argument


def _unfit(hidden_size: int, bytes_per_value: int, top_k: int) -> str | None:
    """What its kernels can't handle about these tokens."""
    if hidden_size % HIDDEN_STEP:
        return f"hidden size {hidden_size}: it takes multiples of {HIDDEN_STEP}"
    if (row := hidden_size * bytes_per_value) > MAX_ROW_BYTES:
        return f"rows of {row} bytes (hidden size {hidden_size}): it takes up to {MAX_ROW_BYTES}"
    if top_k > MAX_TOP_K:
        return f"top_k {top_k}: it takes up to {MAX_TOP_K}"
    return None


def _either(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
