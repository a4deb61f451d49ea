"""The kernels that read and write weights: their quantization and the optimizer's step."""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from models.fp8.reference.adamw import AdamWStep
from scripts.bench.kernels.timing import Bench, Call, Make


def bench_weights(bench: Bench, ops: ModuleType, experts: int, n: int, k: int) -> None:
    """Quantization of the weights of `experts` GEMMs, [N, K] each."""
    values = experts * n * k
    bench.run(
        "quantize_weights", "ours", f"{experts} x {n} x {k}",
        lambda: partial(ops.quantize_weights, random_weights(experts, n, k)),
        2 * values, 3 * values,
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


def random_weights(experts: int, n: int, k: int) -> Tensor:
    return torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16)
