"""Grouped GEMMs against sums in float64, within what each way of adding up may be off by."""

from itertools import pairwise
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from models.fp8 import kernels as ops
from models.fp8 import reference
from models.fp8.kernels.grouped_gemm import Tiling, grouped_gemm_tiled
from models.fp8.kernels.grouped_mm import as_bf16
from models.fp8.kernels.quantize import values
from models.fp8.linear import DirectLinear, Fp8Linear, HighPrecisionLinear
from models.fp8.tensor import BLOCK, Layout
from tests.models.test_kernels_numbers import DEVICES, generator, set_up

pytestmark = pytest.mark.parametrize("device", DEVICES)

COUNTS = {  # rows of each expert, padding left out
    "ragged": [100, 0, 300, 128, 1],
    "one gets all": [0, 0, 257, 0],
    "one expert": [130],
    "one with several blocks": [500],
    "no rows": [0, 0, 0],
    "last ones empty": [128, 129, 0, 0],
}
HALF_ULP = 2.0**-8
"""bfloat16: half the distance of neighbours is at most 2^-8 of the smaller."""


@pytest.fixture(autouse=True)
def prepared(monkeypatch, request):
    set_up(monkeypatch, request.node.callspec.params["device"])


@pytest.fixture(params=["kernels", "cuBLAS"])
def bf16(device, request) -> ModuleType:
    """What multiplies bfloat16: `kernels/`, and cuBLAS where it is new enough."""
    if request.param == "kernels":
        return ops
    if device == "cpu":
        pytest.skip("needs a GPU")
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")
    from models.fp8 import te, te_grouped

    if not te_grouped.is_supported():
        pytest.skip(te.NEWER_CUBLAS)
    return te_grouped


def segments(kind, device):
    counts = torch.tensor(COUNTS[kind])
    sizes = (counts + BLOCK - 1) // BLOCK * BLOCK
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    real = [torch.arange(int(s)) < c for s, c in zip(sizes, counts, strict=True)]
    return offsets.to(device), torch.cat(real)[:, None].float()


def rows_of(real, cols, device, dtype=torch.float32):
    """Random rows, each of a size of its own; zeros in padding."""
    gen = generator()
    x = torch.randn(real.shape[0], cols, generator=gen)
    size = torch.exp2(torch.randint(-3, 4, (real.shape[0], 1), generator=gen).float())
    return (x * size * real).to(dtype).to(device)


def weights(experts, n, k, device, dtype=torch.float32):
    gen = generator()
    w = torch.randn(experts, n, k, generator=gen)
    w *= torch.exp2(torch.randint(-3, 4, (experts, -(-n // 128), -(-k // 128)), generator=gen)
                    .float().repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :n, :k]
                    )  # fmt: skip
    return w.to(dtype).to(device)


def float64(t):
    return (t if isinstance(t, torch.Tensor) else t.float32()).double()


def product(x, w, offsets, spread=torch.Tensor.clone):
    """`x @ w.T` expert by expert in float64; with `spread=abs`, of the magnitudes."""
    bounds = offsets.tolist()
    out = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64, device=x.device)
    for e in range(w.shape[0]):
        part = slice(bounds[e], bounds[e + 1])
        out[part] = spread(x[part]) @ spread(w[e]).t()
    return out


def sum_over_rows(dy, x, offsets, spread=torch.Tensor.clone):
    bounds = offsets.tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    return torch.stack([spread(dy[p]).t() @ spread(x[p]) for p in parts])


def assert_close(got, exact, magnitude, terms, tensor_core_bits=24):
    """Rounded once to bfloat16, after `terms` additions in float32.

    A GPU's tensor cores do worse than float32 on FP8: they line 32 products, and what they are
    added to, up with the largest and cut off what is below 2^-13 of it, four times in a block of
    128. That is allowed for as eight times 2^-13 of all magnitudes, and where both operands have
    scales along the sum, as twice that: up to 0.9 of the former was seen there.
    """
    error = (got.double() - exact).abs()
    bound = terms * 2.0**-24 * magnitude
    if tensor_core_bits < 24:
        bound = bound + 2.0 ** (3 - tensor_core_bits) * magnitude
    rounding = 0.0 if got.dtype is torch.float32 else HALF_ULP
    assert got.isfinite().all()
    assert (error <= bound + rounding * (exact.abs() + bound)).all()
    if exact.abs().max() > 0:
        assert error.norm() <= 3e-3 * exact.norm()


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(256, 384), (128, 128), (208, 176)])
def test_grouped_gemm(device, kind, layout, out_dtype, n, k):
    offsets, real = segments(kind, device)
    x = reference.quantize(rows_of(real, k, device), layout)
    w = reference.quantize_weights(weights(len(COUNTS[kind]), n, k, device))
    y = ops.grouped_gemm(x, w, offsets, out_dtype)
    assert (y.shape, y.dtype) == ((real.shape[0], n), out_dtype)
    if real.shape[0]:
        a, b = float64(x), float64(w)
        exact, size = product(a, b, offsets), product(a, b, offsets, torch.abs)
        assert_close(y, exact, size, k, 13 if device == "cuda" else 24)


