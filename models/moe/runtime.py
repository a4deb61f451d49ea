"""Which library runs what of the path on this machine: chosen once, when the model is built."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from models import attention_backend
from models.config import ModelConfig, MoEConfig
from models.fp8 import operations
from models.fp8.linear import AnyLinear, Fp8Linear
from models.fp8.operations import Operations
from models.moe import dispatch
from models.moe.counts import Counts
from models.moe.dispatch import Dispatcher
from models.moe.paths import PATHS, Path
from models.moe.room import Room, fixed_rows, most_needed, settle


@dataclass(frozen=True)
class Runtime:
    """The choice: the path, and what runs it."""

    path: Path
    ops: Operations
    linear: AnyLinear
    """The experts' GEMMs."""
    dispatcher: Dispatcher
    description: str = ""
    """All of it, as a line for the user."""
    capacity: float | None = None
    """A number of `MoEConfig.capacity`; None where there is none, or it does not apply."""
    room: Room | None = None
    """The room that is reserved where `moe.capacity` is auto and applies."""
    recompute: bool = False
    """See `MoEConfig.recompute`."""
    counts: Counts = field(default_factory=Counts)

    def max_rows(self, layer: int, tokens: int, top_k: int, local_experts: int) -> int | None:
        """P of a layer, counted from 0, where room is reserved for `tokens` on every rank: by
        `capacity` or `room`. None where P is what arrives.

        A number drops the same rows on each machine, so only `room` honours the operations'
        `rows_step`."""
        step, even = self.path.ROW_ALIGNMENT, tokens * top_k
        most = most_needed(tokens * self.dispatcher.ranks, top_k, local_experts, step)
        if self.capacity is not None:
            return fixed_rows(self.capacity, even, most, local_experts, step)
        if self.room is None:
            return None
        return self.room.max_rows(layer, even, most, math.lcm(step, self.ops.rows_step()))

    def __deepcopy__(self, memo: dict) -> "Runtime":
        """Itself: megatron-core copies its config for shared experts, and one place counts."""
        return self

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave what the layers do inside the `with` out of all counts."""
        sent = self.dispatcher.mark()
        with self.counts.paused():
            yield
        self.dispatcher.rewind(sent)

    def waiting(self) -> "Runtime":
        """The same where every layer waits for the count of its rows, and drops none."""
        return replace(self, capacity=None, room=None)

    def with_operations(self, ops: Operations, device: str) -> "Runtime":
        """The same path run by other operations on `cpu` or `cuda`."""
        return replace(self, ops=ops, linear=build_linear(self.path, ops, device))


@dataclass
class GPTConfig(TransformerConfig):
    """megatron-core's config, which reaches every module, and what our MoE layer needs too."""

    # Always given; without a default they could not follow megatron-core's fields.
    moe_runtime: Runtime = None  # type: ignore[assignment]
    shared_expert_linears: MLPSubmodules = None
    expert_bias: bool = False
    """See `MoEConfig.expert_bias`; megatron-core's own key takes no softmax."""


def build_runtime(model: ModelConfig, moe: MoEConfig, device: str) -> Runtime:
    """Choose, once, what runs the path on `cpu` or `cuda` here. All ranks together."""
    path = PATHS[moe.path]
    ops, who = operations.choose(moe.path, device)
    linear = build_linear(path, ops, device)
    dispatcher, how = dispatch.choose(
        model, moe, device, parallel_state.get_expert_model_parallel_group(), ops
    )
    why = f"{moe.path} launches one GEMM an expert" if linear.NEEDS_SEGMENTS_ON_HOST else None
    capacity, room, rows = settle(moe, model.num_layers, device, why, dispatcher.why_it_waits)
    return Runtime(
        path,
        ops,
        linear,
        dispatcher,
        "; ".join(filter(None, (who, linear.DESCRIPTION, how, rows))),
        capacity=capacity,
        room=room,
        recompute=moe.recompute,
    )


def build_linear(path: Path, ops: Operations, device: str) -> AnyLinear:
    """The linear layer that a path names; on a GPU TransformerEngine's, where it has the same
    one."""
    if device == "cuda" and path.LINEAR is Fp8Linear:
        from models.fp8 import te, te_grouped

        if te_grouped.is_supported():
            return te_grouped.TEGroupedLinear(ops)
        return te.TELinear(ops)
    return path.LINEAR(ops)


def why_not(model: ModelConfig, moe: MoEConfig, device: str, ranks: int) -> str | None:
    """Why this path or dispatch cannot run on `cpu` or `cuda` here, in one line; None if it can.

    `ranks` share one set of experts.
    """
    names_deep_ep = moe.dispatch not in ("auto", "all_to_all")
    if names_deep_ep and device == "cpu":
        other = "set moe.dispatch=all_to_all, which runs anywhere"
        return f"moe.dispatch={moe.dispatch} needs GPUs; {other}"
    if (reason := attention_backend.why_not(model.attention_backend, device)) is not None:
        return reason
    if model.dense_fp8 and (reason := operations.why_no_fp8(device)) is not None:
        return f"model.dense_fp8=true cannot run here: {reason}"
    if (reason := operations.why_not(moe.path, device)) is not None:
        return f"moe.path={moe.path} cannot run here: {reason}"
    if names_deep_ep and (reason := dispatch.why_no_deep_ep(model, moe, ranks)) is not None:
        return f"moe.dispatch={moe.dispatch} cannot run here: {reason}"
    return None
