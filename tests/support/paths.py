"""What tests expect of each path: the one place to say it for a new one."""

from collections.abc import Mapping
from typing import NamedTuple


class Expected(NamedTuple):
    relayouts: int
    """Relayouts of one layer and pass."""
    bound: float
    """Relative Frobenius error that it may have against float64; why so much, test_experts says."""
    parts: list[str]
    """What is timed of it in a forward pass, in this order; its GEMMs are in one call each."""


SENT = ["dispatch", "permute", "permute"]  # the plan of rows, and routing weights by it

EXPECTED: Mapping[str, Expected] = {
    "bf16": Expected(0, 1e-5, [*SENT, "permute", "up_projection"]),
    "fp8_baseline": Expected(
        5,
        0.16,
        [
            *("quantize", "relayout"),
            *SENT,
            "relayout",
            *("relayout", "permute", "relayout"),
            *("relayout", "up_projection", "up_projection"),  # dequantize, GEMM
        ],
    ),
    "fp8_compact": Expected(
        2,
        0.16,
        [
            "quantize",
            *SENT,
            *("permute", "relayout"),
            *("relayout", "up_projection", "up_projection"),
        ],
    ),
    "fp8_direct": Expected(0, 0.16, ["quantize", *SENT, "permute", "up_projection"]),
    # Of a dispatcher that does not expand.
    "fp8_fused": Expected(0, 0.16, ["quantize", *SENT, "permute", "up_projection"]),
}
