"""The reference's number format against slow definitions in float64 and plain loops."""

import pytest
import torch

from models.fp8 import reference as ops
from models.fp8.tensor import (
    BLOCK,
    Layout,
    ceil_div,
)
from tests.support.numbers import (
    COMPACT,
    GEMM_READY,
    INF,
    NAN,
    assert_same,
    bits,
    check_quantize,
    decode,
    nearest_e4m3,
    slow_scale,
    spread_randn,
)

# Quantize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 256), (3, 300), (5, 1), (1, 127), (0, 256)])
def test_quantize_as_defined(dtype, shape, gen):
    check_quantize(spread_randn(gen, *shape).to(dtype))


def test_quantize_every_power_of_two_amax():
    """amax = 448 * 2^k: the quotient is exact, and any other rounding loses a whole octave."""
    exponents = torch.arange(-126, 119).double()
    x = (448 * torch.exp2(exponents)).float()[:, None]
    q = check_quantize(x)
    assert (decode(q.data) == 448).all()
    check_quantize(torch.nextafter(x, torch.tensor(INF)))  # just above: the next power of two
    check_quantize(torch.nextafter(x, torch.tensor(0.0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize_special_values(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    subnormal = 2.0**-133  # the smallest bfloat16
    largest = torch.finfo(dtype).max
    rows = [
        [0.0, 0.0, 0.0],
        [-0.0, 0.0, -0.0],
        [INF, 1.0, -500.0],
        [-INF, INF, 3.0e38],
        [NAN, 1.0, -0.3],
        [NAN, NAN, NAN],
        [NAN, 0.0, INF],
        [subnormal, -subnormal, 0.0],
        [tiny, subnormal, -3 * tiny],
        [1e-36, 1e-37, -1e-38],
        [1.3e-36, 1.4e-36, 1.2e-36],
        [largest, -largest, 1.0],
        [448.0, 449.0, 464.0],
        [1.0, 2.0**-17, 3 * 2.0**-18],  # subnormal bytes, and a tie
    ]
    q = check_quantize(torch.tensor(rows, dtype=dtype))
    assert q.scale_inv[:4, 0].tolist() == [1, 1, 1, 1]
    byte = q.data.view(torch.uint8).tolist()
    assert byte[0] == [0, 0, 0]
    assert byte[1] == [0x80, 0, 0x80]
    assert byte[2] == [0x7E, 0x38, 0xFE]  # 448, 1, -448
    assert byte[3] == [0xFE, 0x7E, 0x7E]
    assert byte[4][0] == 0x7F
    assert q.scale_inv[4] == ops.quantize(torch.tensor([[0.0, 1.0, -0.3]]), COMPACT).scale_inv[0]
    assert byte[5] == [0x7F] * 3
    assert q.scale_inv[5] == 1


def test_negative_nan_becomes_the_canonical_one():
    x = torch.full((1, 1), NAN).view(torch.int32).bitwise_or(-(2**31)).view(torch.float32)
    assert ops.quantize(x, COMPACT).data.view(torch.uint8).item() == 0x7F


def test_infinity_spoils_only_its_block(gen):
    x = torch.randn(2, 256, generator=gen)
    clean = ops.quantize(x, COMPACT)
    x[0, 5] = INF
    dirty = ops.quantize(x, COMPACT)
    assert torch.equal(bits(dirty.data)[0, BLOCK:], bits(clean.data)[0, BLOCK:])
    assert torch.equal(bits(dirty.data)[1], bits(clean.data)[1])
    assert dirty.scale_inv[0].tolist() == [1.0, clean.scale_inv[0, 1].item()]


@pytest.mark.parametrize("shape", [(0, 256), (1, 128), (5, 300), (6, 768), (8, 128)])
def test_gemm_ready_has_the_same_scales_and_zero_padding(shape, gen):
    x = spread_randn(gen, *shape)
    compact, ready = ops.quantize(x, COMPACT), ops.quantize(x, GEMM_READY)
    rows, blocks = compact.scale_inv.shape
    assert ready.scale_inv.shape == (blocks, (rows + 3) // 4 * 4)
    assert torch.equal(bits(ready.data), bits(compact.data))
    assert torch.equal(ready.scale_inv[:, :rows].t(), compact.scale_inv)
    assert (ready.scale_inv[:, rows:] == 0).all()


@pytest.mark.parametrize("layout", Layout)
def test_quantize_columns_is_quantize_of_the_transpose(layout, gen):
    x = spread_randn(gen, 200, 70).bfloat16()
    columns = ops.quantize_columns(x, layout)
    assert (columns.rows, columns.cols) == (70, 200)
    assert_same(columns, ops.quantize(x.t().contiguous(), layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(2, 256, 128), (1, 200, 300), (3, 1, 5), (2, 128, 129), (0, 128, 128)]
)
def test_quantize_weights_as_defined(dtype, shape, gen):
    w = torch.randn(*shape, generator=gen).to(dtype)
    if w.numel() > 1000:
        w[0, :BLOCK, :BLOCK] = 0
        w[-1, 0, 0] = NAN
        w[-1, -1, -1] = INF
    q = ops.quantize_weights(w)
    for e in range(shape[0]):
        for i in range(ceil_div(shape[1], BLOCK)):
            for j in range(ceil_div(shape[2], BLOCK)):
                at = (e, slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
                block = w[at].double()
                scale = slow_scale(block.flatten().tolist(), torch.finfo(dtype).max)
                assert q.scale_inv[e, i, j] == 1 / scale
                torch.testing.assert_close(
                    decode(q.data[at].contiguous()),
                    nearest_e4m3(block * scale),
                    rtol=0, atol=0, equal_nan=True,
                )  # fmt: skip


def test_quantize_weights_both_ways(gen):
    """The same values, and quantizing the transposed weights gives the same bits."""
    w = torch.randn(2, 256, 384, generator=gen)
    q, turned = ops.quantize_weights_both_ways(w, torch.bfloat16)
    for got, want in (
        (q, ops.quantize_weights(w.bfloat16())),
        (turned, ops.quantize_weights(w.bfloat16().transpose(1, 2))),
    ):
        assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(got.scale_inv, want.scale_inv)
    assert not torch.equal(q.float32(), ops.quantize_weights(w).float32()), "rounded first"


def test_quantize_refuses_what_it_was_not_made_for():
    with pytest.raises(TypeError, match="float64"):
        ops.quantize(torch.zeros(2, 128, dtype=torch.float64), COMPACT)
    with pytest.raises(ValueError, match="dimensions"):
        ops.quantize(torch.zeros(2, 2, 128), COMPACT)
    with pytest.raises(ValueError, match="dimensions"):
        ops.quantize_weights(torch.zeros(2, 128))


def test_quantize_lets_no_gradient_pass(gen):
    x = torch.randn(2, 128, generator=gen, requires_grad=True)
    q = ops.quantize(x, COMPACT)
    assert not q.data.requires_grad
    assert not q.scale_inv.requires_grad


# Dequantize


def test_round_trip_error_bound(gen):
    """1/16 of the value, or half a subnormal step, which is 2^-10 / 224 of the block's amax."""
    x = spread_randn(gen, 64, 384)
    back = ops.dequantize(ops.quantize(x, COMPACT), torch.float32)
    amax = x.view(64, 3, BLOCK).abs().amax(-1).repeat_interleave(BLOCK, 1)
    bound = torch.maximum(x.abs() / 16, amax * 2.0**-10 / 224) * (1 + 2.0**-20)
    error = (back - x).abs()
    assert (error <= bound).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantize_is_exact_with_powers_of_two(dtype, gen):
    q = ops.quantize(spread_randn(gen, 9, 300), COMPACT)
    exact = decode(q.data) * q.scale_inv.double().repeat_interleave(BLOCK, 1)[:, :300]
    assert torch.equal(ops.dequantize(q, dtype).double(), exact)


def test_values_of_quantized_weights(gen):
    q = ops.quantize_weights(torch.randn(2, 200, 300, generator=gen))
    scales = q.scale_inv.double().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    exact = decode(q.data) * scales[:, :200, :300]
    assert torch.equal(q.float32(), exact.float())


def test_dequantize_wants_compact(gen):
    q = ops.quantize(torch.randn(4, 128, generator=gen), GEMM_READY)
    with pytest.raises(ValueError, match="COMPACT"):
        ops.dequantize(q, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantizing_again_changes_no_value(dtype, gen):
    """A path that dequantizes and quantizes again in rows pays with time, not with accuracy."""
    x = spread_randn(gen, 400, 256).to(dtype)
    once = ops.quantize(x, COMPACT)
    back = ops.dequantize(once, dtype)
    twice = ops.quantize(back, COMPACT)
    assert torch.equal(ops.dequantize(twice, dtype), back)

    # Bits change exactly in blocks whose largest byte is 224: their scale doubles, once.
    largest = decode(once.data).abs().view(400, 2, BLOCK).amax(-1)
    assert torch.equal(twice.scale_inv * 2, torch.where(largest == 224, 1.0, 2.0) * once.scale_inv)
    assert torch.equal(bits(twice.data).view(400, 2, BLOCK)[largest != 224],
                       bits(once.data).view(400, 2, BLOCK)[largest != 224])  # fmt: skip
    assert_same(ops.quantize(ops.dequantize(twice, dtype), COMPACT), twice)


def test_the_doubling_block_exists():
    once = ops.quantize(torch.tensor([[230.0, 3.0]]), COMPACT)
    twice = ops.quantize(ops.dequantize(once, torch.float32), COMPACT)
    assert decode(once.data)[0, 0] == 224
    assert decode(twice.data)[0, 0] == 448
    assert twice.scale_inv == once.scale_inv / 2