@pytest.mark.parametrize("tiling", [
    Tiling(rows=128, warps=8, per_sm=1), Tiling(flatten=False, group=1),
])  # fmt: skip
def test_tilings_agree(device, tiling):
    """The same sums in the same order, whatever the tiles."""
    offsets, real = segments("ragged", device)
    x = reference.quantize(rows_of(real, 512, device), Layout.COMPACT)
    w = reference.quantize_weights(weights(5, 384, 512, device))
    expected = ops.grouped_gemm(x, w, offsets, torch.float32)
    got = grouped_gemm_tiled(x, w, offsets, torch.float32, tiling)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_layouts_agree_bit_for_bit(device):
    offsets, real = segments("ragged", device)
    x = rows_of(real, 384, device)
    w = reference.quantize_weights(weights(5, 256, 384, device))
    a, b = (
        ops.grouped_gemm(reference.quantize(x, layout), w, offsets, torch.bfloat16)
        for layout in Layout
    )
    assert torch.equal(a, b)


def test_rows_after_the_last_segment_do_no_harm(device):
    """As when the plan has only a bound for P."""
    offsets, real = segments("ragged", device)
    x = rows_of(real, 256, device)
    more = torch.cat([x, torch.full((256, 256), torch.nan, device=device)])
    w = reference.quantize_weights(weights(5, 128, 256, device))
    y = ops.grouped_gemm(reference.quantize(more, Layout.COMPACT), w, offsets, torch.bfloat16)
    expected = ops.grouped_gemm(reference.quantize(x, Layout.COMPACT), w, offsets, torch.bfloat16)
    assert torch.equal(y[: x.shape[0]], expected)


