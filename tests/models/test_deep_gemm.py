"""DeepGEMM's grouped GEMM instead of ours, on a GPU where it is installed."""

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
    assert "grouped_gemm by DeepGEMM" in chosen.description
    assert "DeepGEMM" not in operations.choose("fp8_direct", "cuda", variant="triton").description
    assert "DeepGEMM" not in operations.choose("fp8_compact", "cuda").description
