"""The experts' GEMMs of one up-projection, forward and backward, by all who have one."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fp8.tensor import BlockScaledTensor, BlockScaledWeights, Layout
from scripts.bench.kernels.peers import Peers
from scripts.bench.kernels.timing import ROTATED_BYTES, Bench, Call, time_us
from scripts.bench.kernels.weights import random_weights

GEMMS = [(64, 1024, 2048, 2048), (32, 2048, 2048, 1536), (16, 4096, 7168, 4096)]
"""Experts, rows of each, K and N."""
COMPACT, GEMM_READY = Layout.COMPACT, Layout.GEMM_READY
BF16 = torch.bfloat16
WGRAD = "bf16 wgrad"
"""Kind of dense GEMM that weight gradients in BF16 are compared with."""


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
    w = random_weights(experts, n, k)
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


Run = Callable[[str, str, Call, str], None]
"""Times a kernel, by whom, its call, and the kind of dense GEMM that it is compared with."""


def bench_gemms(
    bench: Bench, ops: ModuleType, peers: Peers, experts: int, rows: int, k: int, n: int
) -> None:
    """All of them at one size: `experts` experts, `rows` rows for each, from `k` to `n` columns."""
    shape = f"{experts} x {rows}, {k} to {n}"
    p = gemm_problem(ops, experts, rows, k, n)
    operations = 2.0 * experts * rows * k * n
    bench.dense.clear()

    def run(kernel: str, by: str, call: Call, kind: str) -> None:
        # The operands together are much larger than L2 already.
        bench.run(kernel, by, shape, lambda: call, ROTATED_BYTES, 0, operations, kind)

    _dense(run, p)
    _fp8(run, ops, p)
    if peers.deep_gemm:
        _deep_gemm(run, ops, peers.deep_gemm, p)
    _bf16_and_wgrads(run, ops, p)
    if peers.te:
        _te(run, ops, peers.te, p)
    if peers.te_grouped:
        _te_grouped(run, ops, peers.te_grouped, p)


def _dense(run: Run, p: GemmProblem) -> None:
    """As many operations in one GEMM by cuBLAS, which the others are compared with."""
    run("dense FP8 1x128, 128x128", "cuBLAS", partial(dense_fp8, p.x8[GEMM_READY], p.w8), "FP8")
    run("dense bf16", "cuBLAS", partial(torch.matmul, p.x, p.w[0].t()), "bf16")
    run("dense bf16 wgrad", "cuBLAS", partial(torch.matmul, p.dy.t(), p.x), WGRAD)


def _fp8(run: Run, ops: ModuleType, p: GemmProblem) -> None:
    for layout in Layout:
        call = partial(ops.grouped_gemm, p.x8[layout], p.w8, p.offsets, BF16)
        run(f"grouped_gemm {layout.name}", "ours", call, "FP8")
    dgrad = partial(ops.grouped_gemm, p.dy8, p.w8_t, p.offsets, BF16)
    run("grouped_gemm dgrad", "ours", dgrad, "FP8")


def _deep_gemm(run: Run, ops: ModuleType, deep_gemm: ModuleType, p: GemmProblem) -> None:
    """Also checks it against ours."""
    experts_of_rows = torch.arange(len(p.w), device="cuda", dtype=torch.int32)
    experts_of_rows = experts_of_rows.repeat_interleave(len(p.x) // len(p.w))
    aligned = deep_gemm.get_mn_major_tma_aligned_tensor(p.x8[COMPACT].scale_inv)
    for name, scales in (("COMPACT", p.x8[COMPACT].scale_inv), ("its own", aligned)):
        x8 = (p.x8[COMPACT].data, scales)
        call = partial(deep_gemm_forward, deep_gemm, x8, p.w8, experts_of_rows)
        run(f"grouped_gemm {name}", "DeepGEMM", call, "FP8")
    got = deep_gemm_forward(deep_gemm, x8, p.w8, experts_of_rows)
    want = ops.grouped_gemm(p.x8[COMPACT], p.w8, p.offsets, BF16)
    error = float((got - want).float().norm() / want.float().norm())
    print(f"DeepGEMM and ours differ by {error:.1e}, relative, Frobenius")
    assert error < 0.01, "DeepGEMM computed something else"


def _bf16_and_wgrads(run: Run, ops: ModuleType, p: GemmProblem) -> None:
    run("grouped_mm", "PyTorch", partial(ops.grouped_mm, p.x, p.w, p.offsets), "bf16")
    for dtype in (BF16, torch.float32):
        call = partial(ops.grouped_mm_wgrad, p.dy, p.x, p.offsets, dtype)
        run(f"grouped_mm_wgrad to {dtype}", "ours", call, WGRAD)
    run("grouped_mm_wgrad", "PyTorch", partial(_pytorch_wgrad, p.dy, p.x, p.offsets), WGRAD)
    for name, dy, x in (("x FP8", p.dy, p.x8[COMPACT]), ("dy FP8", p.dy8, p.x)):
        call = partial(ops.grouped_wgrad, dy, x, p.offsets, BF16)
        run(f"grouped_wgrad {name}", "ours", call, WGRAD)
    fp8_wgrad = partial(ops.grouped_gemm_wgrad, p.dy8_t, p.x8_t, p.offsets, BF16)
    run("grouped_gemm_wgrad", "ours", fp8_wgrad, "FP8")


def _pytorch_wgrad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(dy.t(), x, offs=offsets[1:].to(torch.int32))


def _te(run: Run, ops: ModuleType, te: ModuleType, p: GemmProblem) -> None:
    linear = te.TELinear(ops)
    w, _ = linear.prepare_weights(p.w, BF16)
    forward = partial(linear.forward, p.x, w, p.offsets, BF16)
    forward()  # asks for the segments once
    run("quantize both, forward", "TE", forward, "FP8")


def _te_grouped(run: Run, ops: ModuleType, te_grouped: ModuleType, p: GemmProblem) -> None:
    for dtype in (BF16, torch.float32):
        call = partial(te_grouped.grouped_mm_wgrad, p.dy, p.x, p.offsets, dtype)
        run(f"grouped_mm_wgrad to {dtype}", "TE", call, WGRAD)
    call = partial(te_grouped.grouped_wgrad, p.dy8, p.x8[COMPACT], p.offsets, BF16)
    run("dequantize, grouped_mm_wgrad", "TE", call, WGRAD)
    linear = te_grouped.TEGroupedLinear(ops)
    w, w_t = linear.prepare_weights(p.w, BF16)
    _, x_kept = linear.forward(p.x, w, p.offsets, BF16)
    _, dy_kept = linear.forward(p.dy, w_t, p.offsets, BF16)
    for dtype in (BF16, torch.float32):
        call = partial(linear.wgrad, dy_kept, x_kept, p.offsets, dtype)
        run(f"grouped_gemm_wgrad to {dtype}", "TE", call, "FP8")


def deep_gemm_forward(
    deep_gemm: ModuleType, x: tuple[Tensor, Tensor], w: BlockScaledWeights, experts_of_rows: Tensor
) -> Tensor:
    """DeepGEMM's forward GEMM of rows that lie together by expert; `experts_of_rows` int32 [P].

    The call that all versions take. Paths tell version 2.6 where rows end
    (models/fp8/deep_gemm.py), which is the same work here, where every row is an expert's.
    """
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
