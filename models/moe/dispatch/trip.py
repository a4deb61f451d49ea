"""One trip of a batch of tokens to their experts and back, and of their gradients.

The first `dispatch`, or `expand`, asks the dispatcher who goes where and plans the experts' rows;
everything after it, in the backward pass too, follows the same routing.
"""

from typing import Any

from torch import Tensor

from models.fp8.operations import Operations
from models.fp8.reference.plan_rows import RowMap
from models.fp8.tensor import BlockScaledTensor, Layout, relayout
from models.moe.counts import Counts, Phase
from models.moe.dispatch import Dispatcher, Rows, can_expand


class Trip:
    """The trip of T tokens, top_k experts each, for one layer and micro-batch.

    After the first `dispatch` or `expand`: `rows`, where each received row goes among the experts'
    P rows, and `probs` float32 [P], the routing weight of each of them (0 in padding).
    """

    rows: RowMap
    probs: Tensor

    def __init__(
        self,
        dispatcher: Dispatcher,
        ops: Operations,
        counts: Counts,
        expert_ids: Tensor,
        weights: Tensor,
        local_experts: int,
        row_alignment: int,
        max_rows: int | None = None,
    ) -> None:
        """max_rows: if given, the host does not wait to know P: it is `max_rows`, a multiple of the
        alignment, and copies beyond it are dropped. Otherwise P is rounded up to the operations'
        `rows_step`."""
        self.dispatcher = dispatcher
        self.ops = ops
        self.counts = counts
        self.phase: Phase = "forward"
        self._request = (expert_ids, weights)
        self._local_experts = local_experts
        self._row_alignment = row_alignment
        self._max_rows = max_rows
        self._planned = self._expanded = False
        self._handle: Any = None  # the dispatcher's own

    def dispatch(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Send [T, n] tensors row by row to the experts' ranks; what arrived, [R, n] each."""
        if self._planned:
            return self.dispatcher.dispatch_again(tensors, self._handle)
        tensors, ids, weights, self._handle = self.dispatcher.dispatch(
            tensors, *self._request, wait=self._max_rows is None
        )
        self._planned = True
        self.rows = self.ops.plan_rows(
            ids, self._local_experts, self._row_alignment, self._max_rows, self.ops.rows_step()
        )
        self.probs = self.ops.permute_probs(weights, self.rows)
        return tensors

    def expand(self, x: Rows, layout: Layout = Layout.COMPACT) -> Rows:
        """Send [T, K] rows to their experts' rows, [P, K]: dispatch and permute.

        Rows in FP8 have COMPACT scales here and arrive with scales in `layout`. Zeros in rows that
        round up an expert's. In one call where the dispatcher can; by `dispatch` and an operation,
        to the same rows, where it can't. A trip stays with the one that it starts with.
        """
        dispatcher = self.dispatcher
        if not can_expand(dispatcher):
            return self._dispatch_and_permute(x, layout)
        if self._planned:
            return dispatcher.expand_again(x, layout, self._handle)
        x, self.probs, self.rows, self._handle = dispatcher.expand(
            x, layout, *self._request, self._row_alignment, self._max_rows
        )
        self._planned = self._expanded = True
        return x

    def _dispatch_and_permute(self, x: Rows, layout: Layout) -> Rows:
        if not isinstance(x, BlockScaledTensor):
            (received,) = self.dispatch(x)
            return self.ops.permute(received, self.rows)
        data, scale_inv = self.dispatch(x.data, x.scale_inv)
        arrived = BlockScaledTensor(data, scale_inv, Layout.COMPACT)
        return self.ops.permute_scaled(arrived, self.rows, layout)

    def relayout(self, x: BlockScaledTensor, layout: Layout) -> BlockScaledTensor:
        """The same tensor with its scales in the other layout, counted for the pass it is in.

        Raises ValueError if they are in that layout already; see `models.fp8.tensor.relayout`.
        """
        x = relayout(x, layout)
        self.counts.relayouts[self.phase] += 1
        return x

    def dropped_rows(self) -> Tensor:
        """Copies dropped beyond `max_rows`, int64 []; on the device, so nothing waits."""
        room = self.rows.offsets.diff()
        return (self.rows.counts - room).clamp(min=0).sum()

    def combine(self, y: Tensor) -> Tensor:
        """Sum the experts' outputs for each token: their rows [P, n] to tokens [T, n]."""
        received = y if self._expanded else self.ops.unpermute(y, self.rows)
        return self.dispatcher.combine(received, self._handle)[0]

    def combine_with_probs(self, y: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """The same, together with one number a row: [P, n], [P] to [T, n], [T, top_k]."""
        if not self._expanded:
            y = self.ops.unpermute(y, self.rows)
            probs = self.ops.unpermute_probs(probs, self.rows)
        home, home_weights = self.dispatcher.combine(y, self._handle, probs)
        assert home_weights is not None
        return home, home_weights
