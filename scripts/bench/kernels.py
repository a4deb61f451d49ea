"""What the Triton kernels cost: microseconds, GB/s next to a copy's, TFLOP/s next to cuBLAS's.

    python -m scripts.bench.kernels [--out docs/results/kernels.json] [--only TEXT] [--tune]

Needs a Hopper GPU. The times are the GPU's alone: a long kernel keeps the GPU busy while the host
queues the calls, so nothing waits for Python between them. Each call works on other buffers than
those before it, more than fit in L2 together, as in training; the median of 20 calls or more is
reported. In the same run a copy is measured for each size of memory-bound kernels, and a dense GEMM
with the same number of operations for each GEMM.

TransformerEngine's kernels are measured too where it is installed (`models/fp8/te.py`). Its linear
layer launches several kernels for each expert, more than can be queued ahead: there the host's time
counts too, as in training. So are DeepGEMM's grouped GEMMs (github.com/deepseek-ai/DeepGEMM), with
scales in its layout and with COMPACT ones, which it transposes first.
`--tune` tries settings of the FP8 grouped GEMM, and writes nothing.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fp8.reference.adamw import AdamWStep
from models.fp8.tensor import BLOCK, BlockScaledTensor, BlockScaledWeights, Layout, relayout
from scripts.bench.machine import describe_machine
from scripts.bench.results import Row, spread, write_json

SIZES = [(16384, 2048), (65536, 2048), (16384, 7168)]
GEMMS = [(64, 1024, 2048, 2048), (32, 2048, 2048, 1536), (16, 4096, 7168, 4096)]
"""Experts, rows of each, K and N."""
UP_PROJECTION = (64, 1536, 2048)
"""Qwen3-30B-A3B's, of the 64 experts of one GPU of two."""
CALLS = 20
ROTATED_BYTES = 256 * 2**20
"""Total size of the rotated inputs, at least: several times an L2 of 50 MB."""
BUSY_CYCLES = 20_000_000
"""About 10 ms, in which the host queues the calls."""
COMPACT, GEMM_READY = Layout.COMPACT, Layout.GEMM_READY

Call = Callable[[], Any]
"""What is timed; its result is ignored."""
Make = Callable[[], Call]
"""Makes a call with buffers of its own."""


