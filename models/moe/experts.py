"""The experts of this rank: their weights, and the SwiGLU MLP between dispatch and combine."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor

from models.fp8.linear import HasBytes
from models.moe.dispatch.trip import Trip
from models.moe.room_memory import RowBytes, row_bytes
from models.moe.runtime import GPTConfig, Runtime

Prepared = tuple[Any, Any]
"""A weight prepared for the runtime's linear layer, for the forward and for the backward pass."""


class Experts(nn.Module):
    """E local experts. A module of its own so that FSDP gathers exactly these weights around it."""

    def __init__(
        self,
        local_experts: int,
        config: GPTConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **unused,
    ) -> None:
        """Called by megatron-core's MoELayer."""
        super().__init__()
        self.runtime = config.moe_runtime
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        device = "cpu" if config.use_cpu_initialization else "cuda"
        # The gate's rows first, then those of the up-projection: one GEMM makes both.
        self.up = nn.Parameter(torch.empty(local_experts, 2 * ffn, hidden, device=device))
        self.down = nn.Parameter(torch.empty(local_experts, hidden, ffn, device=device))
        self.layer = 0
        """Its number in the model, counted from 0."""
        self._prepared: tuple[Prepared, Prepared] | None = None

    def forward(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Tokens [T, H], their experts int64 [T, top_k], weights float32 [T, top_k] to [T, H].

        Parameters may be in the tokens' dtype, as FSDP gathers them, or in float32.
        """
        # What is only looked at is never dropped: nothing is done again there.
        runtime = self.runtime if self.training else self.runtime.waiting()
        prepared = self._prepared
        if prepared is None:
            up, down = _local(self.up), _local(self.down)
            prepared = prepare_weights(up, down, tokens.dtype, runtime)
            # Not what shares memory with a parameter: FSDP frees and refills that.
            if prepared[0][0] is not up:
                self._prepared = prepared
        return ExpertMLP.apply(
            tokens, weights, self.up, self.down, expert_ids, self.layer, runtime, prepared
        )

    def forget_prepared(self) -> None:
        """The parameters have changed: quantize them again when they are needed next."""
        self._prepared = None

    def keep_prepared(self, up: Prepared, down: Prepared) -> None:
        """The parameters have changed, and the optimizer has prepared them too."""
        self._prepared = (up, down)


def prepare_weights(
    up: Tensor, down: Tensor, dtype: torch.dtype, runtime: Runtime
) -> tuple[Prepared, Prepared]:
    """Both weights prepared for the path's GEMMs, each for the forward and the backward pass."""
    with torch.no_grad():
        prepare = runtime.linear.prepare_weights
        return prepare(up, dtype), prepare(down, dtype)


class Saved(NamedTuple):
    """What the backward pass needs of a forward pass."""

    trip: Trip
    h: Tensor
    """What the up-projection made, [P, 2F]."""
    x: HasBytes
    """For the up-projection's wgrad."""
    a: HasBytes | None
    """For the down-projection's wgrad, unless backward computes it again."""

    @property
    def nbytes(self) -> int:
        """Bytes of activations."""
        return sum(t.nbytes for t in (self.h, self.x, self.a) if t is not None)

    def row_bytes(self, tokens: Tensor, runtime: Runtime) -> RowBytes:
        """What each of the P rows takes, in a layer of these tokens [T, H]."""
        rows, ffn = len(self.h), self.h.shape[1] // 2
        hidden, value = tokens.shape[1], tokens.element_size()
        return row_bytes(rows, self.nbytes, hidden, ffn, value, runtime.recompute)


class _Context(FunctionCtx):
    """What ExpertMLP's forward pass leaves for its backward pass."""

    runtime: Runtime
    prepared: tuple[Prepared, Prepared]
    layer: int
    local_experts: int
    dtype: torch.dtype  # of the weights' gradients
    as_parameter: Callable[[Tensor], Tensor]  # a weight's gradient, spread as the weight is
    saved: Saved | None  # None where it is computed again, from `saved_tensors`
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]


