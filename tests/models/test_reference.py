"""The reference operations against slow definitions in float64 and plain loops."""

import math
import secrets

import pytest
import torch

from models.fp8 import reference as ops
from models.fp8.tensor import (
    BLOCK,
    BlockScaledTensor,
    BlockScaledWeights,
    Layout,
    ceil_div,
    relayout,
)

E4M3 = torch.float8_e4m3fn
COMPACT, GEMM_READY = Layout.COMPACT, Layout.GEMM_READY
INF, NAN = math.inf, math.nan


@pytest.fixture
def gen():
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


# Definitions


def bits(x):
    return x.view(torch.uint8) if x.dtype is E4M3 else x.view(torch.int32)


def assert_same(a, b):
    assert a.layout is b.layout
    assert torch.equal(bits(a.data), bits(b.data))
    assert torch.equal(bits(a.scale_inv), bits(b.scale_inv))


def nearest_e4m3(v):
    """The E4M3 value nearest to float64 v, ties to even, saturating: from the format, no cast."""
    _, exponent = torch.frexp(v)
    step = torch.exp2((exponent - 1).clamp(min=-6).double() - 3)
    return ((v / step).round() * step).clamp(-448, 448)


def decode(data):
    """E4M3 bytes to float64 by the format's own rule: bias 7, no infinities, 0x7f is NaN."""
    byte = data.view(torch.uint8).long()
    exponent, mantissa = byte >> 3 & 15, (byte & 7).double()
    normal = torch.exp2(exponent.double() - 7) * (1 + mantissa / 8)
    value = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    value = torch.where((byte & 127) == 127, NAN, value)
    return torch.where(byte > 127, -value, value)


def float32(v):
    """A Python float rounded to float32; overflow gives infinity, as in float32 arithmetic."""
    return torch.tensor(v, dtype=torch.float64).float().item()


def slow_scale(values, dtype_max, power_of_two=True, epsilon=0.0):
    amax = max([abs(v) for v in values if not math.isnan(v)], default=0.0)
    amax = max(amax, float32(epsilon))
    if amax == 0 or amax == INF:
        return 1.0
    scale = float32(448.0 / amax)
    if scale == INF:
        scale = dtype_max
    return 2.0 ** (math.frexp(scale)[1] - 1) if power_of_two else scale


def slow_quantize(x, power_of_two=True, epsilon=0.0):
    """Values (float64, before scale_inv) and scale_inv, block by block."""
    dtype_max = torch.finfo(x.dtype).max
    rows, cols = x.shape
    x = x.double()
    values = torch.zeros(rows, cols, dtype=torch.float64)
    scale_inv = torch.zeros(rows, ceil_div(cols, BLOCK))
    for m in range(rows):
        for b in range(ceil_div(cols, BLOCK)):
            part = slice(b * BLOCK, (b + 1) * BLOCK)
            scale = slow_scale(x[m, part].tolist(), dtype_max, power_of_two, epsilon)
            # The product is a float32 before it is cast; with powers of two that changes nothing.
            values[m, part] = nearest_e4m3((x[m, part] * scale).float().double())
            scale_inv[m, b] = float32(1.0 / scale)
    return values, scale_inv


def check_quantize(x, **options):
    q = ops.quantize(x, COMPACT, **options)
    values, scale_inv = slow_quantize(x, **options)
    torch.testing.assert_close(decode(q.data), values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits(q.scale_inv), bits(scale_inv))
    return q


def spread_randn(gen, *shape, octaves=20):
    """Normal values, each row block of a size of its own, some blocks zero."""
    x = torch.randn(*shape, generator=gen)
    size = torch.randint(
        -octaves, octaves + 1, (*shape[:-1], ceil_div(shape[-1], BLOCK)), generator=gen
    )
    size = torch.exp2(size.float()).repeat_interleave(BLOCK, -1)[..., : shape[-1]]
    return x * size * (torch.rand(*shape[:-1], 1, generator=gen) > 0.1)


# Quantize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(7, 256), (3, 300), (5, 1), (1, 127), (0, 256)])
def test_quantize_as_defined(dtype, power_of_two, shape, gen):
    check_quantize(spread_randn(gen, *shape).to(dtype), power_of_two=power_of_two)


