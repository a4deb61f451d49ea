"""Token dispatch over `all_to_all_single`: gloo or NCCL, any number of ranks.

A token is sent once to each rank that holds any of its experts; that rank makes the copies
(`permute`). DeepEP does the same, so the two are exchangeable.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Handle:
    """The routing of one dispatch; combine and the backward pass reuse it.

    T tokens live here, S copies of them are sent, R copies of others' tokens are received.
    """

    sent_tokens: Tensor  # int64 [S], the token behind each sent row; rows grouped by target rank
    slots: Tensor  # int64 [T, ranks], the sent row of token t for rank w, or S where there is none
    send_counts: list[int]  # rows for each rank
    recv_counts: list[int]  # rows from each rank
    expert_slots: Tensor  # bool [S, top_k], which of the token's experts the target rank holds


class AllToAll:
    """Dispatch and combine over a process group whose ranks hold `num_experts` experts in order."""

    name = "all_to_all"
    expands = False

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.ranks = group.size()
        self.local_experts = num_experts // self.ranks
        self.bytes_sent = 0  # data and scales sent to other ranks since the last reset

    @property
    def why_it_waits(self) -> str | None:
        if self.ranks == 1:
            return None
        return "all_to_all has to know how many rows each rank gets"

    def mark(self) -> int:
        return self.bytes_sent

    def rewind(self, mark: int) -> None:
        self.bytes_sent = mark

    def dispatch(
        self, tensors: tuple[Tensor, ...], expert_ids: Tensor, weights: Tensor, wait: bool = True
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Handle | None]:
        """Send every token to the ranks of its experts.

        tensors: any number of [T, n] tensors of any dtype, one row a token (data, and its scales).
        expert_ids: int64 [T, top_k], global. weights: float32 [T, top_k]. wait: ignored, as the
        collective has to know how many rows arrive; DeepEP does not.

        Returns the received rows of each tensor [R, n], ordered by sending rank and then by token;
        the experts here that each row is for, int64 [R, top_k], counted from 0 and -1 where the
        expert is elsewhere; their weights [R, top_k]; and the handle, None where one rank is alone.
        """
        if self.ranks == 1:  # everybody is here already
            return tensors, expert_ids, weights, None
        targets = expert_ids // self.local_experts
        ranks = torch.arange(self.ranks, device=expert_ids.device)
        wanted = (targets.unsqueeze(-1) == ranks).any(1)  # [T, ranks]
        target, token = wanted.T.nonzero(as_tuple=True)
        slots = torch.full_like(wanted, len(token), dtype=torch.int64)
        slots[token, target] = torch.arange(len(token), device=token.device)

        send_counts = wanted.sum(0)
        recv_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(recv_counts, send_counts, group=self.group)
        # The collective wants its split sizes on the host: with a GPU this waits for the router.
        handle = Handle(
            sent_tokens=token,
            slots=slots,
            send_counts=send_counts.tolist(),
            recv_counts=recv_counts.tolist(),
            expert_slots=targets[token] == target.unsqueeze(-1),
        )
        local_ids = expert_ids[token] - target.unsqueeze(-1) * self.local_experts
        local_ids = torch.where(handle.expert_slots, local_ids, -1)
        received = tuple(self._send(t[token], handle) for t in tensors)
        self._count(tensors, handle)
        return (
            received,
            self._send(local_ids, handle),
            self._send(weights[token], handle),
            handle,
        )

    def dispatch_again(
        self, tensors: tuple[Tensor, ...], handle: Handle | None
    ) -> tuple[Tensor, ...]:
        """Send other [T, n] tensors, such as gradients, the way the handle's tokens went."""
        if handle is None:
            return tensors
        self._count(tensors, handle)
        return tuple(self._send(t[handle.sent_tokens], handle) for t in tensors)

    def combine(
        self, x: Tensor, handle: Handle | None, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Send rows back and sum the copies of each token: [R, n] to [T, n].

        The sum runs in float32 in the order of the ranks, so it is the same every time, and is
        rounded once to x's dtype. weights: optional [R, top_k], which are sent back the same way,
        each to the one place it came from: [T, top_k].
        """
        if handle is None:
            return x, weights
        returned = self._send(x, handle, home=True)
        # One more row, of zeros, for the slots of ranks that a token was not sent to.
        returned = torch.cat([returned, returned.new_zeros(1, returned.shape[1])])
        total = torch.zeros(len(handle.slots), x.shape[1], dtype=torch.float32, device=x.device)
        for rank in range(self.ranks):
            total += returned[handle.slots[:, rank]]
        if weights is None:
            return total.to(x.dtype), None
        home = self._send(weights, handle, home=True).masked_fill(~handle.expert_slots, 0)
        home = torch.cat([home, home.new_zeros(1, home.shape[1])])
        return total.to(x.dtype), home[handle.slots].sum(1)

    def close(self) -> None:
        """Nothing to release; DeepEP has buffers."""

    def _send(self, rows: Tensor, handle: Handle, home: bool = False) -> Tensor:
        inputs, outputs = handle.send_counts, handle.recv_counts
        if home:
            inputs, outputs = outputs, inputs
        rows = rows.contiguous()
        # As bytes: not every backend knows float8 or bfloat16, and no value is touched on the way.
        sent = rows.view(torch.uint8)
        received = sent.new_empty(sum(outputs), *sent.shape[1:])
        dist.all_to_all_single(received, sent, outputs, inputs, group=self.group)
        return received.view(rows.dtype)

    def _count(self, tensors: tuple[Tensor, ...], handle: Handle) -> None:
        away = sum(handle.send_counts) - handle.send_counts[self.group.rank()]
        self.bytes_sent += away * sum(t.shape[1] * t.element_size() for t in tensors)
