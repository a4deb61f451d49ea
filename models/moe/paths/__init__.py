"""The paths from router to experts, chosen by `moe.path`. Read them side by side:

    diff models/moe/paths/fp8_baseline.py models/moe/paths/fp8_compact.py

Each file is one function, `to_experts`, with the same five steps. It runs twice per layer and
step: forward on the tokens, up to the experts' up-projection; and backward on the gradient of the
layer's output, up to the first GEMM that it meets, which is the down-projection's dgrad.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from models.config import PathName
from models.fp8.linear import AnyLinear, HasBytes
from models.fp8.operations import Operations
from models.moe.dispatch.trip import Trip
from models.moe.paths import bf16, fp8_baseline, fp8_compact, fp8_direct, fp8_fused


class Path(Protocol):
    """What the module of a path has."""

    @property
    def LINEAR(self) -> Callable[[Operations], AnyLinear]:
        """The class of models/fp8/linear.py that computes the experts' GEMMs."""

    @property
    def ROW_ALIGNMENT(self) -> int:
        """The rows of each expert are rounded up to a multiple of it."""

    def to_experts(
        self, tokens: Tensor, w: Any, trip: Trip, ops: Operations, linear: AnyLinear
    ) -> tuple[Tensor, HasBytes]:
        """Tokens [T, K] to the first GEMM of their experts, [P, N], and what wgrad needs of them.

        w: the GEMM's weights as `linear` has prepared them for this pass.
        """


PATHS: dict[PathName, Path] = {
    "bf16": bf16,
    "fp8_baseline": fp8_baseline,
    "fp8_compact": fp8_compact,
    "fp8_direct": fp8_direct,
    "fp8_fused": fp8_fused,
}
