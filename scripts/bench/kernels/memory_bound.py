"""The kernels that are bound by memory, at one size: quantization, permute and SwiGLU."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from models.fp8.tensor import BLOCK, BlockScaledTensor, Layout, relayout
from scripts.bench.kernels.timing import Bench, Call, Make

COMPACT, GEMM_READY = Layout.COMPACT, Layout.GEMM_READY


def bench_memory_bound(
    bench: Bench, ops: ModuleType, te: ModuleType | None, rows: int, cols: int
) -> None:
    shape = f"{rows} x {cols}"
    values = rows * cols
    scales = values // BLOCK * 4

    def x() -> Tensor:
        return torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)

    def call(f: Callable[..., Any], *makers: Call) -> Make:
        """A maker of calls of f, each with arguments of its own."""
        return lambda: partial(f, *(maker() for maker in makers))

    def copy(source: Tensor) -> Tensor:
        return torch.empty_like(source).copy_(source)

    bench.run("copy", "PyTorch", shape, call(copy, x), 2 * values, 4 * values)

    moved = 3 * values + scales
    for layout in Layout:
        quantize = lambda t, layout=layout: ops.quantize(t, layout)  # noqa: E731
        name = f"quantize {layout.name}"
        bench.run(name, "ours", shape, call(quantize, x), 2 * values, moved)
    columns = lambda t: ops.quantize_columns(t, GEMM_READY)  # noqa: E731
    bench.run("quantize_columns", "ours", shape, call(columns, x), 2 * values, moved)
    quantized = lambda: ops.quantize(x(), COMPACT)  # noqa: E731
    to_bf16 = lambda q: ops.dequantize(q, torch.bfloat16)  # noqa: E731
    bench.run("dequantize", "ours", shape, call(to_bf16, quantized), values, moved)
    for start, end in ((COMPACT, GEMM_READY), (GEMM_READY, COMPACT)):
        before = lambda start=start: ops.quantize(x(), start)  # noqa: E731
        turn = lambda q, end=end: relayout(q, end)  # noqa: E731
        name = f"relayout to {end.name}"
        bench.run(name, "PyTorch", shape, call(turn, before), scales, 2 * scales)
    if te:
        te_quantize = lambda t: te.quantize(t, GEMM_READY)  # noqa: E731
        bench.run("quantize GEMM_READY", "TE", shape, call(te_quantize, x), 2 * values, moved)
        te_to_bf16 = lambda q: te.dequantize(q, torch.bfloat16)  # noqa: E731
        bench.run("dequantize", "TE", shape, call(te_to_bf16, quantized), values, moved)

    # About `rows` rows after permuting: a token in eight slots, two of them ours.
    tokens, slots, experts = rows // 2, 8, 32
    ids = torch.randint(0, 4 * experts, (tokens, slots), device="cuda")
    ids = torch.where(ids < experts, ids, -1)
    plan = ops.plan_rows(ids, experts)
    copies = int(plan.counts.sum())
    row_bytes = cols + scales // rows
    moved = (copies + plan.num_rows) * row_bytes + 4 * plan.num_rows
    routed = f"{tokens} to {plan.num_rows} x {cols}"

    def received() -> BlockScaledTensor:
        return ops.quantize(x()[:tokens], COMPACT)

    def received_bf16() -> Tensor:
        return x()[:tokens].clone()

    def permuted_bf16() -> Tensor:
        return torch.randn(plan.num_rows, cols, device="cuda", dtype=torch.bfloat16)

    bound = plan.num_rows + 1024
    make_plan = lambda i: ops.plan_rows(i, experts, max_rows=bound)  # noqa: E731
    bench.run(
        "plan_rows", "ours", f"{tokens} x {slots}, {experts} experts",
        call(make_plan, ids.clone), ids.nbytes,
    )  # fmt: skip
    makers = {"ours": ops} | ({"TE": te} if te else {})
    for by, other in makers.items():
        scaled = lambda q, other=other: other.permute_scaled(q, plan)  # noqa: E731
        bench.run("permute_scaled", by, routed, call(scaled, received), tokens * row_bytes, moved)
        plain = lambda t, other=other: other.permute(t, plan)  # noqa: E731
        bench.run(
            "permute bf16", by, routed, call(plain, received_bf16), 2 * tokens * cols,
            (copies + plan.num_rows) * 2 * cols + 4 * plan.num_rows,
        )  # fmt: skip
        back = lambda t, other=other: other.unpermute(t, plan)  # noqa: E731
        bench.run(
            "unpermute bf16", by, routed, call(back, permuted_bf16), 2 * plan.num_rows * cols,
            (copies + tokens) * 2 * cols + 8 * tokens * slots,
        )  # fmt: skip

    h = lambda: torch.randn(rows, 2 * cols, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    probs = lambda: torch.rand(rows, device="cuda")  # noqa: E731
    read = 4 * values + 4 * rows
    bench.run("swiglu", "ours", shape, call(ops.swiglu, h, probs), read, read + 2 * values)
    fused = lambda a, p: ops.swiglu_quantize(a, p, COMPACT)  # noqa: E731
    bench.run("swiglu_quantize", "ours", shape, call(fused, h, probs), read, read + values + scales)
    bench.run(
        "swiglu_backward", "ours", shape, call(ops.swiglu_backward, x, h, probs),
        read + 2 * values, read + 6 * values + 4 * rows,
    )  # fmt: skip
    all_of_it = lambda d, a, p: ops.swiglu_backward_quantize(d, a, p, COMPACT)  # noqa: E731
    bench.run(
        "swiglu_backward_quantize", "ours", shape, call(all_of_it, x, h, probs),
        read + 2 * values, read + 10 * values + 2 * scales + 4 * rows,
    )  # fmt: skip
