"""The benchmark of single kernels, without a GPU: what it calls and with how many bytes."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from models.fp8 import reference
from scripts.bench.kernels import __main__ as command
from scripts.bench.kernels.gemms import bench_gemms
from scripts.bench.kernels.memory_bound import bench_memory_bound
from scripts.bench.kernels.peers import Peers
from scripts.bench.kernels.timing import Bench
from scripts.bench.kernels.weights import bench_optimizer, bench_weights

OPS: Any = reference
ROWS, COLS = 256, 384
EXPERTS, PER_EXPERT, N, K = 4, 128, 384, 256


class OnACpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Recorded(Bench):
    """Calls each kernel once instead of timing it."""

    def __init__(self) -> None:
        super().__init__("")
        self.found: dict[tuple[str, str], SimpleNamespace] = {}

    def run(
        self, kernel, by, shape, make, input_bytes, moved_bytes=0, operations=0, kind=""
    ) -> None:
        result = None if kernel.startswith("dense FP8") else make()()  # cuBLAS's, on a GPU alone
        self.found[kernel, by] = SimpleNamespace(
            result=result, input_bytes=input_bytes, moved_bytes=moved_bytes,
            operations=operations, kind=kind,
        )  # fmt: skip


def test_where_it_cannot_write_it_measures_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["kernels", "--out", str(tmp_path / "file" / "a.json")])
    assert command.main() == 2
    assert capsys.readouterr().err == (
        f"error: --out {tmp_path / 'file' / 'a.json'} cannot be written: Not a directory\n"
    )


@pytest.fixture
def bench():
    torch.manual_seed(0)
    with OnACpu():
        yield Recorded()


def test_bytes_of_memory_bound_kernels(bench):
    bench_memory_bound(bench, OPS, OPS, ROWS, COLS)
    values = ROWS * COLS
    scales = values // 128 * 4
    assert next(iter(bench.found)) == ("copy", "PyTorch"), "others are compared with it"
    moved = {key: one.moved_bytes for key, one in bench.found.items()}
    assert moved["copy", "PyTorch"] == 2 * values + 2 * values
    for kernel in ("quantize COMPACT", "quantize GEMM_READY", "quantize_columns", "dequantize"):
        assert moved[kernel, "ours"] == 2 * values + values + scales, kernel
    assert moved["relayout to COMPACT", "PyTorch"] == 2 * scales
    assert moved["swiglu_quantize", "ours"] == 4 * values + 4 * ROWS + values + scales
    for kernel in ("permute_scaled", "permute bf16", "unpermute bf16"):
        assert moved[kernel, "ours"] == moved[kernel, "TE"] > 0
    assert bench.found["swiglu", "ours"].result.shape == (ROWS, COLS)


def test_bytes_of_kernels_on_weights(bench):
    values = EXPERTS * N * K
    bench_weights(bench, OPS, EXPERTS, N, K)
    assert bench.found["quantize_weights", "ours"].moved_bytes == 3 * values
    bench_optimizer(bench, OPS, EXPERTS, N, K)
    # Weight, gradient and two moments are read, and all but the gradient written.
    assert bench.found["adamw", "ours"].moved_bytes == (16 + 12) * values
    assert bench.found["adamw_cast", "ours"].moved_bytes == (16 + 12 + 2) * values


def multiply(x, w, y, experts_of_rows) -> None:
    """As DeepGEMM does it."""
    data = x[0].float().unflatten(1, (-1, 128)) * x[1][..., None]
    blocks = w[1].repeat_interleave(128, 1).repeat_interleave(128, 2)
    weights = (w[0].float() * blocks)[experts_of_rows]
    y.copy_(torch.einsum("pk,pnk->pn", data.flatten(1), weights))


def deep_gemm(factor: float) -> Any:
    def scaled(x, w, y, experts_of_rows) -> None:
        multiply(x, w, y, experts_of_rows)
        y.mul_(factor)

    return SimpleNamespace(
        get_mn_major_tma_aligned_tensor=lambda scales: scales,
        m_grouped_fp8_gemm_nt_contiguous=scaled,
    )


def test_gemms_of_all_peers_have_the_operations_of_one(bench, capsys):
    peers = Peers(deep_gemm=deep_gemm(1.0))
    bench_gemms(bench, OPS, peers, EXPERTS, PER_EXPERT, K, N)
    assert "DeepGEMM and ours differ by" in capsys.readouterr().out
    dense = {one.kind for (_, by), one in bench.found.items() if by == "cuBLAS"}
    assert dense == {"FP8", "bf16", "bf16 wgrad"}, "a GEMM is compared with one of another kind"
    for (kernel, _), one in bench.found.items():
        assert one.operations == 2 * EXPERTS * PER_EXPERT * K * N, kernel
        assert one.kind in dense, kernel
    for by in ("ours", "DeepGEMM"):
        shape = bench.found["grouped_gemm COMPACT", by].result.shape
        assert shape == (EXPERTS * PER_EXPERT, N), by
    assert bench.found["grouped_gemm_wgrad", "ours"].result.shape == (EXPERTS, N, K)


def test_a_peer_that_computes_something_else_is_found(bench):
    with pytest.raises(AssertionError, match="computed something else"):
        bench_gemms(bench, OPS, Peers(deep_gemm=deep_gemm(1.1)), EXPERTS, PER_EXPERT, K, N)
