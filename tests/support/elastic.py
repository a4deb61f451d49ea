"""A package `deep_ep` for a CPU: what v2's kernels do with a handle, in plain PyTorch.

Written from what version 2.1.0 does, and stricter: memory that nothing was written to is full of
NaN, and a place that is used twice, or a handle that does not fit the tokens that came, is an
error. A first dispatch, without a handle, takes places from the last token to the first, since no
order is guaranteed. Slow, and only for tests.
"""

import sys
import types
from collections.abc import Iterator
from dataclasses import make_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.moe.dispatch.deep_ep_v2_handle import FIELDS, VERSION

EPHandle = make_dataclass("EPHandle", sorted(FIELDS))


def install() -> types.ModuleType:
    """Make it what `import deep_ep` finds in this process."""
    module = types.ModuleType("deep_ep")
    vars(module).update(
        ElasticBuffer=ElasticBuffer, EPHandle=EPHandle, Buffer=object, __version__=VERSION
    )
    sys.modules["deep_ep"] = module
    return module


class ElasticBuffer:
    made = 0
    """Buffers so far."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int,
        use_fp8_dispatch: bool,
        allow_hybrid_mode: bool,
        explicitly_destroy: bool,
    ) -> None:
        ElasticBuffer.made += 1
        self.group, self.ranks, self.rank = group, group.size(), group.rank()
        self.tokens = num_max_tokens_per_rank
        self.num_bytes = self.ranks * self.tokens * hidden * 2
        self.hybrid = allow_hybrid_mode
        assert explicitly_destroy
        assert not use_fp8_dispatch
        assert hidden % 256 == 0
        assert num_topk <= 32

    def destroy(self) -> None:
        dist.barrier(self.group)

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        handle: Any = None,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, Any, None]:
        assert num_sms > 0
        assert num_sms % 2 == 0
        data, scales = x if isinstance(x, tuple) else (x, None)
        assert data.is_contiguous()
        assert data.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        if handle is None:
            assert do_cpu_sync
            handle = self._first(topk_idx, num_experts, do_expand, expert_alignment or 1, num_sms)
        else:
            assert topk_idx is None
            assert not do_cpu_sync
            if self.hybrid:
                assert handle.token_metadata_at_forward, "between nodes a handle holds more"
        assert do_expand == handle.do_expand
        assert len(data) == len(handle.topk_idx) <= handle.num_max_tokens_per_rank <= self.tokens
        everyones: list[Any] = [None] * self.ranks
        mine = (data.view(torch.uint8), scales, handle.topk_idx, topk_weights)
        dist.all_gather_object(everyones, (*mine, handle.dst_buffer_slot_idx), self.group)
        tokens = handle.num_max_tokens_per_rank
        local = handle.num_experts // self.ranks
        buffer: dict[tuple[int, int], int] = {}
        for sender, (*_, ids, _, slots) in enumerate(everyones):
            for token, place in (slots >= 0).nonzero().tolist():
                if int(ids[token, place]) // local == self.rank:
                    slot = int(slots[token, place]) - sender * tokens
                    assert (sender, slot) not in buffer, "a place in the buffer is used twice"
                    buffer[sender, slot] = token

        size = handle.num_expanded_tokens if do_expand else handle.num_recv_tokens
        top_k = handle.topk_idx.shape[1]
        out = torch.full((size, mine[0].shape[1]), 0xFF, dtype=torch.uint8)
        blocks = 0 if scales is None else scales.shape[1]
        shape = (blocks, -(-size // 4) * 4) if use_tma_aligned_col_major_sf else (size, blocks)
        stored = torch.full(shape, torch.nan)
        out_scales = stored.t()[:size] if use_tma_aligned_col_major_sf else stored
        out_weights = torch.full((size,) if do_expand else (size, top_k), torch.nan)
        out_ids = torch.full((size, top_k), 2**40)
        copied = set()
        for row, sender, at in self._arrived(handle):
            token = buffer.pop((sender, at))
            its: list[Any] = [None if t is None else t[token] for t in everyones[sender]]
            its_data, its_scales, ids, weights, _ = its
            source = handle.recv_src_metadata[row].tolist()
            assert source[0] == sender * tokens + token
            here = (ids // local == self.rank) & (ids >= 0)
            assert source[1] == sender * top_k + int(here.nonzero()[-1])
            if do_expand:
                places = [(place, to) for place, to in enumerate(source[2:]) if to >= 0]
                assert all(here[place] for place, _ in places)
            else:
                places = [(-1, row)]
                out_ids[row] = torch.where(here, ids - self.rank * local, -1)
            for place, to in places:
                assert to < size
                assert to not in copied, "a row is written twice"
                copied.add(to)
                out[to] = its_data
                if its_scales is not None:
                    out_scales[to] = its_scales
                if weights is not None:
                    out_weights[to] = weights[place] if do_expand else weights
        assert not buffer, "something came that the handle knows nothing of"
        if do_zero_padding:
            for to in self._padding(handle):
                assert to < size
                assert to not in copied, "a row is cleared that has a token"
                out[to], out_scales[to], out_weights[to] = 0, 0, 0
        received: Any = out.view(data.dtype)
        if scales is not None:
            received = (received, out_scales)
        return (
            received,
            None if do_expand else out_ids,
            None if topk_weights is None else out_weights,
            handle,
            None,
        )

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, num_sms: int = 0
    ) -> tuple[Tensor, Tensor | None, None]:
        assert x.dtype is torch.bfloat16
        assert x.is_contiguous()
        assert num_sms > 0
        tokens, top_k = handle.num_max_tokens_per_rank, handle.topk_idx.shape[1]
        assert handle.do_expand or len(x) == len(handle.recv_src_metadata)
        local = handle.num_experts // self.ranks
        # What goes back, and where each sender's token is among it: a tensor each, since a message
        # of many small ones takes long.
        totals = torch.zeros(len(handle.recv_src_metadata), x.shape[1], dtype=torch.bfloat16)
        kept, index = torch.zeros(len(totals), top_k), {}
        for row, sender, _ in self._arrived(handle):
            number, _, *copies = handle.recv_src_metadata[row].tolist()
            rows = [row] if not handle.do_expand else [c for c in copies if c >= 0]
            total = torch.zeros(x.shape[1])
            for copy in rows:
                total += x[copy].float()
            weights = torch.zeros(top_k)
            if topk_weights is not None and handle.do_expand:
                for place, copy in enumerate(copies):
                    weights[place] = topk_weights[copy] if copy >= 0 else 0
            elif topk_weights is not None:
                weights = topk_weights[row]
            totals[row], kept[row] = total.bfloat16(), weights
            index[sender, number % tokens] = row
        everyones: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyones, (totals, kept, index), self.group)
        home = torch.zeros(len(handle.topk_idx), x.shape[1], dtype=torch.bfloat16)
        home_weights = torch.zeros(len(home), top_k)
        for token, ids in enumerate(handle.topk_idx.tolist()):
            last = {e // local: place for place, e in enumerate(ids)}
            total = torch.zeros(x.shape[1])
            for rank in sorted(last, key=lambda r: last[r]):
                its_totals, _, its_index = everyones[rank]
                total += its_totals[its_index[self.rank, token]].float()
            home[token] = total.bfloat16()
            for place, e in enumerate(ids):
                _, its_kept, its_index = everyones[e // local]
                home_weights[token, place] = its_kept[its_index[self.rank, token]][place]
        return home, None if topk_weights is None else home_weights, None

    def _arrived(self, handle: Any) -> Iterator[tuple[int, int, int]]:
        """For each row that came: its number, its sender, and its place in the sender's buffer."""
        start = 0
        for sender, end in enumerate(handle.psum_num_recv_tokens_per_scaleup_rank.tolist()):
            for row in range(start, end):
                yield row, sender, row - start
            start = end

    def _padding(self, handle: Any) -> Iterator[int]:
        start = 0
        for count in handle.num_unaligned_recv_tokens_per_expert.tolist():
            end = start + -(-count // handle.expert_alignment) * handle.expert_alignment
            yield from range(start + count, end)
            start = end

    def _first(self, ids: Any, num_experts: Any, expand: bool, alignment: int, sms: int) -> Any:
        """The handle of a first dispatch."""
        everyones: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyones, ids, self.group)
        local, top_k = num_experts // self.ranks, ids.shape[1]
        slots = torch.full(ids.shape, -1, dtype=torch.int32)
        sources, ends, of_expert = [], [], [0] * local
        for sender, theirs in enumerate(everyones):
            given = [0] * self.ranks
            for token in reversed(range(len(theirs))):
                ranks = [e // local for e in theirs[token].tolist()]
                for to in set(ranks):
                    place = max(p for p, rank in enumerate(ranks) if rank == to)
                    if sender == self.rank:
                        slots[token, place] = sender * self.tokens + given[to]
                    given[to] += 1
                    if to == self.rank:
                        row = [-1] * (2 + top_k)
                        row[:2] = sender * self.tokens + token, sender * top_k + place
                        for p, e in enumerate(theirs[token].tolist()):
                            if e // local == to:
                                row[2 + p] = of_expert[e % local]
                                of_expert[e % local] += 1
                        sources.append((row, theirs[token].tolist()))
            ends.append(len(sources))
        starts, total = [], 0
        for count in of_expert:
            starts.append(total)
            total += -(-count // alignment) * alignment
        for row, experts in sources:
            for p, e in enumerate(experts):
                if e // local == self.rank:
                    row[2 + p] += starts[e % local]
        ints = torch.int32
        return EPHandle(  # type: ignore[call-arg]
            do_expand=expand,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=self.tokens,
            num_sms=sms,
            topk_idx=ids,
            num_recv_tokens=len(sources),
            num_expanded_tokens=total,
            num_recv_tokens_per_expert_list=[],
            psum_num_recv_tokens_per_scaleup_rank=torch.tensor(ends, dtype=ints),
            psum_num_recv_tokens_per_expert=torch.tensor(of_expert, dtype=ints),
            num_unaligned_recv_tokens_per_expert=torch.tensor(of_expert, dtype=ints),
            recv_src_metadata=torch.tensor([r for r, _ in sources], dtype=ints).view(-1, 2 + top_k),
            dst_buffer_slot_idx=slots,
            token_metadata_at_forward="something" if self.hybrid else None,
            channel_linked_list=None,
        )
