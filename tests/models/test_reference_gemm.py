"""The reference's GEMMs and SwiGLU against float64."""

import pytest
import torch

from models.fp8 import reference as ops
from models.fp8.tensor import (
    BLOCK,
    BlockScaledWeights,
)
from tests.support.numbers import COMPACT, GEMM_READY, spread_randn

# GEMMs


def transposed(w):
    """Weights as dgrad takes them."""
    data, scale_inv = w.data.transpose(1, 2), w.scale_inv.transpose(1, 2)
    return BlockScaledWeights(data.contiguous(), scale_inv.contiguous())


def experts_problem(gen, empty=True):
    counts = torch.tensor([100, 0, 300, 128] if empty else [200, 56])
    segments = (counts + BLOCK - 1) // BLOCK * BLOCK
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), segments.cumsum(0)])
    real = torch.cat([torch.arange(int(s)) < c for s, c in zip(segments, counts, strict=True)])
    return offsets, real[:, None].float()


def per_expert(offsets, f):
    bounds = offsets.tolist()
    return [f(e, slice(bounds[e], bounds[e + 1])) for e in range(len(bounds) - 1)]


def assert_accumulated_in_float32(got, exact, magnitude, terms):
    """|error| <= n 2^-24 sum |x||w|, the bound of float32 accumulation in any order."""
    assert got.dtype is torch.float32
    assert ((got.double() - exact).abs() <= terms * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("empty", [True, False])
def test_grouped_gemms_against_float64(empty, gen):
    offsets, real = experts_problem(gen, empty)
    experts, rows, n, k = offsets.numel() - 1, int(offsets[-1]), 200, 136
    x = ops.quantize(torch.randn(rows, k, generator=gen) * real, COMPACT)
    dy = ops.quantize(torch.randn(rows, n, generator=gen) * real, COMPACT)
    w = ops.quantize_weights(torch.randn(experts, n, k, generator=gen))
    x64, dy64 = x.float32().double(), dy.float32().double()
    w64 = w.float32().double()

    y = ops.grouped_gemm(x, w, offsets, torch.float32)
    dx = ops.grouped_gemm(dy, transposed(w), offsets, torch.float32)
    for a, b, c, terms in ((x64, w64.mT, y, k), (dy64, w64, dx, n)):
        exact = torch.cat(per_expert(offsets, lambda e, s, a=a, b=b: a[s] @ b[e]))
        size = torch.cat(per_expert(offsets, lambda e, s, a=a, b=b: a[s].abs() @ b[e].abs()))
        assert_accumulated_in_float32(c, exact, size, terms)

    x_t, dy_t = (
        ops.quantize_columns(x.float32(), COMPACT),
        ops.quantize_columns(dy.float32(), COMPACT),
    )
    a, b = dy_t.float32().double(), x_t.float32().double().t()
    dw = ops.grouped_gemm_wgrad(dy_t, x_t, offsets, torch.float32)
    exact = torch.stack(per_expert(offsets, lambda e, s: a[:, s] @ b[s]))
    size = torch.stack(per_expert(offsets, lambda e, s: a[:, s].abs() @ b[s].abs()))
    assert_accumulated_in_float32(dw, exact, size, 384)
    if empty:
        assert (dw[1] == 0).all()
        assert exact[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_layouts_give_the_same_bits(dtype, gen):
    offsets, real = experts_problem(gen)
    x = spread_randn(gen, int(offsets[-1]), 128, octaves=3) * real
    dy = spread_randn(gen, int(offsets[-1]), 256, octaves=3) * real
    w = ops.quantize_weights(torch.randn(4, 256, 128, generator=gen))

    def all_three(layout):
        quantize, columns = ops.quantize, ops.quantize_columns
        return (
            ops.grouped_gemm(quantize(x, layout), w, offsets, dtype),
            ops.grouped_gemm(quantize(dy, layout), transposed(w), offsets, dtype),
            ops.grouped_gemm_wgrad(columns(dy, layout), columns(x, layout), offsets, dtype),
        )

    for a, b in zip(all_three(COMPACT), all_three(GEMM_READY), strict=True):
        assert a.dtype is dtype
        assert torch.equal(a, b)


def test_gemms_without_rows():
    offsets = torch.zeros(3, dtype=torch.int64)
    nothing = ops.quantize(torch.zeros(0, 128), GEMM_READY)
    columns = ops.quantize_columns(torch.zeros(0, 128), COMPACT)
    w = ops.quantize_weights(torch.ones(2, 128, 128))
    assert ops.grouped_gemm(nothing, w, offsets, torch.bfloat16).shape == (0, 128)
    assert ops.grouped_gemm(nothing, transposed(w), offsets, torch.bfloat16).shape == (0, 128)
    dw = ops.grouped_gemm_wgrad(columns, columns, offsets, torch.float32)
    assert torch.equal(dw, torch.zeros(2, 128, 128))


def test_rows_after_the_last_experts_are_not_read(gen):
    """Where there was room for more than came: what lies there is NaN here."""
    offsets, _ = experts_problem(gen)
    end = int(offsets[-1])
    w = torch.randn(offsets.numel() - 1, 128, 256, generator=gen)
    x, dy = (torch.full((end + 192, n), torch.nan) for n in (256, 128))
    for t in (x, dy):
        t[:end] = torch.randn(end, t.shape[1], generator=gen)
    y = ops.grouped_mm(x, w, offsets)
    assert torch.equal(y[:end], ops.grouped_mm(x[:end], w, offsets))
    assert not y[end:].any()
    dw = ops.grouped_mm_wgrad(dy, x, offsets, torch.float32)
    assert torch.equal(dw, ops.grouped_mm_wgrad(dy[:end], x[:end], offsets, torch.float32))


def test_gemms_refuse_offsets_that_do_not_fit(gen):
    x = ops.quantize(torch.randn(128, 128, generator=gen), COMPACT)
    w = ops.quantize_weights(torch.randn(2, 128, 128, generator=gen))
    for bad in ([0, 128], [0, 64, 129], [1, 64, 128]):
        with pytest.raises(ValueError, match="do not fit"):
            ops.grouped_gemm(x, w, torch.tensor(bad), torch.float32)
    with pytest.raises(ValueError, match="multiples of 128"):
        ops.grouped_gemm_wgrad(x, x, torch.tensor([0, 64, 128]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_plain_grouped_matmuls(dtype, gen):
    offsets, real = experts_problem(gen)
    rows = int(offsets[-1])
    x = (torch.randn(rows, 48, generator=gen) * real).to(dtype)
    dy = (torch.randn(rows, 72, generator=gen) * real).to(dtype)
    w = torch.randn(4, 72, 48, generator=gen).to(dtype)
    y = torch.cat(per_expert(offsets, lambda e, s: x[s] @ w[e].t()))
    dx = torch.cat(per_expert(offsets, lambda e, s: dy[s] @ w[e]))
    dw = torch.stack(per_expert(offsets, lambda e, s: dy[s].t() @ x[s]))
    for got, expected in (
        (ops.grouped_mm(x, w, offsets), y),
        (ops.grouped_mm(dy, w.transpose(1, 2), offsets), dx),
        (ops.grouped_mm_wgrad(dy, x, offsets, dy.dtype), dw),
    ):
        assert got.dtype is dtype
        assert torch.equal(got, expected)


def test_wgrad_operands_must_agree():
    with pytest.raises(ValueError, match="rows"):
        ops.grouped_mm_wgrad(
            torch.zeros(4, 2), torch.zeros(3, 2), torch.tensor([0, 4]), torch.float32
        )


# SwiGLU


def swiglu64(h, probs):
    gate, up = h.chunk(2, dim=1)
    return gate / (1 + torch.exp(-gate)) * up * probs[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu(dtype, gen):
    h = (torch.randn(50, 96, generator=gen) * 4).to(dtype)
    probs = torch.rand(50, generator=gen)
    exact = swiglu64(h.double(), probs.double())
    got = ops.swiglu(h, probs)
    assert got.dtype is dtype
    # Half a unit of the result's last place, and a few of float32 before it.
    tolerance = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    assert ((got.double() - exact).abs() <= tolerance * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu_backward(dtype, gen):
    h = (torch.randn(50, 96, generator=gen) * 4).to(dtype)
    da = torch.randn(50, 48, generator=gen).to(dtype)
    probs = torch.rand(50, generator=gen)
    h64, probs64 = h.double().requires_grad_(), probs.double().requires_grad_()
    swiglu64(h64, probs64).backward(da.double())
    dh, dprobs = ops.swiglu_backward(da, h, probs)
    assert (dh.dtype, dprobs.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(
        dh.double(), h64.grad, rtol=max(torch.finfo(dtype).eps, 2e-6), atol=1e-5
    )
    torch.testing.assert_close(dprobs.double(), probs64.grad, rtol=1e-5, atol=1e-4)


def test_swiglu_of_padding_is_zero():
    h, probs = torch.zeros(2, 8), torch.zeros(2)
    assert (ops.swiglu(h, probs) == 0).all()
    dh, dprobs = ops.swiglu_backward(torch.zeros(2, 4), h, probs)
    assert (dh == 0).all()
    assert (dprobs == 0).all()
