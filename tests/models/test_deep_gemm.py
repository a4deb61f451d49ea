"""DeepGEMM's grouped GEMM instead of ours, on a GPU where it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.fp8 import operations, reference
from models.fp8.tensor import Layout
from tests.models.test_kernels_gemm import (
    COUNTS,
    assert_close,
    float64,
    product,
    rows_of,
    segments,
    weights,
)

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def deep_gemm():
    # First, as in a run: a DeepGEMM linked with a C++ library of its own crashes without it.
    pytest.importorskip("transformer_engine.pytorch", reason="TransformerEngine is not installed")
    pytest.importorskip("deep_gemm", reason="DeepGEMM is not installed")
    from models.fp8 import deep_gemm

    return deep_gemm


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize(("n", "k"), [(256, 384), (128, 128), (1536, 2048)])
@pytest.mark.parametrize("room", [0, 256])
def test_grouped_gemm(deep_gemm, kind, n, k, room):
    """Also with room after the last segment, where nothing is read."""
    offsets, real = segments(kind, "cuda")
    a = rows_of(real, k, "cuda")
    a = torch.cat([a, a.new_full((room, k), torch.nan)])
    x = reference.quantize(a, Layout.GEMM_READY)
    w = reference.quantize_weights(weights(len(COUNTS[kind]), n, k, "cuda"))
    y = deep_gemm.grouped_gemm(x, w, offsets, torch.bfloat16)
    assert (y.shape, y.dtype) == ((len(a), n), torch.bfloat16)
    rows = len(real)
    if rows:
        a, b = float64(x)[:rows], float64(w)
        exact, size = product(a, b, offsets), product(a, b, offsets, torch.abs)
        assert_close(y[:rows], exact, size, k, 13)


COMPILES = """
import sys
import torch
import transformer_engine.pytorch  # first, as above
from models.fp8 import deep_gemm, reference
from models.fp8.tensor import Layout

n, k = 384, 256
w = reference.quantize_weights(torch.randn(2, n, k, device="cuda").bfloat16())
for part in map(float, sys.argv[1:]):
    step = 128 * 132 if deep_gemm.TAKES_ENDS else deep_gemm.rows_step()
    rows = int(part * step) // 128 * 128
    x = reference.quantize(torch.randn(rows, k, device="cuda").bfloat16(), Layout.GEMM_READY)
    offsets = torch.tensor([0, 128, rows], device="cuda")
    deep_gemm.grouped_gemm(x, w, offsets, torch.bfloat16)
torch.cuda.synchronize()
"""


def kernels_for(folder: Path, *parts: float) -> int:
    """How many kernels are compiled where P is this many times `rows_step`."""
    environment = {**os.environ, "DG_JIT_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", COMPILES, *map(str, parts)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return len(list((folder / "cache").iterdir()))


def test_one_kernel_serves_all_numbers_of_rows_in_steps(deep_gemm, tmp_path):
    if deep_gemm.TAKES_ENDS:
        assert deep_gemm.rows_step() == 1
        assert kernels_for(tmp_path / "any", 1, 0.3, 1.4, 2.6, 7) == 1
        return
    assert deep_gemm.rows_step() % 128 == 0
    assert kernels_for(tmp_path / "in_steps", 1, 2, 3, 7) == 1
    # Otherwise there would be nothing to round up for.
    assert kernels_for(tmp_path / "as_it_is", 1, 0.3, 1.4, 2.6) > 1


def test_refusals(deep_gemm):
    offsets, real = segments("ragged", "cuda")
    x = reference.quantize(rows_of(real, 256, "cuda"), Layout.COMPACT)
    w = reference.quantize_weights(weights(5, 128, 256, "cuda"))
    with pytest.raises(ValueError, match="GEMM_READY"):
        deep_gemm.grouped_gemm(x, w, offsets, torch.bfloat16)
    x = reference.quantize(rows_of(real, 256, "cuda"), Layout.GEMM_READY)
    with pytest.raises(TypeError, match="float32"):
        deep_gemm.grouped_gemm(x, w, offsets, torch.float32)


def test_fp8_direct_takes_it_and_says_so(deep_gemm):
    chosen = operations.choose("fp8_direct", "cuda")
    assert chosen.operations.grouped_gemm is deep_gemm.grouped_gemm
    assert chosen.operations.GEMM_LAYOUT is Layout.GEMM_READY
    assert chosen.operations.rows_step is deep_gemm.rows_step
    assert "grouped_gemm by DeepGEMM" in chosen.description
    assert "DeepGEMM" not in operations.choose("fp8_direct", "cuda", variant="triton").description
    assert "DeepGEMM" not in operations.choose("fp8_compact", "cuda").description