def test_quantize_every_power_of_two_amax():
    """amax = 448 * 2^k: the quotient is exact, and any other rounding loses a whole octave."""
    exponents = torch.arange(-126, 119).double()
    x = (448 * torch.exp2(exponents)).float()[:, None]
    q = check_quantize(x)
    assert (decode(q.data) == 448).all()
    check_quantize(torch.nextafter(x, torch.tensor(INF)))  # just above: the next power of two
    check_quantize(torch.nextafter(x, torch.tensor(0.0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_quantize_special_values(dtype, power_of_two):
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
    q = check_quantize(torch.tensor(rows, dtype=dtype), power_of_two=power_of_two)
    assert q.scale_inv[:4, 0].tolist() == [1, 1, 1, 1]
    byte = q.data.view(torch.uint8).tolist()
    assert byte[0] == [0, 0, 0]
    assert byte[1] == [0x80, 0, 0x80]
    assert byte[2] == [0x7E, 0x38, 0xFE]  # 448, 1, -448
    assert byte[3] == [0xFE, 0x7E, 0x7E]
    assert byte[4][0] == 0x7F
    assert (
        q.scale_inv[4]
        == ops.quantize(torch.tensor([[0.0, 1.0, -0.3]]), COMPACT, power_of_two).scale_inv[0]
    )
    assert byte[5] == [0x7F] * 3
    assert q.scale_inv[5] == 1


def test_negative_nan_becomes_the_canonical_one():
    x = torch.full((1, 1), NAN).view(torch.int32).bitwise_or(-(2**31)).view(torch.float32)
    assert ops.quantize(x, COMPACT).data.view(torch.uint8).item() == 0x7F


@pytest.mark.parametrize("power_of_two", [True, False])
def test_epsilon_is_a_floor_for_amax(power_of_two, gen):
    x = torch.cat([torch.zeros(1, 128), spread_randn(gen, 15, 128)])
    check_quantize(x, power_of_two=power_of_two, epsilon=0.1)
    q = ops.quantize(torch.zeros(1, 128), COMPACT, epsilon=448.0 * 8)
    assert q.scale_inv.item() == 8  # not 1: with an epsilon there is no zero amax


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


@pytest.mark.parametrize("power_of_two", [True, False])
def test_round_trip_error_bound(power_of_two, gen):
    """1/16 of the value, or half a subnormal step, which is 2^-10 / 224 of the block's amax."""
    x = spread_randn(gen, 64, 384)
    back = ops.dequantize(ops.quantize(x, COMPACT, power_of_two), torch.float32)
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


def test_dequantize_weights(gen):
    q = ops.quantize_weights(torch.randn(2, 200, 300, generator=gen), power_of_two=False)
    scales = q.scale_inv.double().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    exact = decode(q.data) * scales[:, :200, :300]
    assert torch.equal(ops.dequantize_weights(q, torch.float32), exact.float())
    assert torch.equal(ops.dequantize_weights(q, torch.bfloat16), exact.float().bfloat16())


def test_dequantize_wants_compact(gen):
    q = ops.quantize(torch.randn(4, 128, generator=gen), GEMM_READY)
    with pytest.raises(ValueError, match="COMPACT"):
        ops.dequantize(q, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantizing_again_changes_no_value(dtype, gen):
    """So a path that dequantizes and quantizes again in rows pays with time, not with accuracy."""
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


# Rows


def naive_rows(ids, experts, alignment):
    rows = [[-1] * len(row) for row in ids]
    offsets, counts = [0], []
    for e in range(experts):
        position = offsets[-1]
        for r, row in enumerate(ids):
            for t, expert in enumerate(row):
                if expert == e:
                    rows[r][t] = position
                    position += 1
        counts.append(position - offsets[-1])
        offsets.append(offsets[-1] + ceil_div(counts[-1], alignment) * alignment)
    return rows, counts, offsets


def routing(kind, gen):
    """Local expert ids, and how many experts there are."""
    if kind == "random":
        return torch.randint(-1, 5, (300, 3), generator=gen), 5
    if kind == "empty experts":
        return torch.randint(0, 2, (50, 2), generator=gen) * 3, 6
    if kind == "one expert gets all":
        return torch.full((130, 1), 2), 4
    if kind == "exactly one block":
        return torch.zeros(128, 1, dtype=torch.int64), 2
    if kind == "none for us":
        return torch.full((10, 2), -1), 3
    if kind == "one token":
        return torch.tensor([[-1, 3]]), 4
    assert kind == "no rows"
    return torch.zeros(0, 2, dtype=torch.int64), 3


KINDS = [
    "random", "empty experts", "one expert gets all", "exactly one block", "none for us",
    "one token", "no rows",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", [128, 16, 1])
def test_plan_rows(kind, alignment, gen):
    ids, experts = routing(kind, gen)
    plan = ops.plan_rows(ids, experts, alignment)
    rows, counts, offsets = naive_rows(ids.tolist(), experts, alignment)
    assert plan.rows.tolist() == rows
    assert plan.rows.shape == ids.shape
    assert plan.counts.tolist() == counts
    assert plan.offsets.tolist() == offsets
    assert plan.num_rows == offsets[-1]
    assert {plan.rows.dtype, plan.counts.dtype, plan.offsets.dtype} == {torch.int64}


@pytest.mark.parametrize("bad", [-2, 3])
def test_plan_rows_refuses_unknown_experts(bad):
    with pytest.raises(ValueError, match="expert ids"):
        ops.plan_rows(torch.tensor([[0, bad]]), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_permute(kind, gen):
    ids, experts = routing(kind, gen)
    plan = ops.plan_rows(ids, experts)
    x = torch.randn(ids.shape[0], 40, generator=gen)
    q = ops.quantize(spread_randn(gen, ids.shape[0], 300), COMPACT)
    probs = torch.rand(ids.shape, generator=gen)

    expected = torch.zeros(plan.num_rows, 40)
    data = torch.zeros(plan.num_rows, 300, dtype=torch.uint8)
    scales = torch.zeros(plan.num_rows, 3)
    expected_probs = torch.zeros(plan.num_rows)
    for r in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            to = int(plan.rows[r, t])
            if to >= 0:
                expected[to], data[to], scales[to] = x[r], bits(q.data)[r], q.scale_inv[r]
                expected_probs[to] = probs[r, t]

    assert torch.equal(ops.permute(x, plan), expected)
    assert torch.equal(ops.permute(x.bfloat16(), plan), expected.bfloat16())
    compact = BlockScaledTensor(data.view(E4M3), scales, COMPACT)
    assert_same(ops.permute_scaled(q, plan), compact)
    if plan.num_rows:
        ready = ops.permute_scaled(q, plan, GEMM_READY)
        assert_same(ready, relayout(compact, GEMM_READY))
    assert torch.equal(ops.permute_probs(probs, plan), expected_probs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpermute(kind, dtype, gen):
    ids, experts = routing(kind, gen)
    plan = ops.plan_rows(ids, experts)
    y = torch.randn(plan.num_rows, 24, generator=gen).to(dtype)
    p = torch.randn(plan.num_rows, generator=gen)
    expected = torch.zeros(ids.shape[0], 24)
    expected_probs = torch.zeros(ids.shape)
    for r in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            if plan.rows[r, t] >= 0:
                expected[r] += y[plan.rows[r, t]].float()
                expected_probs[r, t] = p[plan.rows[r, t]]
    assert torch.equal(ops.unpermute(y, plan), expected.to(dtype))
    assert ops.unpermute(y, plan).dtype is dtype
    assert torch.equal(ops.unpermute_probs(p, plan), expected_probs)


def test_unpermute_adds_in_slot_order_and_rounds_once():
    plan = ops.plan_rows(torch.tensor([[2, 1, 0]]), 3, alignment=1)
    y = torch.tensor([[-1e8], [1e8], [1.0]])  # slots: 1, 1e8, -1e8
    assert ops.unpermute(y, plan).item() == 0.0  # (1 + 1e8) - 1e8; another order gives 1
    y = torch.tensor([[2.0**-8], [2.0**-8], [1.0]]).bfloat16()
    assert ops.unpermute(y, plan).item() == 1 + 2.0**-7  # rounded in between: 1


def test_nan_in_another_row_does_not_leak():
    plan = ops.plan_rows(torch.tensor([[0], [-1]]), 1, alignment=1)
    assert ops.unpermute(torch.tensor([[NAN]]), plan)[1].item() == 0
    assert ops.unpermute_probs(torch.tensor([NAN]), plan)[1].item() == 0


def test_permute_and_unpermute_are_each_others_transpose(gen):
    """<permute(x), y> = <x, unpermute(y)>: what makes one the backward of the other."""
    ids, experts = routing("random", gen)
    plan = ops.plan_rows(ids, experts)
    x = torch.randint(-4, 5, (300, 8), generator=gen).float()
    y = torch.randint(-4, 5, (plan.num_rows, 8), generator=gen).float()
    assert (ops.permute(x, plan) * y).sum() == (x * ops.unpermute(y, plan)).sum()


def test_rows_of_the_wrong_length(gen):
    plan = ops.plan_rows(torch.zeros(3, 1, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="3 rows"):
        ops.permute(torch.zeros(4, 8), plan)
    with pytest.raises(ValueError, match="128 rows"):
        ops.unpermute(torch.zeros(3, 8), plan)
    with pytest.raises(ValueError, match="COMPACT"):
        ops.permute_scaled(ops.quantize(torch.zeros(3, 128), GEMM_READY), plan)


# Transpose


def slow_transpose(x):
    """Values (float64, before scale_inv) and scale_inv of the transpose, tile by tile."""
    values = decode(x.data)
    blocks = ceil_div(x.cols, BLOCK)
    out = torch.zeros(x.cols, x.rows, dtype=torch.float64)
    scale_inv = torch.zeros(x.cols, x.rows // BLOCK)
    for i in range(x.rows // BLOCK):
        for j in range(blocks):
            rows, cols = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            tile, scales = values[rows, cols], x.scale_inv[rows, j].double()
            counts = [any(v != 0 and v == v for v in row) for row in tile.tolist()]
            largest = max(
                [s for s, c in zip(scales.tolist(), counts, strict=True) if c], default=1.0
            )
            out[cols, rows] = nearest_e4m3(tile * (scales / largest)[:, None]).t()
            scale_inv[cols, i] = largest
    return out, scale_inv


def check_transpose(x):
    t = ops.transpose_scaled(x)
    values, scale_inv = slow_transpose(x)
    torch.testing.assert_close(decode(t.data), values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits(t.scale_inv), bits(scale_inv))
    assert t.layout is COMPACT
    return t


@pytest.mark.parametrize("shape", [(128, 128), (256, 300), (384, 1), (0, 256)])
@pytest.mark.parametrize("octaves", [0, 3, 8])
def test_transpose_scaled_as_defined(shape, octaves, gen):
    check_transpose(ops.quantize(spread_randn(gen, *shape, octaves=octaves), COMPACT))


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 9, 17, 18, 19, 40, 200])
def test_transpose_rounds_every_byte_as_it_should(shift):
    """All 256 bytes, in a row whose scale is 2^shift below the tile's."""
    data = torch.zeros(128, 256, dtype=torch.uint8)
    data[0] = torch.arange(256)
    data[1] = 0x38  # one, so that row 1 sets the scale
    scales = torch.ones(128, 2)
    scales[0] = 2.0**-100
    scales[1] = 2.0 ** (shift - 100)
    t = check_transpose(BlockScaledTensor(data.view(E4M3), scales, COMPACT))
    if shift == 0:
        nan = (data[0] & 127) == 127
        assert torch.equal(bits(t.data)[~nan, 0], data[0][~nan])  # subnormals too


@pytest.mark.parametrize("scale_of_zeros", [0.0, 1.0, 3.0, 2.0**90])
def test_rows_of_zeros_do_not_set_the_scale(scale_of_zeros, gen):
    x = ops.quantize(torch.randn(128, 128, generator=gen) * 2.0**-60, COMPACT)
    data, scales = x.data.clone(), x.scale_inv.clone()
    bits(data)[7:50] = torch.tensor([0, 0x80], dtype=torch.uint8).repeat(64)  # zeros of both signs
    scales[7:50] = scale_of_zeros
    t = check_transpose(BlockScaledTensor(data, scales, COMPACT))
    assert (t.scale_inv < 2.0**-50).all()
    assert torch.equal(bits(t.data)[:, 7], bits(data)[7])  # the sign of zero survives


def test_rows_of_nan_and_zeros_do_not_set_the_scale(gen):
    x = torch.randn(128, 128, generator=gen) * 2.0**-60
    x[3] = 0
    x[3, 5] = NAN
    q = ops.quantize(x, COMPACT)
    assert q.scale_inv[3] == 1
    t = check_transpose(q)
    assert (t.scale_inv < 2.0**-50).all()
    assert decode(t.data).isnan().nonzero().tolist() == [[5, 3]]


def test_transpose_of_nothing_but_zeros():
    t = check_transpose(ops.quantize(torch.zeros(128, 128), COMPACT))
    assert (t.scale_inv == 1).all()
    padding = BlockScaledTensor(torch.zeros(128, 128).to(E4M3), torch.zeros(128, 1), COMPACT)
    assert (check_transpose(padding).scale_inv == 1).all()


def test_transpose_with_the_smallest_scale():
    """2^-127, the inverse of the largest scale, is subnormal but still a power of two."""
    x = torch.full((128, 128), 1e-38)
    x[0] = 1e-36
    q = ops.quantize(x, COMPACT)
    assert q.scale_inv.min() == 2.0**-127
    check_transpose(q)


def test_transpose_refuses(gen):
    x = torch.randn(128, 128, generator=gen)
    with pytest.raises(ValueError, match="power-of-two"):
        ops.transpose_scaled(ops.quantize(x, COMPACT, power_of_two=False))
    with pytest.raises(ValueError, match="multiple of 128"):
        ops.transpose_scaled(ops.quantize(x[:100], COMPACT))
    with pytest.raises(ValueError, match="COMPACT"):
        ops.transpose_scaled(ops.quantize(x, GEMM_READY))
    q = ops.quantize(x, COMPACT)
    for bad in (NAN, INF, -1.0, 0.0):
        scales = q.scale_inv.clone()
        scales[5] = bad
        with pytest.raises(ValueError, match="power-of-two"):
            ops.transpose_scaled(BlockScaledTensor(q.data, scales, COMPACT))


def test_transpose_against_quantizing_columns_anew(gen):
    """Both only round what becomes subnormal; a scale per column rounds less than one per tile."""
    x = ops.quantize(spread_randn(gen, 256, 256, octaves=6), COMPACT)
    exact = decode(x.data) * x.scale_inv.double().repeat_interleave(BLOCK, 1)
    by_tile = ops.transpose_scaled(x).float32().double().t()
    by_column = ops.quantize_columns(exact.float(), COMPACT).float32().double().t()
    assert ((by_column - exact).abs() <= (by_tile - exact).abs()).all()


# GEMMs


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
    w64 = ops.dequantize_weights(w, torch.float32).double()

    y = ops.grouped_gemm(x, w, offsets, torch.float32)
    dx = ops.grouped_gemm_dgrad(dy, w, offsets, torch.float32)
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
            ops.grouped_gemm_dgrad(quantize(dy, layout), w, offsets, dtype),
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
    assert ops.grouped_gemm_dgrad(nothing, w, offsets, torch.bfloat16).shape == (0, 128)
    dw = ops.grouped_gemm_wgrad(columns, columns, offsets, torch.float32)
    assert torch.equal(dw, torch.zeros(2, 128, 128))


def test_gemms_refuse_offsets_that_do_not_fit(gen):
    x = ops.quantize(torch.randn(128, 128, generator=gen), COMPACT)
    w = ops.quantize_weights(torch.randn(2, 128, 128, generator=gen))
    for bad in ([0, 128], [0, 64, 127], [1, 64, 128]):
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
        (ops.grouped_mm_dgrad(dy, w, offsets), dx),
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


def test_reference_exposes_what_paths_call():
    assert all(hasattr(ops, name) for name in ops.__all__)
    assert isinstance(ops.quantize_weights(torch.zeros(1, 1, 1)), BlockScaledWeights)