def time_us(make: Make, input_bytes: int) -> list[float]:
    """Microseconds of each of `CALLS` calls."""
    copies = max(2, min(-(-ROTATED_BYTES // max(input_bytes, 1)), CALLS))
    calls = [make() for _ in range(copies)]
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    torch.cuda._sleep(BUSY_CYCLES)
    for i, (start, stop) in enumerate(events):
        start.record()
        calls[i % copies]()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1000 for start, stop in events]


class Bench:
    """Collects rows and prints each as it comes."""

    def __init__(self, only: str) -> None:
        self.only = only
        self.rows: list[Row] = []
        self.copy_gb_s = 0.0
        self.dense: dict[str, float] = {}

    def run(
        self,
        kernel: str,
        by: str,
        shape: str,
        make: Make,
        input_bytes: int,
        moved_bytes: int = 0,
        operations: float = 0,
        kind: str = "",
    ) -> None:
        """One kernel at one size. `kind` of a GEMM is the dense one that it is compared with."""
        if self.only not in f"{kernel} {by} {shape}" and by != "cuBLAS" and kernel != "copy":
            return
        try:
            times = time_us(make, input_bytes)
        except Exception as error:  # a peer may lack the operation; ours failing is shown too
            torch.cuda.synchronize()
            text = str(error).strip().partition("\n")[0][:100]
            print(f"{kernel:26} {by:12} {shape:26} failed: {type(error).__name__}: {text}")
            self.rows.append({"kernel": kernel, "by": by, "shape": shape, "error": text})
            return
        us = statistics.median(times)
        row: Row = {"kernel": kernel, "by": by, "shape": shape, "us": spread(times)}
        line = f"{kernel:26} {by:12} {shape:26} {us:9.1f} us"
        if moved_bytes:
            row["gb_per_s"] = moved_bytes / us / 1e3
            if kernel == "copy":
                self.copy_gb_s = row["gb_per_s"]
            row["share_of_copy"] = row["gb_per_s"] / self.copy_gb_s
            line += f" {row['gb_per_s']:7.0f} GB/s {row['share_of_copy']:6.0%} of a copy"
        if operations:
            row["tflops"] = operations / us / 1e6
            if by == "cuBLAS":
                self.dense[kind] = row["tflops"]
            line += f" {row['tflops']:7.0f} TFLOP/s"
            if kind in self.dense:
                row["share_of_dense"] = row["tflops"] / self.dense[kind]
                line += f" {row['share_of_dense']:6.0%} of dense {kind}"
        print(line, flush=True)
        self.rows.append(row)


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


def bench_weights(bench: Bench, ops: ModuleType, experts: int, n: int, k: int) -> None:
    values = experts * n * k
    bench.run(
        "quantize_weights", "ours", f"{experts} x {n} x {k}",
        lambda: partial(ops.quantize_weights, _weights(experts, n, k)), 2 * values, 3 * values,
    )  # fmt: skip


def bench_optimizer(bench: Bench, ops: ModuleType, experts: int, n: int, k: int) -> None:
    """One optimizer step of one weight, and what is read of it afterwards."""
    shape = f"{experts} x {n} x {k}"
    values = experts * n * k
    step = AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.1, 5, torch.full((), 2.0, device="cuda"))

    def tensors() -> list[Tensor]:
        return [torch.rand(experts, n, k, device="cuda") for _ in range(4)]

    def run(kernel: str, by: str, make: Make, moved: int) -> None:
        bench.run(kernel, by, shape, make, 16 * values, moved * values)

    def optimizer(kind: Callable[..., torch.optim.Optimizer], **keys: bool) -> Call:
        parameter = torch.nn.Parameter(torch.rand(experts, n, k, device="cuda"))
        parameter.grad = torch.rand_like(parameter)
        return kind([parameter], lr=1e-3, **keys).step

    to = torch.bfloat16
    run("copy", "PyTorch", lambda: partial(torch.clone, tensors()[0]), 8)
    run("adamw", "PyTorch", partial(optimizer, torch.optim.AdamW, fused=True), 28)
    try:
        from transformer_engine.pytorch.optimizers import FusedAdam
    except ImportError:
        pass
    else:
        run("adamw", "TE", partial(optimizer, FusedAdam), 28)
    run("adamw", "ours", lambda: partial(ops.adamw, *tensors(), step), 28)
    run("adamw_cast", "ours", lambda: partial(ops.adamw_cast, *tensors(), step, to), 30)
    run("adamw_quantize", "ours", lambda: partial(ops.adamw_quantize, *tensors(), step, to), 30)
    run(
        "quantize_weights_both_ways", "ours",
        lambda: partial(ops.quantize_weights_both_ways, tensors()[0], to), 6,
    )  # fmt: skip
    norms: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "get_total_norm": torch.nn.utils.get_total_norm,
        "vector_norm": lambda gradients: torch.linalg.vector_norm(gradients[0]),
    }
    for kernel, norm in norms.items():
        run(kernel, "PyTorch", lambda norm=norm: partial(norm, tensors()[:1]), 4)  # type: ignore[misc]


def _weights(experts: int, n: int, k: int) -> Tensor:
    return torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16)


@dataclass(frozen=True)
class GemmProblem:
    """Operands of one up-projection of E experts, forward and backward; `8` is FP8."""

    x: Tensor  # [P, K]
    dy: Tensor  # [P, N]
    w: Tensor  # [E, N, K]
    offsets: Tensor  # int64 [E + 1]
    x8: dict[Layout, BlockScaledTensor]
    dy8: BlockScaledTensor
    w8: BlockScaledWeights
    w8_t: BlockScaledWeights
    x8_t: BlockScaledTensor  # [K, P]
    dy8_t: BlockScaledTensor  # [N, P]


