"""The five steps and what follows them as timed parts, without a line of it in the paths.

A path is given what it calls: operations, a trip, and the linear layer. Here each of these is
replaced by one that is timed, in a `Runtime` that a layer uses while it is timed. Results do not
change.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from models.fp8.linear import AnyLinear, HasBytes
from models.fp8.operations import Operations
from models.moe.dispatch.trip import Trip
from models.moe.paths import Path
from models.moe.runtime import Runtime
from train.profiling.timer import Timer

STEPS = ("quantize", "dispatch", "permute", "up_projection")
"""Those of the five steps that take time: 3 only wraps what arrived. In backward, step 5 is
`dgrad`: the gradient follows the same steps to the first GEMM that it meets."""

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
    "quantize": "quantize",
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

GEMMS = ("dequantize", "grouped_gemm", "grouped_mm")
"""Operations that belong to the GEMM that is being computed."""

LINEAR = {"prepare_weights": "quantize_weights", "wgrad": "wgrad"}
"""Functions of the linear layer that are a part of their own."""

DISPATCHER = {
    "dispatch": "dispatch",
    "dispatch_again": "dispatch",
    "expand": "dispatch",
    "expand_again": "dispatch",
    "combine": "combine",
}
"""What a dispatcher does that is timed; the permute inside of an `expand` with it."""

FIRST_GEMM = {"forward": "up_projection", "backward": "dgrad"}
"""What step 5 of a path computes in either pass."""

SECOND_GEMM = {"down": "down_projection", "up_backward": "dgrad"}
"""What these functions of the linear layer compute, after SwiGLU or its backward pass."""

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes a function that does the same, and is timed."""

Target = TypeVar("Target")


def timed_runtime(runtime: Runtime, timer: Timer) -> Runtime:
    """The same runtime, with its parts timed by `timer`; counts and dispatcher are shared."""
    gemm = _Gemm(timer)
    ops = _stand_in(
        runtime.ops,
        {name: timer.wrapper(part) for name, part in OPERATIONS.items()}
        | dict.fromkeys(GEMMS, gemm.timed),
    )
    return replace(
        runtime,
        path=_TimedPath(runtime.path, timer, gemm),
        ops=ops,
        linear=_timed_linear(runtime.linear, ops, timer, gemm),
        dispatcher=_stand_in(
            runtime.dispatcher, {name: timer.wrapper(part) for name, part in DISPATCHER.items()}
        ),
    )


class _Gemm:
    """Which GEMM is being computed: the function that starts one sets it, and the time counts for
    that part."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self.part = ""

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part of the GEMM that is being computed when it is called."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.timer.part(self.part):
                return function(*args, **kwargs)

        return wrapper

    def begin(self, part: str) -> Wrapper:
        """For functions whose GEMM is `part`."""

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                self.part = part
                return function(*args, **kwargs)

            return wrapper

        return wrap


class _StandIn:
    """Stands in for an object: some functions are replaced, the rest is the object's own."""

    def __init__(self, target: Any, wrappers: Mapping[str, Wrapper]) -> None:
        self._target = target
        for name, wrapper in wrappers.items():
            if hasattr(target, name):
                setattr(self, name, wrapper(getattr(target, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _stand_in(target: Target, wrappers: Mapping[str, Wrapper]) -> Target:
    """What fits wherever `target` does, with the named functions wrapped."""
    stand_in: Any = _StandIn(target, wrappers)
    return stand_in


@dataclass(frozen=True)
class _TimedPath:
    """A path whose relayouts and GEMM are timed."""

    path: Path
    timer: Timer
    gemm: _Gemm

    @property
    def LINEAR(self) -> Callable[[Operations], AnyLinear]:
        return self.path.LINEAR

    @property
    def ROW_ALIGNMENT(self) -> int:
        return self.path.ROW_ALIGNMENT

    def to_experts(
        self, tokens: Tensor, w: Any, trip: Trip, ops: Operations, linear: AnyLinear
    ) -> tuple[Tensor, HasBytes]:
        self.gemm.part = FIRST_GEMM[trip.phase]
        trip = _stand_in(trip, {"relayout": self.timer.wrapper("relayout")})
        return self.path.to_experts(tokens, w, trip, ops, linear)


def _timed_linear(linear: AnyLinear, ops: Operations, timer: Timer, gemm: _Gemm) -> AnyLinear:
    """A copy that calls `ops`, and whose functions are timed also where it calls them itself."""
    timed = copy.copy(linear)
    timed.ops = ops
    wrappers = {name: timer.wrapper(part) for name, part in LINEAR.items()}
    wrappers |= {name: gemm.begin(part) for name, part in SECOND_GEMM.items()}
    wrappers["forward"] = gemm.timed
    for name, wrapper in wrappers.items():
        setattr(timed, name, wrapper(getattr(timed, name)))
    return timed
