"""The five steps and what follows them as timed parts, without a line of it in the paths.

A path is given what it calls: operations, a trip, and two names of its module, `relayout` and
`BlockScaledTensor`. Here each of these is replaced by one that is timed, in a `Runtime` that a
layer uses instead of its own for as long as somebody looks. Results do not change.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from models.moe.experts import Runtime
from train.profiling.timer import Timer

STEPS = ("quantize", "dispatch", "wrap", "permute", "up_projection")
"""The five steps. In backward, step 5 is `dgrad`: the gradient takes the same way to the first GEMM
that it meets."""

PARTS = (
    *STEPS,
    "relayout",
    "swiglu",
    "down_projection",
    "combine",
    "dgrad",
    "wgrad",
    "quantize_weights",
)
"""Parts of an MoE layer from its router's choice on. `relayout` is taken out of the steps in which
it is made. Quantizing that a linear layer does for its own GEMM belongs to that GEMM."""

OPERATIONS = {
    "plan_rows": "permute",
    "permute_probs": "permute",
    "permute": "permute",
    "permute_scaled": "permute",
    "unpermute": "combine",
    "unpermute_probs": "combine",
    "swiglu": "swiglu",
    "swiglu_quantize": "swiglu",
    "swiglu_backward": "swiglu",
    "swiglu_backward_quantize": "swiglu",
}
"""Operations that are the same part wherever they are called."""

LINEAR = {
    "prepare_weights": "quantize_weights",
    "forward": "down_projection",
    "backward": "dgrad",
    "wgrad": "wgrad",
}
"""Functions of the experts' linear layer (models/fp8/linear.py), called outside a path. `down` and
`down_backward` are made of other parts."""

DISPATCHER = {"dispatch": "dispatch", "dispatch_again": "dispatch", "combine": "combine"}

FIRST_GEMM = {"forward": "up_projection", "backward": "dgrad"}
"""What step 5 of a path computes in either pass."""


class _Timed:
    """Stands in for an object: the named functions are timed, the rest is the object's own."""

    def __init__(self, target: Any, timer: Timer, parts: Mapping[str, str]) -> None:
        self._target = target
        for name, part in parts.items():
            if hasattr(target, name):
                setattr(self, name, timer.timed(getattr(target, name), part))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def timed_runtime(runtime: Runtime, timer: Timer) -> Runtime:
    """The same runtime, with its parts timed by `timer`; counts and dispatcher are shared."""
    # Outside the paths, and outside `backward`, one GEMM is left.
    ops = _Timed(runtime.ops, timer, {**OPERATIONS, "grouped_gemm": "down_projection"})
    setattr(ops, runtime.path.LINEAR, _Timed(runtime.linear, timer, LINEAR))
    return replace(
        runtime,
        path=_timed_path(runtime, timer),
        ops=ops,
        dispatcher=_Timed(runtime.dispatcher, timer, DISPATCHER),
    )


def _timed_path(runtime: Runtime, timer: Timer) -> Any:
    """The path's module with `to_experts` as it is, in a namespace where what it calls is timed."""
    path = runtime.path
    inside = {phase: _ops_inside(runtime, timer, gemm) for phase, gemm in FIRST_GEMM.items()}
    to_experts = _with_names(path, {"relayout": "relayout", "BlockScaledTensor": "wrap"}, timer)

    def timed_to_experts(tokens: Tensor, w: Any, trip: Any, ops: Any) -> tuple[Tensor, Any]:
        return to_experts(tokens, w, trip, inside[trip.phase])

    return SimpleNamespace(
        LINEAR=path.LINEAR, ROW_ALIGNMENT=path.ROW_ALIGNMENT, to_experts=timed_to_experts
    )


def _ops_inside(runtime: Runtime, timer: Timer, gemm: str) -> Any:
    """The operations as a path calls them, where `quantize` is step 1 and any GEMM step 5."""
    parts = {"quantize": "quantize", "dequantize": gemm, "grouped_gemm": gemm, "grouped_mm": gemm}
    ops = _Timed(runtime.ops, timer, {**OPERATIONS, **parts})
    setattr(ops, runtime.path.LINEAR, _Timed(runtime.linear, timer, {"forward": gemm}))
    return ops


def _with_names(path: ModuleType, parts: Mapping[str, str], timer: Timer) -> FunctionType:
    """The module's `to_experts`, the very code, with some of the module's names timed."""
    names = vars(path)
    timed = {name: timer.timed(names[name], part) for name, part in parts.items() if name in names}
    return FunctionType(path.to_experts.__code__, {**names, **timed})
