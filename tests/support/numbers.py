"""Slow definitions of the number format in float64 and plain loops, and random inputs."""

import math

import torch

from models.fp8 import reference as ops
from models.fp8.tensor import (
    BLOCK,
    Layout,
    ceil_div,
)

E4M3 = torch.float8_e4m3fn
COMPACT, GEMM_READY = Layout.COMPACT, Layout.GEMM_READY
INF, NAN = math.inf, math.nan


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


def slow_scale(values, dtype_max):
    amax = max([abs(v) for v in values if not math.isnan(v)], default=0.0)
    if amax == 0 or amax == INF:
        return 1.0
    scale = float32(448.0 / amax)
    if scale == INF:
        scale = dtype_max
    return 2.0 ** (math.frexp(scale)[1] - 1)


def slow_quantize(x):
    """Values (float64, before scale_inv) and scale_inv, block by block."""
    dtype_max = torch.finfo(x.dtype).max
    rows, cols = x.shape
    x = x.double()
    values = torch.zeros(rows, cols, dtype=torch.float64)
    scale_inv = torch.zeros(rows, ceil_div(cols, BLOCK))
    for m in range(rows):
        for b in range(ceil_div(cols, BLOCK)):
            part = slice(b * BLOCK, (b + 1) * BLOCK)
            scale = slow_scale(x[m, part].tolist(), dtype_max)
            values[m, part] = nearest_e4m3(x[m, part] * scale)
            scale_inv[m, b] = float32(1.0 / scale)
    return values, scale_inv


def check_quantize(x):
    q = ops.quantize(x, COMPACT)
    values, scale_inv = slow_quantize(x)
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
