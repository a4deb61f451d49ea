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
    """All of them at one size; first a copy, which they are compared with."""

    def copy(source: Tensor) -> Tensor:
        return torch.empty_like(source).copy_(source)

    values = rows * cols
    x = partial(_random, rows, cols)
    bench.run("copy", "PyTorch", f"{rows} x {cols}", _call(copy, x), 2 * values, 4 * values)
    _quantization(bench, ops, te, rows, cols)
    _permutation(bench, ops, te, rows, cols)
    _swiglu(bench, ops, rows, cols)


def _random(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)


def _call(f: Callable[..., Any], *makers: Call) -> Make:
    """A maker of calls of f, each with arguments of its own."""
    return lambda: partial(f, *(maker() for maker in makers))


def _quantization(
    bench: Bench, ops: ModuleType, te: ModuleType | None, rows: int, cols: int
) -> None:
    """Quantize, dequantize, and relayout of the scales alone."""
    shape = f"{rows} x {cols}"
    values = rows * cols
    scales = values // BLOCK * 4
    x = partial(_random, rows, cols)
    moved = 3 * values + scales
    for layout in Layout:
        quantize = lambda t, layout=layout: ops.quantize(t, layout)  # noqa: E731
        name = f"quantize {layout.name}"
        bench.run(name, "ours", shape, _call(quantize, x), 2 * values, moved)
    columns = lambda t: ops.quantize_columns(t, GEMM_READY)  # noqa: E731
    bench.run("quantize_columns", "ours", shape, _call(columns, x), 2 * values, moved)
    quantized = lambda: ops.quantize(x(), COMPACT)  # noqa: E731
    to_bf16 = lambda q: ops.dequantize(q, torch.bfloat16)  # noqa: E731
    bench.run("dequantize", "ours", shape, _call(to_bf16, quantized), values, moved)
    for start, end in ((COMPACT, GEMM_READY), (GEMM_READY, COMPACT)):
        before = lambda start=start: ops.quantize(x(), start)  # noqa: E731
        turn = lambda q, end=end: relayout(q, end)  # noqa: E731
        name = f"relayout to {end.name}"
        bench.run(name, "PyTorch", shape, _call(turn, before), scales, 2 * scales)
    if te:
        te_quantize = lambda t: te.quantize(t, GEMM_READY)  # noqa: E731
        bench.run("quantize GEMM_READY", "TE", shape, _call(te_quantize, x), 2 * values, moved)
        te_to_bf16 = lambda q: te.dequantize(q, torch.bfloat16)  # noqa: E731
        bench.run("dequantize", "TE", shape, _call(te_to_bf16, quantized), values, moved)


def _permutation(
    bench: Bench, ops: ModuleType, te: ModuleType | None, rows: int, cols: int
) -> None:
    """The plan of rows, permute and unpermute: about `rows` rows after permuting, of tokens in
    eight slots, two of them ours."""
    tokens, slots, experts = rows // 2, 8, 32
    ids = torch.randint(0, 4 * experts, (tokens, slots), device="cuda")
    ids = torch.where(ids < experts, ids, -1)
    plan = ops.plan_rows(ids, experts)
    copies = int(plan.counts.sum())
    row_bytes = cols + cols // BLOCK * 4
    moved = (copies + plan.num_rows) * row_bytes + 4 * plan.num_rows
    routed = f"{tokens} to {plan.num_rows} x {cols}"

    def received() -> BlockScaledTensor:
        return ops.quantize(_random(rows, cols)[:tokens], COMPACT)

    def received_bf16() -> Tensor:
        return _random(rows, cols)[:tokens].clone()

    permuted_bf16 = partial(_random, plan.num_rows, cols)
    bound = plan.num_rows + 1024
    make_plan = lambda i: ops.plan_rows(i, experts, max_rows=bound)  # noqa: E731
    bench.run(
        "plan_rows", "ours", f"{tokens} x {slots}, {experts} experts",
        _call(make_plan, ids.clone), ids.nbytes,
    )  # fmt: skip
    makers = {"ours": ops} | ({"TE": te} if te else {})
    for by, other in makers.items():
        scaled = lambda q, other=other: other.permute_scaled(q, plan)  # noqa: E731
        bench.run("permute_scaled", by, routed, _call(scaled, received), tokens * row_bytes, moved)
        plain = lambda t, other=other: other.permute(t, plan)  # noqa: E731
        bench.run(
            "permute bf16", by, routed, _call(plain, received_bf16), 2 * tokens * cols,
            (copies + plan.num_rows) * 2 * cols + 4 * plan.num_rows,
        )  # fmt: skip
        back = lambda t, other=other: other.unpermute(t, plan)  # noqa: E731
        bench.run(
            "unpermute bf16", by, routed, _call(back, permuted_bf16), 2 * plan.num_rows * cols,
            (copies + tokens) * 2 * cols + 8 * tokens * slots,
        )  # fmt: skip


def _swiglu(bench: Bench, ops: ModuleType, rows: int, cols: int) -> None:
    """SwiGLU, its backward, and both with quantizing."""
    shape = f"{rows} x {cols}"
    values = rows * cols
    scales = values // BLOCK * 4
    x, h = partial(_random, rows, cols), partial(_random, rows, 2 * cols)
    probs = lambda: torch.rand(rows, device="cuda")  # noqa: E731
    read = 4 * values + 4 * rows
    bench.run("swiglu", "ours", shape, _call(ops.swiglu, h, probs), read, read + 2 * values)
    fused = lambda a, p: ops.swiglu_quantize(a, p, COMPACT)  # noqa: E731
    bench.run(
        "swiglu_quantize", "ours", shape, _call(fused, h, probs), read, read + values + scales
    )
    bench.run(
        "swiglu_backward", "ours", shape, _call(ops.swiglu_backward, x, h, probs),
        read + 2 * values, read + 6 * values + 4 * rows,
    )  # fmt: skip
    all_of_it = lambda d, a, p: ops.swiglu_backward_quantize(d, a, p, COMPACT)  # noqa: E731
    bench.run(
        "swiglu_backward_quantize", "ours", shape, _call(all_of_it, x, h, probs),
        read + 2 * values, read + 10 * values + 2 * scales + 4 * rows,
    )  # fmt: skip