class ExpertMLP(torch.autograd.Function):
    """Router's choice in, combined output back: everything between is this function's own.

    Autograd must not see the inside: a differentiable float8 tensor would make the engine cast its
    gradient to float8 too. It also lets a path choose what is kept for the backward pass.

    `up` and `down` are here for their gradients; what is computed with is `prepared`. They are the
    parameters themselves, whose `grad_dtype` counts: between, the engine would cast a gradient.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        tokens: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        expert_ids: Tensor,
        layer: int,
        runtime: Runtime,
        prepared: tuple[Prepared, Prepared],
    ) -> Tensor:
        local_experts = len(_local(up))
        y, saved = _compute(tokens, weights, expert_ids, layer, local_experts, runtime, prepared)
        counts = runtime.counts
        if runtime.capacity is not None:
            counts.dropped_rows = counts.dropped_rows + saved.trip.dropped_rows()
        if runtime.room is not None:
            rows = saved.trip.rows
            runtime.room.note(layer, rows.needed)
            runtime.room.note_memory(layer, rows.num_rows, saved.row_bytes(tokens, runtime))
        ctx.runtime, ctx.prepared = runtime, prepared
        ctx.layer, ctx.local_experts, ctx.as_parameter = layer, local_experts, _spread_as(up)
        ctx.dtype = (up.grad_dtype if up.is_leaf else None) or up.dtype
        ctx.saved = None if runtime.recompute else saved
        inputs = (tokens, weights, expert_ids)
        if runtime.recompute:
            ctx.save_for_backward(*inputs)
        if any(ctx.needs_input_grad):
            counts.kept_passes += 1
            kept = sum(t.nbytes for t in inputs) if runtime.recompute else saved.nbytes
            counts.kept_bytes += kept
        return saved.trip.combine(y)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        runtime = ctx.runtime
        path, ops, linear = runtime.path, runtime.ops, runtime.linear
        (_, up), (_, down) = ctx.prepared
        # Taken off ctx, so that memory is free after this layer and not after the whole backward.
        saved, ctx.saved = ctx.saved, None
        if saved is None:
            _, saved = _compute(
                *ctx.saved_tensors, ctx.layer, ctx.local_experts, runtime, ctx.prepared
            )
        trip, h, x_kept, a_kept = saved
        del saved
        trip.phase = "backward"
        offsets = trip.rows.offsets

        da, dy_kept = path.to_experts(grad, down, trip, ops, linear)
        dx, dprobs, dh_kept, a_kept = linear.up_backward(da, h, trip.probs, a_kept, up, offsets)
        d_tokens, d_weights = trip.combine_with_probs(dx, dprobs)
        d_down = linear.wgrad(dy_kept, a_kept, offsets, ctx.dtype)
        d_up = linear.wgrad(dh_kept, x_kept, offsets, ctx.dtype)
        runtime.counts.backward_passes += 1
        d_up, d_down = ctx.as_parameter(d_up), ctx.as_parameter(d_down)
        return d_tokens, d_weights, d_up, d_down, None, None, None, None


def _compute(
    tokens: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    layer: int,
    local_experts: int,
    runtime: Runtime,
    prepared: tuple[Prepared, Prepared],
) -> tuple[Tensor, Saved]:
    """The forward pass without combine: rows [P, H], and what the backward pass needs.

    The backward pass calls it too where activations are computed again.
    """
    path, ops, linear = runtime.path, runtime.ops, runtime.linear
    (up, _), (down, _) = prepared
    max_rows = runtime.max_rows(layer, len(tokens), expert_ids.shape[1], local_experts)
    trip = Trip(
        runtime.dispatcher,
        ops,
        runtime.counts,
        expert_ids,
        weights,
        local_experts,
        path.ROW_ALIGNMENT,
        max_rows,
    )
    h, x_kept = path.to_experts(tokens, up, trip, ops, linear)
    y, a_kept = linear.down(h, trip.probs, down, trip.rows.offsets)
    runtime.counts.forward_passes += 1
    return y, Saved(trip, h, x_kept, a_kept)


def _local(parameter: Tensor) -> Tensor:
    """This rank's experts of a parameter that is spread over the expert-parallel ranks."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _spread_as(parameter: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes this rank's part of a gradient one that is spread as the parameter is."""
    if not isinstance(parameter, DTensor):
        return lambda gradient: gradient
    mesh, placements = parameter.device_mesh, parameter.placements
    return lambda gradient: DTensor.from_local(gradient, mesh, placements)
