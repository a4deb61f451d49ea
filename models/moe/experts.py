"""The experts of this rank: their weights, and the SwiGLU MLP between dispatch and combine."""

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.moe.counts import Counts
from models.moe.dispatch import Dispatcher
from models.moe.dispatch.trip import Trip


@dataclass(frozen=True)
class Runtime:
    """What was settled when the model was built: the path, and who carries it out."""

    path: ModuleType  # one of models/moe/paths
    ops: Any  # the operations, from models/fp8/operations.py
    dispatcher: Dispatcher
    description: str = ""  # of both, for the user
    capacity: float | None = None  # see `MoEConfig.capacity`; None where it does not apply
    recompute: bool = False  # see `MoEConfig.recompute`
    counts: Counts = field(default_factory=Counts)

    @property
    def linear(self) -> Any:
        """The class that computes the experts' GEMMs."""
        return getattr(self.ops, self.path.LINEAR)

    def max_rows(self, tokens: int, top_k: int, local_experts: int) -> int | None:
        """P where room is set aside: the even share of `tokens` on every rank times `capacity`, and
        what rounding up each expert's rows may take. None where P is what arrives."""
        if self.capacity is None:
            return None
        step = self.path.ROW_ALIGNMENT
        return (math.ceil(tokens * top_k * self.capacity / step) + local_experts) * step


class Experts(nn.Module):
    """E local experts. A module of its own so that FSDP gathers exactly these weights around it."""

    def __init__(self, local_experts: int, config: Any, pg_collection: Any = None) -> None:
        """As megatron-core's MoELayer calls it; `config` is a `models.gpt.GPTConfig`."""
        super().__init__()
        self.runtime: Runtime = config.moe_runtime
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        device = "cpu" if config.use_cpu_initialization else "cuda"
        # The gate's rows first, then those of the up-projection: one GEMM makes both.
        self.up = nn.Parameter(torch.empty(local_experts, 2 * ffn, hidden, device=device))
        self.down = nn.Parameter(torch.empty(local_experts, hidden, ffn, device=device))
        self._prepared: tuple[Any, Any] | None = None

    def forward(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Tokens [T, H], their experts int64 [T, top_k], weights float32 [T, top_k] to [T, H].

        Parameters may be in the tokens' dtype, as FSDP gathers them, or in float32.
        """
        up, down = _local(self.up), _local(self.down)
        prepared = self._prepared
        if prepared is None:
            prepared = prepare_weights(up, down, tokens.dtype, self.runtime)
            # Not what shares memory with a parameter: FSDP frees and refills that.
            if prepared[0][0] is not up:
                self._prepared = prepared
        return ExpertMLP.apply(tokens, weights, up, down, expert_ids, self.runtime, prepared)

    def forget_prepared(self) -> None:
        """The parameters have changed: quantize them anew when they are needed next."""
        self._prepared = None

    def keep_prepared(self, up: Any, down: Any) -> None:
        """The parameters have changed, and whoever changed them has prepared them too."""
        self._prepared = (up, down)


def prepare_weights(up: Tensor, down: Tensor, dtype: torch.dtype, runtime: Runtime) -> Any:
    """Both weights as the path's GEMMs want them, each for the forward and the backward pass."""
    with torch.no_grad():
        return tuple(runtime.linear.prepare_weights(w, dtype, runtime.ops) for w in (up, down))


class ExpertMLP(torch.autograd.Function):
    """Router's choice in, combined output back: everything between is this function's own.

    Autograd must not see the inside: a differentiable float8 tensor would make the engine cast its
    gradient to float8 too. It also lets a path choose what is kept for the backward pass.

    `up` and `down` are here for their gradients; what is computed with is `prepared`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        expert_ids: Tensor,
        runtime: Runtime,
        prepared: Any,
    ) -> Tensor:
        local_experts = len(up)
        y, kept = _compute(tokens, weights, expert_ids, local_experts, runtime, prepared)
        trip = kept[0]
        counts = runtime.counts
        if runtime.capacity is not None:
            counts.dropped_rows = counts.dropped_rows + trip.dropped_rows()
        ctx.runtime, ctx.prepared = runtime, prepared
        ctx.local_experts, ctx.dtype = local_experts, up.dtype
        ctx.kept = None if runtime.recompute else kept
        if runtime.recompute:
            ctx.save_for_backward(tokens, weights, expert_ids)
        if any(ctx.needs_input_grad):
            counts.kept_passes += 1
            tensors = (tokens, weights, expert_ids) if runtime.recompute else kept[1:]
            counts.kept_bytes += sum(t.nbytes for t in tensors if t is not None)
        return trip.bring_home(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        runtime = ctx.runtime
        path, ops, linear = runtime.path, runtime.ops, runtime.linear
        (_, up), (_, down) = ctx.prepared
        # Taken off ctx, so that memory is free after this layer and not after the whole backward.
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            inputs: tuple[Tensor, Tensor, Tensor] = ctx.saved_tensors
            _, kept = _compute(*inputs, ctx.local_experts, runtime, ctx.prepared)
        trip, h, x_kept, a_kept = kept
        del kept
        trip.phase = "backward"
        offsets = trip.rows.offsets

        da, dy_kept = path.to_experts(grad, down, trip, ops)
        dh, a_kept, dprobs = linear.down_backward(da, h, trip.probs, a_kept, ops)
        dx, dh_kept = linear.backward(dh, up, offsets, ops)
        d_tokens, d_weights = trip.bring_home_with(dx, dprobs)
        d_down = linear.wgrad(dy_kept, a_kept, offsets, ctx.dtype, ops)
        d_up = linear.wgrad(dh_kept, x_kept, offsets, ctx.dtype, ops)
        runtime.counts.backward_passes += 1
        return d_tokens, d_weights, d_up, d_down, None, None, None


def _compute(
    tokens: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    local_experts: int,
    runtime: Runtime,
    prepared: Any,
) -> tuple[Tensor, tuple[Trip, Tensor, Any, Any]]:
    """Forward but for the way home: rows [P, H], and what the backward pass needs, the trip first.

    The backward pass calls it too where activations are computed again.
    """
    path, ops = runtime.path, runtime.ops
    (up, _), (down, _) = prepared
    max_rows = runtime.max_rows(len(tokens), expert_ids.shape[1], local_experts)
    trip = Trip(
        runtime.dispatcher, ops, expert_ids, weights, local_experts, path.ROW_ALIGNMENT, max_rows
    )
    h, x_kept = path.to_experts(tokens, up, trip, ops)
    y, a_kept = runtime.linear.down(h, trip.probs, down, trip.rows.offsets, ops)
    runtime.counts.forward_passes += 1
    return y, (trip, h, x_kept, a_kept)


def _local(parameter: Tensor) -> Tensor:
    """This rank's experts of a parameter that is spread over the expert-parallel ranks."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
