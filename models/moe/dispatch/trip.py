"""One trip of a batch of tokens to their experts and home again, and of gradients after them.

The first `send` asks the dispatcher who goes where and plans the experts' rows; whatever follows,
in the backward pass too, travels the same way.
"""

from typing import Any, Literal

from torch import Tensor

from models.fp8.reference.plan_rows import RowMap
from models.moe.dispatch import Dispatcher

Phase = Literal["forward", "backward"]


class Trip:
    """The way of T tokens, top_k experts each, for one layer and micro-batch.

    After the first `send`: `rows`, where each received row goes among the experts' P rows, and
    `probs` float32 [P], the routing weight of each of them (0 in padding).
    """

    rows: RowMap
    probs: Tensor

    def __init__(
        self,
        dispatcher: Dispatcher,
        ops: Any,
        expert_ids: Tensor,
        weights: Tensor,
        local_experts: int,
        row_alignment: int,
        max_rows: int | None = None,
    ) -> None:
        """With `max_rows` the host does not wait to know P: it is `max_rows`, a multiple of the
        alignment, and copies beyond it are dropped."""
        self.dispatcher = dispatcher
        self.ops = ops
        self.phase: Phase = "forward"
        self._request = (expert_ids, weights)
        self._local_experts = local_experts
        self._row_alignment = row_alignment
        self._max_rows = max_rows
        self._planned = False
        self._handle: Any = None

    def send(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Dispatch [T, n] tensors row by row; what arrived, [R, n] each."""
        if self._planned:
            return self.dispatcher.dispatch_again(tensors, self._handle)
        bounded = {} if self._max_rows is None else {"max_rows": self._max_rows}
        tensors, ids, weights, self._handle = self.dispatcher.dispatch(
            tensors, *self._request, wait=not bounded
        )
        self._planned = True
        self.rows = self.ops.plan_rows(ids, self._local_experts, self._row_alignment, **bounded)
        self.probs = self.ops.permute_probs(weights, self.rows)
        return tensors

    def dropped_rows(self) -> Tensor:
        """Copies that found no room among `max_rows`, int64 []; on the device, so nothing waits."""
        room = self.rows.offsets.diff()
        return (self.rows.counts - room).clamp(min=0).sum()

    def bring_home(self, y: Tensor) -> Tensor:
        """Add up what the experts made of each token: their rows [P, n] to tokens [T, n]."""
        return self.dispatcher.combine(self.ops.unpermute(y, self.rows), self._handle)[0]

    def bring_home_with(self, y: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """The same, together with one number a row: [P, n], [P] to [T, n], [T, top_k]."""
        received = self.ops.unpermute(y, self.rows)
        weights = self.ops.unpermute_probs(probs, self.rows)
        home, home_weights = self.dispatcher.combine(received, self._handle, weights)
        assert home_weights is not None
        return home, home_weights