def test_grouped_gemm_with_transposed_weights(device):
    """dgrad: what `quantize_weights_both_ways` gives for the backward pass."""
    offsets, real = segments("ragged", device)
    dy = reference.quantize(rows_of(real, 256, device), Layout.COMPACT)
    w, transposed = reference.quantize_weights_both_ways(
        weights(5, 256, 384, device), torch.float32
    )
    dx = ops.grouped_gemm(dy, transposed, offsets, torch.bfloat16)
    a, b = float64(dy), float64(w).transpose(1, 2)
    exact, size = product(a, b, offsets), product(a, b, offsets, torch.abs)
    assert_close(dx, exact, size, 256, 13 if device == "cuda" else 24)


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("scaled", ["dy", "x", "both", "neither"])
@pytest.mark.parametrize(("n", "k"), [(256, 384), (384, 128), (128, 256)])
def test_grouped_wgrad(device, bf16, kind, layout, scaled, n, k):
    offsets, real = segments(kind, device)
    dy = rows_of(real, n, device, torch.bfloat16)
    x = rows_of(real, k, device, torch.bfloat16)
    if scaled in ("dy", "both"):
        dy = reference.quantize(dy, layout)
    if scaled in ("x", "both"):
        x = reference.quantize(x, layout)
    dw = bf16.grouped_wgrad(dy, x, offsets, torch.bfloat16)
    a, b = float64(dy), float64(x)
    assert (dw.shape, dw.dtype) == ((len(COUNTS[kind]), n, k), torch.bfloat16)
    exact, size = sum_over_rows(a, b, offsets), sum_over_rows(a, b, offsets, torch.abs)
    assert_close(dw, exact, size, 2 * max(COUNTS[kind]) + 256)
    for expert, count in enumerate(COUNTS[kind]):
        assert count or (dw[expert] == 0).all()


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("end", [0, 1, 128, 255, 256])
def test_rows_after_the_last_expert_are_not_dequantized(device, layout, end):
    x = reference.quantize(rows_of(torch.ones(256, 1), 384, device, torch.bfloat16), layout)
    got = as_bf16(x, torch.tensor([0, end // 2, end], device=device))
    assert torch.equal(got[:end], values(x, torch.bfloat16)[:end])
    assert got[end:].isnan().all(), "not written"


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(256, 384), (200, 264), (8, 8)])
def test_grouped_mm_wgrad(device, bf16, kind, dtype, n, k):
    """Also where tiles end beyond the matrix, which must not write the next expert's."""
    offsets, real = segments(kind, device)
    dy, x = (rows_of(real, size, device, torch.bfloat16) for size in (n, k))
    dw = bf16.grouped_mm_wgrad(dy, x, offsets, dtype)
    assert (dw.shape, dw.dtype) == ((len(COUNTS[kind]), n, k), dtype)
    a, b = float64(dy), float64(x)
    exact, size = sum_over_rows(a, b, offsets), sum_over_rows(a, b, offsets, torch.abs)
    assert_close(dw, exact, size, 2 * max(COUNTS[kind]) + 256)
    for expert, count in enumerate(COUNTS[kind]):
        assert count or (dw[expert] == 0).all()


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("layouts", [list(Layout), list(Layout)[::-1]])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_grouped_gemm_wgrad(device, kind, layouts, out_dtype):
    offsets, real = segments(kind, device)
    n, k = 256, 176
    dy_t = reference.quantize_columns(rows_of(real, n, device), layouts[0])
    x_t = reference.quantize_columns(rows_of(real, k, device), layouts[1])
    dw = ops.grouped_gemm_wgrad(dy_t, x_t, offsets, out_dtype)
    assert (dw.shape, dw.dtype) == ((len(COUNTS[kind]), n, k), out_dtype)
    a, b = float64(dy_t).t(), float64(x_t).t()
    terms = max(COUNTS[kind]) + 128
    assert_close(
        dw, sum_over_rows(a, b, offsets), sum_over_rows(a, b, offsets, torch.abs), terms,
        12 if device == "cuda" else 24,
    )  # fmt: skip
    for expert, count in enumerate(COUNTS[kind]):
        assert count or (dw[expert] == 0).all()


@pytest.mark.parametrize("kind", COUNTS)
def test_grouped_mm(device, bf16, kind):
    """PyTorch's own and cuBLAS's: called right, through transposed views and for no rows too."""
    offsets, real = segments(kind, device)
    n, k = 256, 128
    x, dy = (rows_of(real, size, device, torch.bfloat16) for size in (k, n))
    w = weights(len(COUNTS[kind]), n, k, device, torch.bfloat16)
    y = bf16.grouped_mm(x, w, offsets)
    dx = bf16.grouped_mm(dy, w.transpose(1, 2), offsets)
    dw = bf16.grouped_mm_wgrad(dy, x, offsets, torch.bfloat16)
    assert (y.shape, dx.shape, dw.shape) == (dy.shape, x.shape, w.shape)
    a, b, c = float64(x), float64(w), float64(dy)
    if real.shape[0]:
        assert_close(y, product(a, b, offsets), product(a, b, offsets, torch.abs), 2 * k)
        b = b.transpose(1, 2)
        assert_close(dx, product(c, b, offsets), product(c, b, offsets, torch.abs), 2 * n)
    assert_close(
        dw, sum_over_rows(c, a, offsets), sum_over_rows(c, a, offsets, torch.abs),
        2 * max(COUNTS[kind]) + 256,
    )  # fmt: skip


@pytest.mark.parametrize("layer", [HighPrecisionLinear, Fp8Linear, DirectLinear])
def test_linear_layers_go_as_with_the_reference(device, layer):
    """The classes that paths use, forward and backward, by the kernels and by the reference.

    SwiGLU and the down-projection, and back through both, from weights in float32.
    """
    offsets, real = segments("ragged", device)
    hidden, ffn = 384, 256
    h = rows_of(real, 2 * ffn, device, torch.bfloat16)
    da = rows_of(real, ffn, device, torch.bfloat16)
    probs = torch.rand(h.shape[0], device=device)
    w_down = weights(5, hidden, ffn, device, torch.float32)
    w_up = weights(5, 2 * ffn, hidden, device, torch.float32)

    def by(operations):
        linear = layer(operations)
        forward, _ = linear.prepare_weights(w_down, h.dtype)
        _, backward = linear.prepare_weights(w_up, h.dtype)
        y, kept = linear.down(h, probs, forward, offsets)
        dx, dprobs, dh_kept, a_kept = linear.up_backward(da, h, probs, kept, backward, offsets)
        return y, dx, dprobs, linear.wgrad(dh_kept, a_kept, offsets, torch.bfloat16)

    for got, expected in zip(by(ops), by(reference), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert (got.double() - expected.double()).norm() <= 4e-3 * expected.double().norm()


def test_refusals(device):
    offsets = torch.tensor([0, 128], device=device)
    x = reference.quantize(torch.zeros(128, 128, device=device), Layout.COMPACT)
    w = reference.quantize_weights(torch.zeros(1, 128, 256, device=device))
    with pytest.raises(ValueError, match="do not fit"):
        ops.grouped_gemm(x, w, offsets, torch.bfloat16)
    w = reference.quantize_weights(torch.zeros(2, 128, 128, device=device))
    with pytest.raises(ValueError, match="do not fit"):
        ops.grouped_gemm(x, w, offsets, torch.bfloat16)
    w = reference.quantize_weights(torch.zeros(1, 128, 128, device=device))
    with pytest.raises(TypeError, match="float16"):
        ops.grouped_gemm(x, w, offsets, torch.float16)


def test_refusals_of_bf16(device, bf16):
    offsets = torch.tensor([0, 128], device=device)
    rows = torch.zeros(128, 128, device=device)
    with pytest.raises(TypeError, match="bfloat16"):
        bf16.grouped_wgrad(rows, rows, offsets, torch.bfloat16)
    rows = rows.bfloat16()
    with pytest.raises(ValueError, match="rows"):
        bf16.grouped_mm_wgrad(rows, rows[:64], offsets, torch.bfloat16)
    with pytest.raises(TypeError, match="float16"):
        bf16.grouped_mm_wgrad(rows, rows, offsets, torch.float16)
    with pytest.raises(ValueError, match="do not fit"):
        bf16.grouped_mm(rows, rows.new_zeros(1, 128, 64), offsets)
    with pytest.raises(ValueError, match="2 experts need 3 offsets"):
        bf16.grouped_mm(rows, rows.new_zeros(2, 128, 128), offsets)