def gemm_problem(ops: ModuleType, experts: int, rows: int, k: int, n: int) -> GemmProblem:
    """All experts have as many rows."""
    total = experts * rows
    x = torch.randn(total, k, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(total, n, device="cuda", dtype=torch.bfloat16)
    w = _weights(experts, n, k)
    return GemmProblem(
        x=x,
        dy=dy,
        w=w,
        offsets=torch.arange(0, total + 1, rows, device="cuda"),
        x8={layout: ops.quantize(x, layout) for layout in Layout},
        dy8=ops.quantize(dy, COMPACT),
        w8=ops.quantize_weights(w),
        w8_t=ops.quantize_weights(w.transpose(1, 2).contiguous()),
        x8_t=ops.quantize_columns(x, GEMM_READY),
        dy8_t=ops.quantize_columns(dy, GEMM_READY),
    )


def bench_gemms(
    bench: Bench, ops: ModuleType, te: ModuleType | None, te_grouped: ModuleType | None,
    deep_gemm: ModuleType | None, experts: int, rows: int, k: int, n: int,
) -> None:  # fmt: skip
    shape = f"{experts} x {rows}, {k} to {n}"
    p = gemm_problem(ops, experts, rows, k, n)
    bf16 = torch.bfloat16
    operations = 2.0 * experts * rows * k * n
    bench.dense.clear()

    def run(kernel: str, by: str, call: Call, kind: str) -> None:
        # The operands together are much larger than L2 already.
        bench.run(kernel, by, shape, lambda: call, ROTATED_BYTES, 0, operations, kind)

    run("dense FP8 1x128, 128x128", "cuBLAS", partial(dense_fp8, p.x8[GEMM_READY], p.w8), "FP8")
    run("dense bf16", "cuBLAS", partial(torch.matmul, p.x, p.w[0].t()), "bf16")
    run("dense bf16 wgrad", "cuBLAS", partial(torch.matmul, p.dy.t(), p.x), "bf16 wgrad")
    for layout in Layout:
        call = partial(ops.grouped_gemm, p.x8[layout], p.w8, p.offsets, bf16)
        run(f"grouped_gemm {layout.name}", "ours", call, "FP8")
    dgrad = partial(ops.grouped_gemm, p.dy8, p.w8_t, p.offsets, bf16)
    run("grouped_gemm dgrad", "ours", dgrad, "FP8")
    if deep_gemm:
        experts_of_rows = torch.arange(experts, device="cuda", dtype=torch.int32)
        experts_of_rows = experts_of_rows.repeat_interleave(rows)
        aligned = deep_gemm.get_mn_major_tma_aligned_tensor(p.x8[COMPACT].scale_inv)
        for name, scales in (("COMPACT", p.x8[COMPACT].scale_inv), ("its own", aligned)):
            x8 = (p.x8[COMPACT].data, scales)
            call = partial(deep_gemm_forward, deep_gemm, x8, p.w8, experts_of_rows)
            run(f"grouped_gemm {name}", "DeepGEMM", call, "FP8")
        got = deep_gemm_forward(deep_gemm, x8, p.w8, experts_of_rows)
        want = ops.grouped_gemm(p.x8[COMPACT], p.w8, p.offsets, bf16)
        error = float((got - want).float().norm() / want.float().norm())
        print(f"DeepGEMM and ours differ by {error:.1e}, relative, Frobenius")
        assert error < 0.01, "DeepGEMM computed something else"
    run("grouped_mm", "PyTorch", partial(ops.grouped_mm, p.x, p.w, p.offsets), "bf16")
    wgrad = "bf16 wgrad"
    for dtype in (bf16, torch.float32):
        call = partial(ops.grouped_mm_wgrad, p.dy, p.x, p.offsets, dtype)
        run(f"grouped_mm_wgrad to {dtype}", "ours", call, wgrad)
    run("grouped_mm_wgrad", "PyTorch", partial(_pytorch_wgrad, p.dy, p.x, p.offsets), wgrad)
    for name, dy, x in (("x FP8", p.dy, p.x8[COMPACT]), ("dy FP8", p.dy8, p.x)):
        call = partial(ops.grouped_wgrad, dy, x, p.offsets, bf16)
        run(f"grouped_wgrad {name}", "ours", call, wgrad)
    fp8_wgrad = partial(ops.grouped_gemm_wgrad, p.dy8_t, p.x8_t, p.offsets, bf16)
    run("grouped_gemm_wgrad", "ours", fp8_wgrad, "FP8")
    if te:
        linear = te.TELinear(ops)
        w, _ = linear.prepare_weights(p.w, bf16)
        forward = partial(linear.forward, p.x, w, p.offsets, bf16)
        forward()  # asks for the segments once
        run("quantize both, forward", "TE", forward, "FP8")
    if te_grouped:
        for dtype in (bf16, torch.float32):
            call = partial(te_grouped.grouped_mm_wgrad, p.dy, p.x, p.offsets, dtype)
            run(f"grouped_mm_wgrad to {dtype}", "TE", call, wgrad)
        call = partial(te_grouped.grouped_wgrad, p.dy8, p.x8[COMPACT], p.offsets, bf16)
        run("dequantize, grouped_mm_wgrad", "TE", call, wgrad)
        linear = te_grouped.TEGroupedLinear(ops)
        w, w_t = linear.prepare_weights(p.w, bf16)
        _, x_kept = linear.forward(p.x, w, p.offsets, bf16)
        _, dy_kept = linear.forward(p.dy, w_t, p.offsets, bf16)
        for dtype in (bf16, torch.float32):
            call = partial(linear.wgrad, dy_kept, x_kept, p.offsets, dtype)
            run(f"grouped_gemm_wgrad to {dtype}", "TE", call, "FP8")


def _pytorch_wgrad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(dy.t(), x, offs=offsets[1:].to(torch.int32))


def deep_gemm_forward(
    deep_gemm: ModuleType, x: tuple[Tensor, Tensor], w: BlockScaledWeights, experts_of_rows: Tensor
) -> Tensor:
    """DeepGEMM's forward GEMM of rows that lie together by expert; `experts_of_rows` int32 [P]."""
    y = torch.empty(len(x[0]), w.data.shape[1], device="cuda", dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(x, (w.data, w.scale_inv), y, experts_of_rows)
    return y


def dense_fp8(x: BlockScaledTensor, w: BlockScaledWeights) -> Tensor:
    """All rows by the first expert's weights: cuBLAS, scales as it wants them."""
    return torch._scaled_mm(
        x.data, w.data[0].t(), scale_a=x.row_scales, scale_b=w.scale_inv[0].t(),
        out_dtype=torch.bfloat16,
    )  # fmt: skip


def tune(ops: ModuleType) -> None:
    """Try settings of the FP8 grouped GEMM: TFLOP/s for each of `GEMMS`."""
    from models.fp8.kernels.grouped_gemm import Tiling, grouped_gemm_tiled

    base = Tiling()
    small = replace(base, rows=64, warps=4, per_sm=2)
    candidates = [
        base, replace(base, group=4), replace(base, group=16), replace(base, stages=5),
        replace(base, stages=3), replace(base, flatten=True), replace(base, warps=4, stages=3),
        small, replace(small, flatten=True), replace(small, per_sm=3, stages=3),
        replace(small, stages=3), replace(small, group=16),
    ]  # fmt: skip
    problems = [(shape, gemm_problem(ops, *shape)) for shape in GEMMS]
    for tiling in candidates:
        speeds = []
        for (experts, rows, k, n), p in problems:
            args = (p.x8[COMPACT], p.w8, p.offsets, torch.bfloat16, tiling)
            try:
                times = time_us(partial(partial, grouped_gemm_tiled, *args), ROTATED_BYTES)
                speeds.append(2e-6 * experts * rows * k * n / statistics.median(times))
            except Exception as error:  # out of shared memory, for one
                print(f"  {type(error).__name__}: {str(error)[:80]}")
                speeds.append(0.0)
        print("  ".join(f"{speed:6.0f}" for speed in speeds), " TFLOP/s ", tiling, flush=True)


def find_te() -> ModuleType | None:
    """Our operations by TransformerEngine, where it can be loaded."""
    try:
        from models.fp8 import te
    except Exception as error:
        print(f"without TransformerEngine: {type(error).__name__}: {error}")
        return None
    return te


def find_te_grouped(te: ModuleType | None) -> ModuleType | None:
    """TransformerEngine's GEMMs of all experts in one launch, where the cuBLAS loaded has them."""
    if te is None:
        return None
    from models.fp8 import te_grouped

    return te_grouped if te_grouped.is_supported() else None


def find_deep_gemm() -> ModuleType | None:
    """DeepGEMM itself, where it can be loaded."""
    try:
        import deep_gemm
    except Exception as error:
        print(f"without DeepGEMM: {type(error).__name__}: {error}")
        return None
    return deep_gemm


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--only", default="", help="only kernels whose line has this text")
    parser.add_argument("--tune", action="store_true", help="try settings of the FP8 GEMM")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        print("needs a GPU of compute capability 9.0 or newer", file=sys.stderr)
        return 1
    from models.fp8 import kernels as ops

    torch.manual_seed(0)
    if args.tune:
        tune(ops)
        return 0
    te, deep_gemm = find_te(), find_deep_gemm()
    te_grouped = find_te_grouped(te)
    bench = Bench(args.only)
    for rows, cols in SIZES:
        bench_memory_bound(bench, ops, te, rows, cols)
    for experts, rows, k, n in GEMMS:
        bench_weights(bench, ops, experts, n, k)
        bench_gemms(bench, ops, te, te_grouped, deep_gemm, experts, rows, k, n)
    bench_optimizer(bench, ops, *UP_PROJECTION)
    if args.out:
        config = {
            "calls": CALLS,
            "rotated_mib": ROTATED_BYTES // 2**20,
            "plan": "8 slots a token, 2 of them local on average, 32 experts",
        }
        origin = describe_machine(torch.device("cuda", 0))
        write_json(args.out, {**origin, "config": config, "rows": bench.rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
