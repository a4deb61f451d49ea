"""Kernels on tensors of more than 2^31 elements, whose places no longer fit into 32 bits.

What a kernel makes of the last rows must be what it makes of these rows alone.
"""

import gc
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from models.fp8 import kernels
from models.fp8.reference.adamw import AdamWStep
from models.fp8.tensor import E4M3, BlockScaledTensor, Layout
from tests.models.test_kernels_numbers import bits

pytestmark = pytest.mark.gpu

COLS = 16_384
ROWS = 2**31 // COLS + 2048
LAST = 1024


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    if torch.cuda.mem_get_info()[1] < 70 * 2**30:
        pytest.skip("needs a GPU of 80 GB")
    yield
    gc.collect()
    torch.cuda.empty_cache()


def rows(dtype: torch.dtype = torch.bfloat16, cols: int = COLS) -> torch.Tensor:
    """Large, and random in its last rows."""
    x = torch.zeros(ROWS, cols, dtype=dtype, device="cuda")
    x[-LAST:].copy_(torch.randn(LAST, cols, device="cuda"))
    return x


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(bits(got.contiguous()), bits(want))


@pytest.mark.parametrize("layout", Layout)
def test_quantize_and_back(layout):
    x = rows()
    q, alone = kernels.quantize(x, layout), kernels.quantize(x[-LAST:], layout)
    assert same(q.data[-LAST:], alone.data)
    assert same(q.row_scales[-LAST:], alone.row_scales.contiguous())
    if layout is Layout.COMPACT:
        del x
        back = kernels.dequantize(q, torch.bfloat16)
        assert same(back[-LAST:], kernels.dequantize(alone, torch.bfloat16))


def test_quantize_columns():
    x = rows()
    q, alone = (kernels.quantize_columns(t, Layout.COMPACT) for t in (x, x[-LAST:]))
    assert same(q.data[:, -LAST:], alone.data)
    assert same(q.row_scales[:, -LAST // 128 :], alone.row_scales)


def test_permute_and_unpermute():
    """Words of four bytes are moved, so it takes 8 GiB to leave 32 bits."""
    x = rows(torch.float32)
    ids = torch.zeros(ROWS, 1, dtype=torch.int64, device="cuda")
    ids[-LAST:] = torch.arange(LAST, device="cuda")[:, None] % 3
    plan = kernels.plan_rows(ids, 3)
    permuted = kernels.permute(x, plan)
    places = plan.rows[-LAST:, 0]
    assert places.max() * COLS > 2**31
    assert same(permuted[places], x[-LAST:])
    del x
    assert same(kernels.unpermute(permuted, plan)[-LAST:], permuted[places])


def test_permute_scaled():
    """Bytes are moved in words of four, so it takes as many columns."""
    x = kernels.quantize(rows()[:, : COLS // 2].contiguous(), Layout.COMPACT)
    data, scale_inv = x.data.view(torch.uint8).repeat(1, 8).view(E4M3), x.scale_inv.repeat(1, 8)
    wide = BlockScaledTensor(data, scale_inv, Layout.COMPACT)  # some more than 2^33 bytes
    last_data, last_scales = wide.data[-LAST:].clone(), wide.scale_inv[-LAST:].clone()
    ids = torch.zeros(ROWS, 1, dtype=torch.int64, device="cuda")
    plan = kernels.plan_rows(ids, 1)
    moved = kernels.permute_scaled(wide, plan, Layout.GEMM_READY)
    places = plan.rows[-LAST:, 0]
    assert same(moved.data[places], last_data)
    assert same(moved.row_scales[places], last_scales)


def test_swiglu_forward_and_backward():
    h, probs = rows(), torch.rand(ROWS, device="cuda")
    got, alone = kernels.swiglu(h, probs), kernels.swiglu(h[-LAST:], probs[-LAST:])
    assert same(got[-LAST:], alone)
    da = got
    dh, dprobs = kernels.swiglu_backward(da, h, probs)
    want_dh, want_dprobs = kernels.swiglu_backward(da[-LAST:], h[-LAST:], probs[-LAST:])
    assert same(dh[-LAST:], want_dh)
    assert same(dprobs[-LAST:], want_dprobs)
    del dh
    q = kernels.swiglu_quantize(h, probs, Layout.COMPACT)
    assert same(q.data[-LAST:], kernels.swiglu_quantize(h[-LAST:], probs[-LAST:], q.layout).data)


def test_adamw():
    step = AdamWStep(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, number=1)
    w, grad, mean, square = (rows(torch.float32) for _ in range(4))
    square[-LAST:].abs_()
    w1, grad1, mean1, square1 = (t[-LAST:].clone() for t in (w, grad, mean, square))
    kernels.adamw(w, grad, mean, square, step)
    kernels.adamw(w1, grad1, mean1, square1, step)
    for got, want in ((w, w1), (mean, mean1), (square, square1)):
        assert same(got[-LAST:], want)
